"""Perplexity of a pruned model before and after it is trained, with tokens and CPU seconds.

    python tools/bench/recovery.py CALIBRATION_TEXT EVALUATION_TEXT [--steps 200] [--method lora]

It is pruned by a recipe on 64 windows of 512 tokens and trained on the calibration text. Perplexity
is by the protocol of `quality.py`, on the first windows. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

CHARACTERS, LENGTH = 700_000, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipe", default="width")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--method", default="full")
    parser.add_argument("--distill", default="logits")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-4)
    arguments = parser.parse_args()

    import surgeon
    from surgeon.calibrate.data import Piece, Recipe
    from surgeon.report.evaluate import Text, perplexity

    data = Recipe((Piece(str(arguments.calibration)),), samples=arguments.samples)
    origin = surgeon.open_model(arguments.model)
    assert origin.source is not None
    tokenizer = origin.source.load_tokenizer()
    content = arguments.text.read_text(encoding="utf-8")[:CHARACTERS]

    def score(pruned: Any) -> float:
        found = perplexity(
            pruned.model.float(),
            tokenizer,
            text=Text(arguments.text.name, content),
            window=LENGTH,
            max_windows=arguments.windows,
        )
        return found.perplexity

    def timed(call: Any) -> tuple[Any, dict[str, float]]:
        start, cpu = time.perf_counter(), time.process_time()
        made = call()
        return made, {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}

    options = {n: getattr(arguments, n) for n in ("method", "distill", "steps", "batch", "length")}
    pruned, pruning = timed(
        lambda: surgeon.prune(
            origin,
            recipe=arguments.recipe,
            ratio=arguments.ratio,
            calibration=data,
            verify=False,
        )
    )
    before = score(pruned)
    print(json.dumps({"before": before, "pruning": pruning}), flush=True)
    better, training = timed(
        lambda: surgeon.recover(
            pruned,
            data=str(arguments.calibration),
            rate=arguments.rate,
            verify=False,
            **options,
        )
    )
    found = {
        "removed": better.report.ratio["removed"],
        "before": before,
        "after": score(better),
        "windows": arguments.windows,
        "tokens": better.report.recipe[-1]["effect"]["tokens"],
        "training": training,
        **options,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
