"""One model made smaller in every way there is: size, perplexity and speed of each, side by side.

    python tools/bench/toolbox.py CALIBRATION_TEXT EVALUATION_TEXT -o FOLDER [--rows pruned-20,...]

Each row is a recipe in `tools/bench/recipes`; the row `vocabulary` keeps the tokens that the
calibration text uses. Where a recipe begins as that of an earlier row does and goes on, only the
rest is done, on that row's result: quantised by `surgeon quantize`, trained further by `surgeon
recover`, anything else by `surgeon run`. What FOLDER holds already is not made again. The table is
that of `surgeon compare`: perplexity on the first windows of 1,024 tokens of the evaluation text,
sizes on disk and in memory, and speed, all models timed in turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).parent / "recipes"
VOCABULARY = "vocabulary"
ROWS = (
    *("pruned-20", "pruned-20-int8", "pruned-20-int4", "pruned-30", "recovered-30"),
    *("two-of-four", "low-rank-10", VOCABULARY),
)


def surgeon(*arguments: object) -> None:
    """Runs a command and stops with it where it fails."""
    program = "import sys; from surgeon.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def recipe_of(row: str) -> Mapping[str, Any]:
    """Returns a row's recipe as plain values."""
    return yaml.safe_load((RECIPES / f"{row}.yaml").read_text(encoding="utf-8"))


def begun(row: str, others: tuple[str, ...]) -> str | None:
    """Returns the row whose recipe is the beginning of this one's, if any of the others' is."""
    own = recipe_of(row)
    for other in others:
        base = recipe_of(other)
        passes = base["passes"]
        alike = all(base.get(key) == own.get(key) for key in ("budget", "calibration"))
        if alike and "quantize" not in base and own["passes"][: len(passes)] == passes:
            return other
    return None


def gone_on(row: str, base: str, out: Path, arguments: argparse.Namespace) -> None:
    """Does the rest of a recipe on another row's result."""
    own, folder = recipe_of(row), arguments.out / base
    rest = own["passes"][len(recipe_of(base)["passes"]) :]
    trusted = ("--trust-remote-code", "--no-verify")
    if not rest:
        options = [f for key, value in own["quantize"].items() for f in (f"--{key}", value)]
        surgeon("quantize", folder, "-o", out, *options, *trusted)
    elif rest[0].get("compensate") == "recover":
        options = [f for k, v in rest[0].items() if k != "compensate" for f in (f"--{k}", v)]
        surgeon("recover", folder, "-o", out, "--data", arguments.calibration, *options, *trusted)
    else:
        left = {**{k: v for k, v in own.items() if k != "budget"}, "passes": rest}
        file = out.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(left), encoding="utf-8")
        data = ("--calibration", arguments.calibration)
        surgeon("run", file, folder, "-o", out, *data, *trusted)


def made(row: str, arguments: argparse.Namespace) -> Path:
    """Returns the folder of a row, made now if it wasn't before."""
    out: Path = arguments.out / row
    if out.exists():
        return out
    start = time.perf_counter()
    there = tuple(other for other in ROWS[: ROWS.index(row)] if (arguments.out / other).exists())
    if row == VOCABULARY:
        surgeon("prune", arguments.model, "-o", out, "--trim-vocab", arguments.calibration)
    elif base := begun(row, there):
        gone_on(row, base, out, arguments)
    else:
        recipe = RECIPES / f"{row}.yaml"
        data = ("--calibration", arguments.calibration)
        surgeon("run", recipe, arguments.model, "-o", out, *data, "--no-verify")
    print(f"{row}: {time.perf_counter() - start:.0f} s", flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--no-speed", action="store_true")
    arguments = parser.parse_args()
    rows = arguments.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    folders = [made(row, arguments) for row in rows]
    surgeon(
        *("compare", arguments.model, *folders, "--trust-remote-code"),
        *("--text", arguments.text, "--windows", arguments.windows, "--no-writing"),
        *("--markdown", arguments.out / "table.md", "--overwrite"),
        *(("--no-speed",) if arguments.no_speed else ()),
    )


if __name__ == "__main__":
    main()
