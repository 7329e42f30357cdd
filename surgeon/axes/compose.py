"""Two plans after one another as one plan: indices of the second, mapped through the first."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.plan import Cut, Plan, cut
from surgeon.errors import Code, SurgeonError

Indices = NDArray[np.int64]


def compose(axes: Axes, first: Plan, second: Plan) -> Plan:
    """Returns the plan that does what the first does, and then the second to what is left.

    Applying the first and then the second to a tensor gives what applying the result gives. The
    result keeps the first plan's source.

    Args:
        axes: of the model that the first plan is for.
        first: a plan of that model.
        second: a plan of the model after it, whose axes have the same names.

    Raises:
        SurgeonError: `plan-mismatch` where the second names an axis of another size than the first
            leaves, or one that the model has not.
    """
    one = first.by_axis
    two = second.by_axis
    cuts: list[Cut] = []
    for name in dict.fromkeys([*one, *two]):
        if name not in axes.by_name:
            raise _mismatch(name, "the first model has no such axis")
        axis = axes.by_name[name]
        left = one[name].count if name in one else axis.size
        if name in two and two[name].size != left:
            raise _mismatch(
                name, f"{left} indices are left of it, and the plan is for {two[name].size}"
            )
        cuts.append(_composed(axes, axis, one, two))
    return Plan(
        tuple(cuts),
        tuple(dict.fromkeys([*first.branches, *second.branches])),
        first.source,
        tuple(dict.fromkeys([*first.rewrites, *second.rewrites])),
        tuple(dict.fromkeys([*first.renumbered, *second.renumbered])),
        grouped=first.grouped,
    )


def _composed(axes: Axes, axis: Axis, one: Mapping[str, Cut], two: Mapping[str, Cut]) -> Cut:
    """Returns one axis's cut after both plans."""
    before, after = one.get(axis.name), two.get(axis.name)
    if after is None:
        assert before is not None
        return before
    named = {*after.outer, *(before.outer if before else ())}
    # Where one of these is cut by group, its groups say which of its indices a row belongs to.
    pending = list(after.outer)
    while pending:
        further = one[name].outer if (name := pending.pop()) in one else ()
        pending.extend(set(further) - named)
        named.update(further)
    if not named <= set(axis.outer):
        raise _mismatch(axis.name, "the first model has other axes around it")
    outer = tuple(name for name in axis.outer if name in named)
    sizes = [axes.by_name[name].size for name in outer]
    rows = np.zeros((*sizes, after.count), dtype=np.int64)
    for place in product(*map(range, sizes)):
        at = dict(zip(outer, place, strict=True))
        kept = np.arange(axis.size) if before is None else _row(before, at)
        rows[place] = kept[_second_row(after, at, one)]
    return cut(axis, rows, outer)


def _row(found: Cut, at: dict[str, int]) -> Indices:
    """Returns the kept indices of a cut within these indices of the axes around it."""
    return found.array[tuple(at[name] for name in found.outer)]


def _second_row(after: Cut, at: dict[str, int], one: Mapping[str, Cut]) -> Indices:
    """Returns what the second plan keeps within these indices of the first model."""
    places: list[int] = []
    for name in after.outer:
        place = at[name]
        if name in one:
            found = np.flatnonzero(_row(one[name], at) == place)
            if not len(found):
                # Everything within this index is gone; any rows will do that fit the shape.
                return np.arange(after.count)
            place = int(found[0])
        places.append(place)
    return after.array[tuple(places)]


def _mismatch(axis: str, why: str) -> SurgeonError:
    return SurgeonError(
        Code.PLAN_MISMATCH,
        "the plans don't follow on one another",
        at=axis,
        why=why,
        try_="a second plan that was made for what the first leaves",
    )
