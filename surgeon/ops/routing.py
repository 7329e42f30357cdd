"""Routing: top-k over an axis, and what its numbers pick or mark."""

from __future__ import annotations

from dataclasses import replace

from surgeon.axes.space import Expr
from surgeon.ir.program import Arg, Op, Ref
from surgeon.ops.index import INDEXED
from surgeon.ops.rule import Atoms, Context, Flow, Gauge, Rebuild, axis_of, rule

TOPK = "aten.topk.default"
_SAME = ("aten.to.dtype", "aten.clone.default", "aten.contiguous.default")
"""What leaves the numbers that a top-k gives what they are."""


def _nowhere(_: Flow) -> Atoms:
    return frozenset()


def _topk_vanish(f: Flow) -> Atoms:
    x = f.op.arg(0)
    over = f.at(x, axis_of(f.op.arg(2, -1), f.rank(x)))
    f.inexact(over, "top-k chooses among all of it, masked channels too")
    return frozenset()


@rule(TOPK, vanish=_topk_vanish)
def topk(c: Context) -> None:
    """Chooses so many of an axis: no fewer may be left. How many it gives is a literal."""
    x, count = c.dims(c.op.arg(0)), c.op.arg(1)
    dim = axis_of(c.op.arg(2, -1), len(x))
    for k in range(2):
        for i, (a, b) in enumerate(zip(x, c.out(k), strict=True)):
            if i != dim:
                c.equate(a, b)
                c.use(b, "batch", Gauge.ANY)
        c.pin(c.out(k)[dim], "it counts what top-k chooses")
    c.use(x[dim], "route", Gauge.PERMUTATION)
    if isinstance(count, int):
        c.least(x[dim], count)
    else:
        c.pin(x[dim], "how many top-k chooses of it is known only at run time")


def chosen(c: Context, index: Arg) -> Expr | None:
    """Returns the axis that a top-k counted these numbers in; None where no top-k made them."""
    while isinstance(index, Ref) and index.name in c.program.producer:
        op = c.program.ops[c.program.producer[index.name]]
        if op.target == TOPK and index.name == op.outputs[1]:
            x = c.dims(op.arg(0))
            return x[axis_of(op.arg(2, -1), len(x))]
        if op.target not in _SAME:
            return None
        index = op.arg(0)
    return None


def _into(c: Context, index: Arg, picked: Expr) -> None:
    """Couples the axis that numbers count with the one that they are used on."""
    found = chosen(c, index)
    c.use(picked, "index", Gauge.PERMUTATION)
    if found is None:
        c.pin(picked, INDEXED)
    else:
        c.equate(picked, found)


def _counted(r: Rebuild) -> Op:
    return replace(r.op, args=(*r.op.args[:2], r.shape()[1]))


@rule("surgeon.dispatch", vanish=_nowhere, rebuild=_counted)
def dispatch(c: Context) -> None:
    """Spreads the weights of chosen experts over all of them."""
    index, out = c.op.arg(0), c.out()
    for dims in (c.dims(index), c.dims(c.op.arg(1))):
        c.equate(dims[0], out[0])
    _into(c, index, out[1])
    c.tag(out[1], "experts")


def _others(c: Context, dim: int, given: tuple[Expr, ...], shapes: tuple[Arg, Arg]) -> None:
    """Couples dimensions that numbers and values share, where both are as long."""
    left, right = c.shape(shapes[0]), c.shape(shapes[1])
    for i, expr in enumerate(c.dims(shapes[1])):
        if i != dim and left[i] == right[i]:
            c.equate(given[i], expr)
        elif i != dim:
            c.pin(given[i], "only some of it is picked from")


@rule("aten.gather.default", vanish=_nowhere)
def gather(c: Context) -> None:
    """Picks values by numbers along one dimension."""
    x, index, out = c.dims(c.op.arg(0)), c.op.arg(2), c.out()
    dim = axis_of(c.op.arg(1), len(x))
    _others(c, dim, x, (c.op.arg(0), index))
    _into(c, index, x[dim])
    for a, b in zip(c.dims(index), out, strict=True):
        c.equate(a, b)


@rule("aten.scatter.value", "aten.scatter.src", vanish=_nowhere)
def scatter(c: Context) -> None:
    """Replaces values at numbers along one dimension."""
    x, index, out = c.dims(c.op.arg(0)), c.op.arg(2), c.out()
    dim = axis_of(c.op.arg(1), len(x))
    for a, b in zip(x, out, strict=True):
        c.equate(a, b)
    _others(c, dim, x, (c.op.arg(0), index))
    _into(c, index, x[dim])
    if isinstance(c.op.arg(3), Ref):
        for i, (a, b) in enumerate(zip(c.dims(c.op.arg(3)), c.dims(index), strict=True)):
            if c.shape(c.op.arg(3))[i] == c.shape(index)[i]:
                c.equate(a, b)
