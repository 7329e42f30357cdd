"""What holds of which architecture, by running tiny models. See docs/conformance.md."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/zoo", description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all of the table without any")
    parser.add_argument(
        "--sweep", action="store_true", help="try every one of Transformers instead"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=300, help="allowed for each")
    parser.add_argument("--no-graphs", action="store_true", help="no .pt2 and ONNX files")
    parser.add_argument("--dry", action="store_true", help="print, and leave the document alone")
    return parser.parse_args()


def _table(options: argparse.Namespace) -> int:
    from functools import partial

    from tools.conformance.apart import each
    from tools.conformance.measure import measure
    from tools.conformance.table import HEAD, NAMES, PATH, read, row, text, updated

    names = options.names or NAMES
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        print(f"not in the table: {', '.join(unknown)}; there are {', '.join(NAMES)}")
        return 2
    failed = 0
    print(" | ".join(HEAD), flush=True)
    call = partial(measure, graphs=not options.no_graphs)
    for name, good, found in each(call, names, jobs=options.jobs, seconds=options.seconds):
        if not good:
            failed += 1
            print(f"{name}: {found}", flush=True)
            continue
        print(" | ".join(row(found)), f"({found.seconds:.0f} s)", flush=True)
        if not options.dry:
            # Rows that others write meanwhile stay.
            PATH.write_text(text(updated(read(), [found])), encoding="utf-8")
    return 1 if failed else 0


def main() -> int:
    """Runs the command and returns its exit status."""
    options = _options()
    if options.sweep:
        from tools.conformance.sweep import sweep

        return sweep(options.names, jobs=options.jobs, seconds=options.seconds)
    return _table(options)


if __name__ == "__main__":
    sys.exit(main())
