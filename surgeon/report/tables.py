"""Before/after tables, for a terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

Value = float | int | str | None
"""What stands in a cell. None is a figure that doesn't exist on that side, printed as a dash."""


class Unit(Enum):
    """How a number is written."""

    COUNT = "count"
    """Whole numbers with thousands separated."""
    BYTES = "bytes"
    """Bytes as KiB, MiB or GiB."""
    SECONDS = "seconds"
    SHARE = "share"
    """A fraction of one as per cent."""
    NUMBER = "number"
    """Four significant figures."""
    DIFFERENCE = "difference"
    """A small difference, as 1.2e-05."""


@dataclass(frozen=True)
class Row:
    """One figure of two models."""

    label: str
    before: Value
    after: Value
    unit: Unit = Unit.NUMBER

    @property
    def change(self) -> str:
        """The change relative to before, such as `−20.0 %`, or nothing where none can be told."""
        if not isinstance(self.before, (int, float)) or not isinstance(self.after, (int, float)):
            return ""
        if self.unit in (Unit.SHARE, Unit.DIFFERENCE) or self.before == 0:
            return ""
        change = 100 * (self.after / self.before - 1)
        return f"{change:+,.1f} %".replace("-", "−")

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The row as text: label, before, after, change."""
        return self.label, text(self.before, self.unit), text(self.after, self.unit), self.change


def text(value: Value, unit: Unit = Unit.NUMBER) -> str:
    """Returns a value as it stands in a table."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    match unit:
        case Unit.COUNT:
            return f"{value:,.0f}"
        case Unit.BYTES:
            return _bytes(value)
        case Unit.SECONDS:
            return f"{value * 1e3:.3g} ms" if abs(value) < 1 else f"{value:,.1f} s"
        case Unit.SHARE:
            return f"{100 * value:.1f} %"
        case Unit.DIFFERENCE:
            return f"{value:.1e}"
        case Unit.NUMBER:
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def before_after(
    rows: Sequence[Row], *, title: str | None = None, columns: tuple[str, str] = ("before", "after")
) -> Table:
    """Returns a table for a terminal, one line per row, with the change in the last column."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in (*columns, "change"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row.cells)
    return table


def markdown(rows: Sequence[Row], *, columns: tuple[str, str] = ("before", "after")) -> str:
    """Returns the same table in Markdown, ending in a newline."""
    lines = [f"| | {columns[0]} | {columns[1]} | change |", "|---|---:|---:|---:|"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row.cells) + " |" for row in rows
    ]
    return "\n".join(lines) + "\n"


def vocabulary_words(found: Mapping[str, Any]) -> list[str]:
    """Returns in words what became of a vocabulary.

    Args:
        found: the part `vocabulary` of a report.
    """
    saved = {part: n["before"] - n["after"] for part, n in found["parameters"].items()}
    head = f"{saved['head']:,} in the head" if saved["head"] else "the head shares them"
    out = [
        f"vocabulary: {found['after']:,} of {found['before']:,} tokens stay; "
        f"{saved['embedding']:,} parameters saved in the embedding, {head}"
    ]
    if "coverage" in found:
        before, after = (found["tokens_per_character"][side] for side in ("before", "after"))
        out.append(
            f"of the corpus, {found['coverage']:.2%} of the tokens stay as they are; "
            f"tokens per character {before:.4f}, after {after:.4f} ({after / before - 1:+.2%})"
        )
    return out


def _bytes(value: float) -> str:
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(value) >= size:
            return f"{value / size:,.1f} {name}"
    return f"{value:,.0f} B"
