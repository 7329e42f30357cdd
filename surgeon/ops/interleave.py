"""Channels taken in turns: strided slices, stacked pieces, repetitions, complex numbers."""

from __future__ import annotations

from dataclasses import replace

from surgeon.axes.space import Expr, Extent
from surgeon.ir.program import Arg, Op, ParamRef, Ref, Size
from surgeon.ops.rule import (
    Atoms,
    Context,
    Flow,
    Gauge,
    Rebuild,
    axis_of,
    rule,
    vanishing,
    wherever,
)
from surgeon.ops.shape import keeps

TURNS = "each of its channels is picked by number"


def in_turns(c: Context, dim: int, count: int) -> Expr:
    """Returns the axis of the turns of a dimension that is read by every `count`-th channel.

    The dimension is turns × `count`; which of the `count` is meant is written into the operation,
    so those must stay. Two at a time are the pairs of a rotary embedding, where it is one.
    """
    x, size = c.dims(c.op.arg(0)), c.shape(c.op.arg(0))[dim]
    assert isinstance(size, int) and size % count == 0
    turns, among = c.fresh(size // count, "turns"), c.fresh(count, "among")
    c.equate(x[dim], (*turns, *among))
    paired(c, turns, among)
    return turns


def paired(c: Context, turns: Expr, among: Expr) -> None:
    """Records that `among` are the members of each of `turns`."""
    c.pin(among, TURNS)
    c.tag(turns, "paired")
    c.tag(among, "pair")


def _pieces(op: Op) -> tuple[Ref | ParamRef, ...]:
    given = op.arg(0)
    assert isinstance(given, tuple)
    return tuple(arg for arg in given if isinstance(arg, Ref | ParamRef))


def _stack_vanish(f: Flow) -> Atoms:
    """A stack vanishes on an axis where every piece does."""
    pieces = _pieces(f.op)
    return frozenset.intersection(*(f.zero(p) for p in pieces)) if pieces else Atoms()


@rule("aten.stack.default", vanish=_stack_vanish)
def stack(c: Context) -> None:
    """Lays pieces of the same shape side by side along a dimension of their own."""
    out = list(c.out())
    new = out.pop(axis_of(c.op.arg(1, 0), len(out)))
    c.pin(new, TURNS)
    for piece in _pieces(c.op):
        for a, b in zip(c.dims(piece), out, strict=True):
            c.equate(a, b)
            c.use(b, "map", Gauge.ANY)


def _rebuild_times(r: Rebuild) -> Op:
    if r.shape() == r.op.types[0].shape:
        return r.op
    times, size = r.label("times"), r.op.arg(1)
    kwargs = tuple((k, v) for k, v in r.op.kwargs if k != "output_size")
    return r.op if times == size else replace(r.op, args=_second(r.op, times), kwargs=kwargs)


def _second(op: Op, value: Arg) -> tuple[Arg, ...]:
    return (op.args[0], value, *op.args[2:])


@rule("aten.repeat_interleave.self_int", vanish=keeps, rebuild=_rebuild_times)
def repeat_interleave(c: Context) -> None:
    """Repeats each channel in place: the repetition is an axis inside the repeated one."""
    x, out = c.dims(c.op.arg(0)), c.out()
    times, given = c.op.arg(1), c.op.arg(2)
    if not isinstance(times, int) or given is None:
        for dim in (*x, *out):
            c.pin(dim, "a repetition of every element, or as often as data say")
        return
    dim = axis_of(given, len(x))
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        if i != dim:
            c.equate(a, b)
    again = c.fresh(times, "times")
    c.tag(again, "repeated")
    c.use(again, "map", Gauge.PERMUTATION)
    c.equate(out[dim], (*x[dim], *again))


def _times(before: Size, after: Size) -> Extent | None:
    return Extent.of(after).over(Extent.of(before))


def _tiled_vanish(f: Flow) -> Atoms:
    """What is repeated does not vanish along the repetition."""
    rank = len(f.out())
    return wherever(f, [vanishing(f, f.op.arg(0), d) for d in range(-rank, 0)])


def _rebuild_tiles(r: Rebuild) -> Op:
    given, new, old = r.op.arg(1), r.shape(), r.op.types[0].shape
    if new == old:
        return r.op
    assert isinstance(given, tuple)
    out = tuple(
        r.label(f"tiles{i}") if isinstance(times, int) and times > 1 else times
        for i, times in enumerate(given)
    )
    return replace(r.op, args=_second(r.op, out))


@rule("aten.repeat.default", vanish=_tiled_vanish, rebuild=_rebuild_tiles)
def repeat(c: Context) -> None:
    """Lays whole dimensions end to end: the repetition is an axis around the repeated one."""
    x, out, shape = c.dims(c.op.arg(0)), c.out(), c.shape(c.op.arg(0))
    offset = len(out) - len(x)
    for i, dim in enumerate(out):
        before: Size = shape[i - offset] if i >= offset else 1
        after = c.op.types[0].shape[i]
        inner: Expr = x[i - offset] if i >= offset else ()
        times = _times(before, after)
        if times is None:
            c.pin((*inner, *dim), "a repetition as often as data say")
            continue
        if times.one:
            c.equate(inner, dim)
            continue
        again = c.fresh(times.number if not times.dynamic else str(times), f"tiles{i}")
        c.tag(again, "repeated")
        c.use(again, "map", Gauge.PERMUTATION)
        c.equate(dim, (*again, *inner))


# --- complex numbers -------------------------------------------------------------------------


@rule("aten.view_as_complex.default", vanish=keeps)
def view_as_complex(c: Context) -> None:
    """Reads the last dimension as real and imaginary parts."""
    x = c.dims(c.op.arg(0))
    for a, b in zip(x[:-1], c.out(), strict=True):
        c.equate(a, b)
        c.use(b, "map", Gauge.PERMUTATION)
    paired(c, x[-2], x[-1])


@rule("aten.view_as_real.default", vanish=keeps)
def view_as_real(c: Context) -> None:
    """Adds a last dimension of real and imaginary parts."""
    out = c.out()
    for a, b in zip(c.dims(c.op.arg(0)), out[:-1], strict=True):
        c.equate(a, b)
    c.pin(out[-1], TURNS)


@rule("aten.polar.default", vanish=lambda f: f.zero(f.op.arg(0)))
def polar(c: Context) -> None:
    """Makes a complex number of a length and an angle; it is zero where the length is."""
    for operand in c.op.args[:2]:
        for a, b in zip(c.dims(operand), c.out(), strict=True):
            c.equate(a, b)
            c.use(b, "map", Gauge.PERMUTATION)
