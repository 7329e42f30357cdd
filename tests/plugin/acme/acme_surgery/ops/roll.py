"""Turning dimensions round: `torch.roll`, as token shifts do."""

from __future__ import annotations

from surgeon.plugin import Arg, Atoms, Flow, Gauge, RuleContext, axis_of, rule, vanishing, wherever

WHY = "its channels change places with one another"


def _turned(dims: Arg, rank: int) -> set[int]:
    """Returns the dimensions that turn: every one where none is named, for then all are one."""
    if not isinstance(dims, tuple) or not dims:
        return set(range(rank))
    return {axis_of(dim, rank) for dim in dims}


def _vanish(f: Flow) -> Atoms:
    """A channel that was zero is zero afterwards, in the dimensions that don't turn."""
    x = f.op.arg(0)
    turned = _turned(f.op.arg(2), f.rank(x))
    places = range(f.rank(x))
    return wherever(f, [Atoms() if d in turned else vanishing(f, x, d) for d in places])


@rule("aten.roll.default", vanish=_vanish)
def roll(c: RuleContext) -> None:
    """Keeps every dimension; one that turns must stay whole."""
    x, out = c.dims(c.op.arg(0)), c.out()
    turned = _turned(c.op.arg(2), len(x))
    for dim, (before, after) in enumerate(zip(x, out, strict=True)):
        if dim in turned:
            c.pin(before, WHY)
            c.pin(after, WHY)
        else:
            c.equate(before, after)
            c.use(after, "map", Gauge.ANY)
