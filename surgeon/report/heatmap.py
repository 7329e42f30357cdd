"""Kept width by layer and role, as an inline SVG that follows the page's colours."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from surgeon.report.colours import ink, shade

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=[./]|$)")
WIDE, TALL, GAP, TOP = 30, 24, 2, 34


def layer_of(name: str) -> int | None:
    """Returns the number of the layer that an axis lies in: the first number in its path."""
    found = _NUMBER.search(name.rpartition("/")[0])
    return int(found[1]) if found else None


def _cells(
    axes: Sequence[Mapping[str, Any]], gone: Collection[str]
) -> dict[str, dict[int | None, list[tuple[str, int, int]]]]:
    """By role and layer: name, width before, width after, of every axis there."""
    out: dict[str, dict[int | None, list[tuple[str, int, int]]]] = {}
    for axis in axes:
        name, after = axis["name"], 0 if axis["name"] in gone else axis["after"]
        cell = (name, axis["before"], after)
        out.setdefault(axis["role"], {}).setdefault(layer_of(name), []).append(cell)
    return out


def heatmap(axes: Sequence[Mapping[str, Any]], gone: Collection[str] = ()) -> str:
    """Returns the picture of what is kept, a row a role and a column a layer.

    A cell is coloured by the share that was removed and says how many channels are left. Axes that
    belong to no layer stand in the first column.

    Args:
        axes: the entries of `surgeon.json`: name, role, before and after.
        gone: names of axes that went with a dropped branch.
    """
    cells = _cells(axes, gone)
    layers = sorted({n for row in cells.values() for n in row if n is not None})
    columns: list[int | None] = [None, *layers]
    if not any(None in row for row in cells.values()):
        columns = [*layers]
    left = 16 + 7 * max((len(role) for role in cells), default=0)
    wide = {n: _width(cells, n) for n in columns}
    starts: dict[int | None, int] = {}
    x = left
    for n in columns:
        starts[n] = x
        x += wide[n] + GAP + (10 if n is None else 0)
    height = TOP + len(cells) * (TALL + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="heat" role="img" width="{x}" '
        f'height="{height}" viewBox="0 0 {x} {height}" font-size="11" '
        'font-family="ui-monospace, Menlo, Consolas, monospace">',
        "<title>channels kept by role and layer</title>",
    ]
    for n in columns:
        label = "all" if n is None else str(n)
        middle = starts[n] + wide[n] / 2
        lines.append(
            f'<text x="{middle:.0f}" y="{TOP - 8}" text-anchor="middle" fill="currentColor">'
            f"{label}</text>"
        )
    for i, (role, row) in enumerate(cells.items()):
        y = TOP + i * (TALL + GAP)
        lines.append(
            f'<text x="{left - 8}" y="{y + 16}" text-anchor="end" fill="currentColor">'
            f"{escape(role)}</text>"
        )
        lines += [_cell(starts[n], y, wide[n], row[n]) for n in columns if n in row]
    return "\n".join([*lines, "</svg>"])


def _width(cells: Mapping[str, Mapping[int | None, Any]], n: int | None) -> int:
    """The width of a column: its longest number must fit."""
    longest = max(
        (len(_text(row[n])) for row in cells.values() if n in row),
        default=0,
    )
    return max(WIDE, 7 * longest + 8)


def _text(found: Sequence[tuple[str, int, int]]) -> str:
    """What stands in a cell: the width left, of several axes the range."""
    widths = sorted({after for _, _, after in found})
    return str(widths[0]) if len(widths) == 1 else f"{widths[0]}–{widths[-1]}"


def _cell(x: int, y: int, wide: int, found: Sequence[tuple[str, int, int]]) -> str:
    before, after = sum(cell[1] for cell in found), sum(cell[2] for cell in found)
    share = 1 - after / before if before else 0.0
    facts = "\n".join(
        f"{name}: {new:,} of {old:,}" + ("" if new else ", dropped") for name, old, new in found
    )
    return (
        f'<g class="cell"><title>{escape(facts)}</title><rect x="{x}" y="{y}" width="{wide}" '
        f'height="{TALL}" rx="3" fill="{shade(share)}"/><text x="{x + wide / 2:.1f}" y="{y + 16}" '
        f'text-anchor="middle" fill="{ink(share)}">{_text(found)}</text></g>'
    )
