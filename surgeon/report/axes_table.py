"""Axes in a terminal, one table, axes that differ by their layer only folded into one line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from surgeon.axes.axes import Axes, Axis

if TYPE_CHECKING:
    from rich.table import Table

_NUMBER = re.compile(r"(?<=\.)\d+(?=[./]|$)")


def _fold(axis: Axis) -> tuple[str, ...]:
    """What axes of different layers must share to be one line."""
    return (
        _NUMBER.sub("*", axis.name),
        axis.role,
        str(axis.size),
        axis.gauge.text,
        "; ".join(dict.fromkeys(r.why for r in axis.pins)),
        "; ".join(dict.fromkeys(r.why for r in axis.inexact)),
    )


def axes_tables(axes: Axes) -> list[Table]:
    """Returns the axes and the branches as tables."""
    from rich.table import Table

    table = Table(title="axes", title_justify="left")
    for column in ("axis", "role", "size", "times", "parameters", "change of basis", "prunable"):
        table.add_column(column, justify="right" if column in ("size", "times") else "left")
    folded: dict[tuple[str, ...], list[Axis]] = {}
    for axis in axes.axes:
        folded.setdefault(_fold(axis), []).append(axis)
    for (name, role, size, gauge, pins, inexact), found in folded.items():
        state = f"no: {pins}" if pins else (f"yes, not exact: {inexact}" if inexact else "yes")
        members = len({m.param for m in found[0].members})
        table.add_row(name, role, size, str(len(found)), str(members), gauge, state)
    tables = [table]
    if axes.branches:
        depth = Table(title="branches", title_justify="left")
        for column in ("branch", "times", "parameters it owns"):
            depth.add_column(column)
        kinds: dict[str, list[int]] = {}
        for branch in axes.branches:
            kinds.setdefault(_NUMBER.sub("*", branch.name), []).append(len(branch.params))
        for name, owned in kinds.items():
            depth.add_row(name, str(len(owned)), str(owned[0]))
        tables.append(depth)
    return tables
