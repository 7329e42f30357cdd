"""The demonstration: a real pretrained model pruned, written, loaded back, exported and run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

PROMPT = "The heart is a muscle that"
NEW_TOKENS = 24
WINDOW = 512


def run(out: Path, ratio: float, windows: int) -> None:
    """Prunes `smollm2`, writes everything below `out`, and prints a before/after table.

    Raises:
        SurgeonError: what any of the steps refuses.
    """
    import numpy as np
    import torch
    from rich.console import Console

    from surgeon import exporting
    from surgeon.axes.budget import check_ratio
    from surgeon.axes.plan import Plan
    from surgeon.emit.files import check_output, output_file
    from surgeon.pipeline import open_model, prune
    from surgeon.report.evaluate import perplexity
    from surgeon.report.tables import Row, Unit, before_after, markdown
    from surgeon.report.verify import Probe
    from surgeon.runtime.generate import generate
    from surgeon.runtime.model import open_session
    from surgeon.saving import load_transformers

    check_ratio(ratio, "--ratio")
    check_output(out / "model", overwrite=True)
    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, style="bold")

    say("1. capture and analyse SmolLM2-135M")
    origin = open_model("smollm2")
    console.print(
        f"   {len(origin.program.ops):,} operations, {len(origin.axes.axes)} axes "
        f"({', '.join(origin.axes.roles)}) in {origin.seconds:.1f} s",
        highlight=False,
    )
    say(f"2. prune {ratio:.0%} of the decoder parameters, write, verify")
    pruned = prune(origin, ratio=ratio, verify=False)  # saving verifies
    folder = out / "model"
    report = pruned.save(folder, overwrite=True)
    assert report.verification is not None
    console.print(
        f"   {report.target['architecture']}, {report.ratio['removed']:.2%} removed; largest "
        f"difference from the masked model {report.verification['largest']:.1e} of the largest "
        "logit",
        highlight=False,
    )
    say("3. load with plain Transformers, measure")
    assert origin.source is not None
    tokenizer = origin.source.load_tokenizer()
    dense = prune(origin, plan=Plan(), verify=False).model.float()
    small = load_transformers(folder)
    scores = [perplexity(m, tokenizer, window=WINDOW, max_windows=windows) for m in (dense, small)]
    texts = [generate(m, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS) for m in (dense, small)]
    speed = _interleaved(dense, small)
    say("4. export to ONNX, run in ONNX Runtime")
    start = time.perf_counter()
    written = exporting.export(str(folder), "onnx", out / "onnx", overwrite=True)
    exported = time.perf_counter() - start
    console.print("   " + written.summary, highlight=False)
    session = open_session(written.path, device="cpu")
    probe = Probe(
        "left padding",
        torch.tensor([[0, 0, 0, 504, 260, 3575], [504, 260, 3575, 314, 253, 1789]]),
        torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
    )
    with torch.no_grad():
        want = small(
            input_ids=probe.ids, attention_mask=probe.mask, position_ids=probe.positions
        ).logits.numpy()
    got = session.run(probe.ids.numpy(), probe.mask.numpy())
    real = probe.mask.bool().numpy()
    gap = float(np.abs(got - want)[real].max() / np.abs(want[real]).max())
    greedy = generate(session, tokenizer, PROMPT, max_new_tokens=NEW_TOKENS)
    same = greedy.tokens == texts[1].tokens
    agree = "the same" if same else "NOT the same"
    console.print(
        f"   exported in {exported:.1f} s; largest difference from Transformers {gap:.1e} of the "
        f"largest logit; {len(greedy.tokens)} greedy tokens in {greedy.seconds:.1f} s, "
        f"{agree} as those of Transformers in {texts[1].seconds:.1f} s",
        highlight=False,
    )
    stored = [p for p in origin.program.params if p.kind == "parameter"]
    before_bytes = sum(origin.read(p.name).numel() * origin.dtype(p.name).itemsize for p in stored)
    rows = [
        Row("parameters", *_pair(report.parameters["total"]), Unit.COUNT),
        Row("decoder-layer parameters", *_pair(report.parameters["decoder"]), Unit.COUNT),
        Row("weights on disk", before_bytes, report.target["bytes"], Unit.BYTES),
        Row("perplexity", scores[0].perplexity, scores[1].perplexity),
        Row("seconds for 1×256 tokens", *speed, Unit.SECONDS),
    ]
    console.print(before_after(rows, title=f"SmolLM2-135M, {ratio:.0%} asked for, no retraining"))
    console.print(
        f"perplexity on {scores[0].text}, {scores[0].windows} windows of {WINDOW} tokens",
        highlight=False,
    )
    for label, text in zip(("before", "after", "onnx"), (*texts, greedy), strict=True):
        console.print(f"{label:>6}: {PROMPT}{text.text}", highlight=False, markup=False)
    figures: dict[str, Any] = {
        "report": json.loads(report.to_json()),
        "perplexity": [s.perplexity for s in scores],
        "onnx": {"largest_difference": gap, "same_tokens": same, "seconds": exported},
        "seconds": {"capture": origin.seconds, "forward": list(speed)},
    }
    texts_of = {"demo.json": json.dumps(figures, indent=1) + "\n", "table.md": markdown(rows)}
    for name, text in texts_of.items():
        with output_file(out / name, overwrite=True) as partial:
            partial.write_text(text, encoding="utf-8")
    console.print(f"written to {out}", highlight=False)


def _pair(found: Any) -> tuple[int, int]:
    return found["before"], found["after"]


def _interleaved(dense: Any, small: Any, repeats: int = 5) -> tuple[float, float]:
    """Returns the median seconds of a forward pass of both, measured in turns."""
    import statistics

    import torch

    ids = torch.arange(256)[None] + 1000
    times: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for turn in range(repeats + 1):
            for model, found in zip((dense, small), times, strict=True):
                start = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                if turn:  # the first turn warms up
                    found.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])
