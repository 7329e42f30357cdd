"""Perplexity of every shipped recipe at several ratios, with CPU seconds and peak memory.

    python tools/bench/quality.py CALIBRATION_TEXT EVALUATION_TEXT [--recipes default,flap]

Each prune runs in a process of its own, so that its memory is its own. The protocol: calibration on
64 windows of 512 tokens (seed 0); perplexity on the first 48 non-overlapping windows of 1,024
tokens of the first 700,000 characters of the other text, fp32, no cache, nothing added. Where the
first 16 windows give more than 100, that is printed with a ~ and the rest is left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.report.evaluate import Windows

CHARACTERS, WINDOWS, LENGTH = 700_000, 48, 1024
FIRST, ENOUGH = 16, 100.0
RATIOS = (0.1, 0.2, 0.3, 0.5)


def one(arguments: argparse.Namespace) -> None:
    """Prunes once and prints what came of it as JSON; runs in its own process."""
    from surgeon import pipeline
    from surgeon.calibrate.data import Piece, Recipe
    from surgeon.errors import SurgeonError
    from surgeon.report.evaluate import Text, windows_of

    start, cpu = time.perf_counter(), time.process_time()
    data = Recipe((Piece(str(arguments.calibration)),))
    origin = pipeline.open_model(arguments.model)
    try:
        pruned = pipeline.prune(
            origin,
            recipe=arguments.one,
            ratio=arguments.ratio,
            calibration=data,
            verify=False,
            target="pt2" if arguments.any_shape else "transformers",
        )
    except SurgeonError as error:
        print(json.dumps({"refused": f"{error.what}: {error.why}"}))
        return
    found = {
        "removed": pruned.report.ratio["removed"],
        "total": pruned.report.parameters["total"]["after"],
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    assert origin.source is not None
    text = Text(arguments.text.name, arguments.text.read_text(encoding="utf-8")[:CHARACTERS])
    tokenizer = origin.source.load_tokenizer()
    every = windows_of(tokenizer, text, window=LENGTH, max_windows=arguments.windows)
    print(json.dumps({**found, "perplexity": told(pruned.model.float(), every)}))


def told(model: Any, every: Windows) -> str:
    """Returns the perplexity over all windows, or that over the first ones if it is high."""
    from surgeon.report.evaluate import score

    first, rest = every.ids[:FIRST], every.ids[FIRST:]
    found = score(model, replace(every, ids=first)).perplexity
    if not len(rest):
        return f"{found:.2f}"
    if found > ENOUGH:
        return f"~{found:,.0f}"
    # Windows are as long as each other: the mean over all is that of the parts, by their numbers.
    share = len(first) / len(every.ids)
    more = score(model, replace(every, ids=rest)).perplexity
    return f"{found**share * more ** (1 - share):.2f}"


def main() -> None:
    from surgeon.recipes import load_recipe, shipped

    # Those that remove something: a ratio means nothing to the others.
    every = [name for name in shipped() if load_recipe(name).placed["select"]]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--recipes", default=",".join(every))
    parser.add_argument("--ratios", default=",".join(map(str, RATIOS)))
    parser.add_argument("--windows", type=int, default=WINDOWS)
    parser.add_argument("--any-shape", action="store_true", help="a graph, which any plan fits")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--ratio", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments)
        return
    print("| recipe | ratio | removed | perplexity | CPU s | wall s | peak MiB |")
    print("|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for recipe in arguments.recipes.split(","):
        for ratio in arguments.ratios.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", recipe, "--ratio", ratio]
            with tempfile.TemporaryFile("w+") as said:
                result = subprocess.run(command, stdout=said, check=False)
                said.seek(0)
                lines = said.read().splitlines()
            if result.returncode or not lines:
                raise SystemExit(f"{recipe} at {ratio} ended with {result.returncode}")
            found = json.loads(lines[-1])
            if "refused" in found:
                print(f"| {recipe} | {ratio} | {found['refused']} | | | | |", flush=True)
                continue
            print(
                f"| {recipe} | {ratio} | {found['removed']:.2%} | {found['perplexity']} | "
                f"{found['cpu']:.0f} | {found['seconds']:.0f} | {found['mib']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
