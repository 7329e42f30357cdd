"""Writes a pruned model with its weights in fewer bits, and what each step takes and scores."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.emit import hf_writing
from surgeon.emit.files import output_folder
from surgeon.emit.lowbit import write as low
from surgeon.emit.lowbit.scheme import Scheme
from surgeon.errors import Code, SurgeonError, no_weights
from surgeon.report.evaluate import Text, perplexity, read_text
from surgeon.saving import (
    load_transformers,
    moved,
    write_plan,
    write_report,
)

if TYPE_CHECKING:
    from surgeon.pruned import Pruned, Report


@dataclass(frozen=True)
class Measuring:
    """A text that every step of a quantised result is scored on.

    Attributes:
        text: a file.
        windows: scored at most.
        window: tokens in a window.
    """

    text: Path
    windows: int = 8
    window: int = 1024


def no_steps(measure: Measuring, why: str) -> SurgeonError:
    """Returns the refusal of a text that nothing would be scored on."""
    return SurgeonError(
        Code.BAD_OPTION,
        "the text would not be looked at",
        at=f"--measure-text {measure.text}",
        why=f"it is what both steps of a quantised result are scored on, and {why}",
        try_="--quantize int8 with it; or surgeon eval OUT --text FILE",
    )


def check_scheme(scheme: Scheme | None, target: str, id: str) -> None:
    """Refuses a quantisation that can't be written, before any work is done.

    Raises:
        SurgeonError: `target-refused` for a graph, `missing-extra` without its library.
    """
    if scheme is None:
        return
    if target != "transformers":
        if "gguf" in target.split(","):
            try_ = (
                "surgeon prune --to transformers, then surgeon export OUT --to gguf --quantize q8_0"
            )
        else:
            try_ = "surgeon prune first, then surgeon export OUT --to onnx --quantize int4"
        raise SurgeonError(
            Code.TARGET_REFUSED,
            f"a result for {target} isn't quantised here",
            at=id,
            why="these schemes are of Transformers checkpoints; other runtimes have roundings and "
            "kernels of their own",
            try_=try_,
        )
    scheme.need_library()


def save(
    pruned: Pruned,
    path: Path,
    scheme: Scheme,
    *,
    overwrite: bool,
    verify: bool,
    measure: Measuring | None,
) -> Report:
    """Writes the result in fewer bits: the plan is verified in fp32, then its tensors rounded.

    Raises:
        SurgeonError: as for a result in full precision; `missing-extra`; what the text is refused
            for.
    """
    if pruned.origin.tensors is None:
        raise no_weights(pruned.origin.id)
    check_scheme(scheme, "pt2" if pruned.is_graph else pruned.target, pruned.origin.id)
    source, own = pruned.origin.source, pruned.origin.dtype
    assert source is not None
    dtype = hf_writing.main_dtype(pruned.emission, pruned.selection, pruned.dtype)
    emission = hf_writing.with_dtype(pruned.emission, dtype)
    text = None if measure is None else read_text(measure.text)
    before = sum(own(name).itemsize * prod(pruned.selection.shape(name)) for name in emission.names)
    score = _scorer(pruned, text, measure)
    seconds = dict(pruned.report.seconds)
    start = time.perf_counter()
    with output_folder(path, overwrite=overwrite, need_bytes=before) as folder:
        chosen = low.write(
            folder,
            emission,
            pruned.selection,
            pruned.full,
            own,
            scheme,
            tokenizer_files=source.tokenizer_files,
            tokenizer=source.tokenizer,
            generation_config=source.generation_config,
        )
        write_plan(folder, pruned)
        seconds["write"] = time.perf_counter() - start
        start = time.perf_counter()
        found: dict[str, Any] = {**scheme.to_data(), "library": scheme.library}
        report = pruned.report
        loaded = load_transformers(folder)
        if verify:
            report = replace(report, verification=pruned.verify(source.load_tokenizer()).to_json())
            checked = low.check(folder, emission, pruned.selection, pruned.full, own)
            found |= {
                "weights": checked.weights,
                "without_loss": checked.same,
                "largest_step": checked.largest,
                "logits": moved(pruned, loaded),
            }
        seconds["verify"] = time.perf_counter() - start
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        pruned_step = {"name": "pruned", "bytes": before, "memory": before, **score(pruned.model)}
        found["steps"] = [
            {**pruned_step, "dtype": str(dtype).removeprefix("torch.")},
            {"name": scheme.scheme, "bytes": size, **score(loaded), "memory": low.memory(loaded)},
        ]
        report = replace(
            report,
            notes=(*report.notes, *emission.notes, *chosen.notes),
            target={
                "name": "transformers",
                "architecture": emission.architecture,
                "remote_code": emission.candidate.remote,
                "dtype": str(dtype).removeprefix("torch."),
                "bytes": size,
            },
            quantize=found,
            # A scheme that was named when it was saved belongs to what makes the same again.
            as_recipe={**report.as_recipe, "quantize": scheme.to_data()}
            if report.as_recipe
            else {},
            seconds=seconds,
        )
        write_report(folder, pruned, report)
    return report


def _scorer(
    pruned: Pruned, text: Text | None, measure: Measuring | None
) -> Callable[[Any], dict[str, float]]:
    """Returns what scores a model on the text: nothing without one."""
    if text is None or measure is None:
        return lambda _: {}
    source = pruned.origin.source
    tokenizer = source.load_tokenizer() if source else None

    def score(model: Any) -> dict[str, float]:
        found = perplexity(
            model, tokenizer, text=text, window=measure.window, max_windows=measure.windows
        )
        return {"perplexity": found.perplexity}

    return score
