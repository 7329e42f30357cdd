"""What `prune` and `verify` show in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.pruned import Report


def print_report(report: Report, out: Path | None) -> None:
    """Shows what a prune did, and where it was written; nowhere where it was only planned."""
    from rich.console import Console

    from surgeon.report.tables import Row, Unit, before_after, vocabulary_words

    rows = [
        Row(f"parameters, {name}", found["before"], found["after"], Unit.COUNT)
        for name, found in report.parameters.items()
    ]
    sizes: dict[str, dict[tuple[int, int], int]] = {}
    for axis in report.axes:
        if axis["before"] != axis["after"]:
            pair = (axis["before"], axis["after"])
            sizes.setdefault(axis["role"], {})[pair] = sizes.get(axis["role"], {}).get(pair, 0) + 1
    for role, pairs in sizes.items():
        for (before, after), times in pairs.items():
            label = f"{role} (×{times})" if times > 1 else role
            rows.append(Row(label, before, after, Unit.COUNT))
    console = Console()
    console.print(before_after(rows, title=str(out) if out else "plan (nothing is written)"))
    removed = report.ratio["removed"]
    console.print(f"removed {removed:.3%} of the decoder parameters", highlight=False)
    if report.sparsity:
        _print_sparsity(report.sparsity)
    if report.vocabulary:
        for line in vocabulary_words(report.vocabulary):
            console.print(line, highlight=False)
    if report.branches:
        console.print(f"dropped {', '.join(report.branches)}", highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False)
    if report.target:
        console.print(f"written as {report.target.get('architecture', report.target['name'])}")
    if report.verification:
        print_verification(report.verification)
    if report.quantize:
        print_steps(report.quantize)


def print_steps(found: Any) -> None:
    """Shows what storing weights in fewer bits did: size and perplexity of each step."""
    from rich.console import Console
    from rich.table import Table

    scored = any("perplexity" in step for step in found["steps"])
    table = Table("step", "MB on disk", "MB in memory", *(["perplexity"] if scored else []))
    for step in found["steps"]:
        cells = [step["name"], f"{step['bytes'] / 1e6:,.1f}", f"{step['memory'] / 1e6:,.1f}"]
        table.add_row(*cells, *([f"{step['perplexity']:.3f}"] if scored else []))
    console = Console()
    console.print(table)
    if "weights" in found:
        console.print(
            f"{found['weights']} weights in fewer bits, each within {found['largest_step']:.3f} of "
            f"a step; {found['without_loss']} of them lost nothing; logits move by "
            f"{found['logits']:.1e} of the largest",
            highlight=False,
        )


def _print_sparsity(found: Any) -> None:
    """Shows how many weights are zero, and what that saves where."""
    from rich.console import Console

    from surgeon.report.tables import Unit, text

    console = Console()
    pattern = f", {found['pattern']} along the inputs" if found["pattern"] else ""
    console.print(
        f"zeros: {found['sparsity']:.1%} of {found['weights']:,} weights in "
        f"{len(found['parameters'])} parameters{pattern}",
        highlight=False,
    )
    for row in found["saves"]:
        sizes = " to ".join(text(row[key], Unit.BYTES) for key in ("before", "after"))
        saved = f"{sizes} ({row['share']:.4g}x)" if row["after"] != row["before"] else ""
        said = "; ".join(part for part in (saved, row["says"]) if part)
        console.print(f"  in {row['where']}: {said}", highlight=False)


def print_verification(found: Any) -> None:
    """Shows how far a result is from the masked model."""
    from rich.console import Console

    console = Console()
    compared, whole = "model", "largest logit"
    if layers := found.get("layers"):
        compared = f"layers ({len(layers)} branches, embedding and head)"
        whole = f"largest value, on {found['tokens']} random activations"
    console.print(
        f"verified: largest difference from the masked {compared} {found['largest']:.1e} of the "
        f"{whole} ({found['tolerance']:.0e} allowed)",
        highlight=False,
    )
    for reason in found["reasons"]:
        console.print(f"not what masking gives: {reason}", highlight=False)
    if found.get("cast") is not None:
        console.print(
            f"rounding to the checkpoint's element type moves logits by {found['cast']:.1e}",
            highlight=False,
        )
