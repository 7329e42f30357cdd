"""Two models, or two plans for one, compared axis by axis and layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon.axes.axes import Axes
from surgeon.axes.costs import Cost, Costs
from surgeon.axes.plan import Plan, Selection
from surgeon.report.fold import spans, split
from surgeon.report.tables import Row, Unit

if TYPE_CHECKING:
    from rich.table import Table


_Line = tuple[str, int | None, int | None, tuple[float, ...]]
"""An axis, its size on both sides, and the shares of it that both keep."""


@dataclass(frozen=True)
class Side:
    """One of the two: a model, or what a plan makes of it."""

    name: str
    axes: Axes
    costs: Costs
    plan: Plan = Plan()  # noqa: RUF009  (frozen)


@dataclass(frozen=True)
class Width:
    """One axis on both sides; None where a side has none of that name.

    `overlap` is the share of the smaller selection that the other keeps too, where both are plans
    for one model and both cut the axis.
    """

    name: str
    role: str
    before: int | None
    after: int | None
    overlap: float | None = None


@dataclass(frozen=True)
class Pair:
    """What something takes on both sides; None where a side lacks it."""

    before: Cost | None
    after: Cost | None

    def to_json(self) -> dict[str, Any]:
        """Returns the figures side by side."""
        sides = (self.before, self.after)
        return {
            f.name: dict(
                zip(
                    ("before", "after"),
                    (None if s is None else getattr(s, f.name) for s in sides),
                    strict=True,
                )
            )
            for f in fields(Cost)
        }


@dataclass(frozen=True)
class Difference:
    """How two sides differ. `dropped` are branches that only the first has."""

    a: str
    b: str
    per: str
    whole: Pair
    layers: Mapping[str, Pair]
    axes: tuple[Width, ...]
    dropped: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether nothing differs in size or selection."""
        equal = all(w.before == w.after and w.overlap in (None, 1.0) for w in self.axes)
        return (
            equal
            and not self.dropped
            and not self.added
            and self.whole.before == (self.whole.after)
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the difference as plain data; `axes` are all axes, equal ones too."""
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "totals": {**self.whole.to_json(), "per": self.per},
            "layers": {name: pair.to_json() for name, pair in self.layers.items()},
            "axes": [
                {
                    "name": w.name,
                    "role": w.role,
                    "before": w.before,
                    "after": w.after,
                    **({} if w.overlap is None else {"overlap": w.overlap}),
                }
                for w in self.axes
            ],
            "branches": {"dropped": list(self.dropped), "added": list(self.added)},
        }


def difference(a: Side, b: Side) -> Difference:
    """Returns how `b` differs from `a`; axes and layers correspond by name."""
    ours, theirs = dict(_widths(a)), dict(_widths(b))
    roles = {x.name: x.role for side in (b, a) for x in side.axes.axes}
    widths = tuple(
        Width(
            name,
            roles[name],
            ours.get(name),
            theirs.get(name),
            _overlap(a, b, name) if name in ours and name in theirs else None,
        )
        for name in dict.fromkeys((*ours, *theirs))
    )
    before, after = a.costs.layers(a.plan), b.costs.layers(b.plan)
    layers = {
        name: Pair(before.get(name), after.get(name)) for name in dict.fromkeys((*before, *after))
    }
    here, there = _branches(a), _branches(b)
    return Difference(
        a.name,
        b.name,
        a.costs.per,
        Pair(a.costs.under(a.plan), b.costs.under(b.plan)),
        layers,
        widths,
        tuple(name for name in here if name not in there),
        tuple(name for name in there if name not in here),
    )


def _branches(side: Side) -> dict[str, None]:
    return dict.fromkeys(x.name for x in side.axes.branches if x.name not in side.plan.branches)


def _widths(side: Side) -> Iterator[tuple[str, int]]:
    """Yields each axis with the size that is left of it; one that is gone altogether is left out.

    That is one whose every parameter goes with dropped branches.
    """
    left = None
    if side.plan.branches:
        from surgeon.axes.surgery import without_branches

        left = without_branches(side.axes, side.plan.branches).param
    selection = Selection(side.axes, side.plan)
    for axis in side.axes.axes:
        if left is None or any(m.param in left for m in axis.members):
            size = selection.size(side.axes.number[axis.name])
            assert isinstance(size, int)
            yield axis.name, size


def _overlap(a: Side, b: Side, name: str) -> float | None:
    if a.axes is not b.axes:
        return None
    cuts = a.plan.by_axis.get(name), b.plan.by_axis.get(name)
    if cuts[0] is None or cuts[1] is None:
        return None
    arrays = [c.array for c in cuts if c is not None]
    shape = max((x.shape[:-1] for x in arrays), key=len)
    if any(x.shape[:-1] not in ((), shape) for x in arrays):
        return None
    size = a.axes.by_name[name].size
    masks: list[Any] = []
    for array in arrays:
        mask = np.zeros((*shape, size), dtype=bool)
        np.put_along_axis(mask, np.broadcast_to(array, (*shape, array.shape[-1])), True, axis=-1)
        masks.append(mask)
    both = int((masks[0] & masks[1]).sum())
    return both / min(int(m.sum()) for m in masks)


# --- tables ------------------------------------------------------------------------------------


def tables(found: Difference) -> list[Table]:
    """Returns the totals, the axes that differ and the layers that differ as tables."""
    from surgeon.report.tables import before_after

    columns = _short(found.a, found.b)
    out = [before_after(_rows(found.whole, found.per), columns=columns)]
    axes = _folded(
        [
            (w.name, w.before, w.after, () if w.overlap is None else (w.overlap,))
            for w in found.axes
            if w.before != w.after or (w.overlap is not None and w.overlap < 1)
        ]
    )
    if axes:
        out.append(_axes_table(axes, columns))
    changed = {name: pair for name, pair in found.layers.items() if pair.before != pair.after}
    if changed:
        out.append(_layers_table(changed, found.per, columns))
    return out


def _short(a: str, b: str) -> tuple[str, str]:
    """Returns two names or paths for the head of a table: their ends, where those differ."""
    ends = PurePath(a).name or a, PurePath(b).name or b
    return ends if ends[0] != ends[1] else (a, b)


def _layers_table(layers: Mapping[str, Pair], per: str, columns: tuple[str, str]) -> Table:
    """Returns the figures of layers, those with the same ones together."""
    from rich.table import Table

    table = Table(title="layers that differ, each", title_justify="left")
    for name in ("", "of each", *columns, "change"):
        left = name in ("", "of each")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for name, pair in _alike(layers):
        for place, row in enumerate(_rows(pair, per)):
            table.add_row("" if place else name, *row.cells)
    return table


def _axes_table(axes: list[_Line], columns: tuple[str, str]) -> Table:
    """Returns before and after of each axis; for two plans, how much both keep of it."""
    from rich.table import Table

    shared = any(overlap for *_, overlap in axes)
    table = Table(title="axes that differ", title_justify="left")
    for name in ("", *columns, "change", *(("kept by both",) if shared else ())):
        table.add_column(name, justify="right" if name else "left")
    for name, before, after, overlap in axes:
        cells = Row(name, before, after, Unit.COUNT).cells
        ends = (
            dict.fromkeys(f"{share:.0%}" for share in (min(overlap), max(overlap)))
            if overlap
            else ()
        )
        table.add_row(*cells, *(("–".join(ends),) if shared else ()))
    return table


def _rows(pair: Pair, per: str) -> list[Row]:
    def row(name: str, field: str, unit: Unit) -> Row:
        sides = (pair.before, pair.after)
        before, after = (None if s is None else getattr(s, field) for s in sides)
        return Row(name, before, after, unit)

    rows = [
        row("parameters", "parameters", Unit.COUNT),
        row(f"FLOPs per {per}", "flops", Unit.COUNT),
        row("… for each token attended to", "flops_context", Unit.COUNT),
        row("cache per token", "cache_bytes", Unit.BYTES),
    ]
    return [r for r in rows if r.before or r.after]


def _folded(rows: list[_Line]) -> list[_Line]:
    """Returns rows that differ by one number in their name only as one."""
    groups: dict[tuple[str, str, int | None, int | None], list[int]] = {}
    shares: dict[tuple[str, str, int | None, int | None], tuple[float, ...]] = {}
    for name, before, after, overlap in rows:
        found = split(name)
        head, tail = (name, "") if found is None else (found[0], found[2])
        key = (head, tail, before, after)
        groups.setdefault(key, []).extend([] if found is None else [found[1]])
        shares[key] = (*shares.get(key, ()), *overlap)
    return [
        (f"{key[0]}{spans(numbers)}{key[1]}", key[2], key[3], shares[key])
        for key, numbers in groups.items()
    ]


def _alike(layers: Mapping[str, Pair]) -> list[tuple[str, Pair]]:
    """Returns layers whose figures are equal on both sides as one, with all their numbers."""
    groups: dict[tuple[str, str, Pair], list[int]] = {}
    for name, pair in layers.items():
        found = split(name)
        key = (name, "", pair) if found is None else (found[0], found[2], pair)
        groups.setdefault(key, []).extend([] if found is None else [found[1]])
    return [(f"{a}{spans(n)}{b}", pair) for (a, b, pair), n in groups.items()]
