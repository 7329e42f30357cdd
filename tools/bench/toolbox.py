"""One model made smaller in every way there is: size, perplexity and speed of each, side by side.

    python tools/bench/toolbox.py CALIBRATION_TEXT EVALUATION_TEXT -o FOLDER [--rows pruned-20,...]

Each row is a recipe in `tools/bench/recipes`, run by `surgeon run`; the row `vocabulary` keeps the
tokens that the calibration text uses. What FOLDER holds already is not made again. The table is
that of `surgeon compare`: perplexity on the first windows of 1,024 tokens of the evaluation text,
sizes on disk and in memory, and speed, all models timed in turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

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


def made(row: str, arguments: argparse.Namespace) -> Path:
    """Returns the folder of a row, made now if it wasn't before."""
    out: Path = arguments.out / row
    if out.exists():
        return out
    start = time.perf_counter()
    if row == VOCABULARY:
        surgeon("prune", arguments.model, "-o", out, "--trim-vocab", arguments.calibration)
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
