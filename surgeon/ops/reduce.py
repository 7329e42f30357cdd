"""Reductions and normalisations over a dimension."""

from __future__ import annotations

from dataclasses import replace

from surgeon.ir.program import Arg, Op, ParamRef, Ref
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

AVERAGED = "it is averaged over, and masked channels don't vanish there"
"""Why no share of kept channels makes an average over an axis what it was."""


def _dims(given: Arg, rank: int) -> list[int]:
    if given is None or given == ():
        return list(range(rank))
    items = given if isinstance(given, tuple) else (given,)
    return [axis_of(d, rank) for d in items]


def _over(f: Flow, given: Arg) -> Atoms:
    x = f.op.arg(0)
    return frozenset().union(*(f.at(x, d) for d in _dims(given, f.rank(x))))


def _keep_rest(c: Context, reduced: list[int], keepdim: bool) -> None:
    x, out = c.dims(c.op.arg(0)), list(c.out())
    kept = [i for i in range(len(x)) if i not in reduced]
    places = kept if keepdim else list(range(len(kept)))
    for i, j in zip(kept, places, strict=True):
        c.equate(x[i], out[j])
        c.use(x[i], "batch", Gauge.ANY)


def _mean_vanish(f: Flow) -> Atoms:
    x = f.op.arg(0)
    over = _over(f, f.op.arg(1))
    f.inexact(over - f.zero(x), AVERAGED)
    f.normalised(over & f.zero(x))
    return f.zero(x) - over


@rule("aten.mean.dim", vanish=_mean_vanish)
def mean(c: Context) -> None:
    """Averages: removing a channel changes the count, which the plan records."""
    reduced = _dims(c.op.arg(1), len(c.dims(c.op.arg(0))))
    for d in reduced:
        c.use(c.dims(c.op.arg(0))[d], "normalise", Gauge.ANY)
    _keep_rest(c, reduced, c.op.arg(2, False) is True)


def _sum_vanish(f: Flow) -> Atoms:
    x = f.op.arg(0)
    over = _over(f, f.op.arg(1))
    f.inexact(over - f.zero(x), "it is summed over, and masked channels don't vanish there")
    return f.zero(x) - over


@rule("aten.sum.dim_IntList", vanish=_sum_vanish)
def sum_(c: Context) -> None:
    """Sums over dimensions."""
    reduced = _dims(c.op.arg(1), len(c.dims(c.op.arg(0))))
    for d in reduced:
        c.use(c.dims(c.op.arg(0))[d], "contract", Gauge.PERMUTATION)
    _keep_rest(c, reduced, c.op.arg(2, False) is True)


def _softmax_vanish(f: Flow) -> Atoms:
    over = _over(f, f.op.arg(1))
    f.inexact(over, "softmax gives a masked channel a share, and removal takes it back")
    return frozenset()


@rule(
    *("aten.softmax.int", "aten._softmax.default", "aten.log_softmax.int"), vanish=_softmax_vanish
)
def softmax(c: Context) -> None:
    """Normalises over a dimension."""
    x, out = c.dims(c.op.arg(0)), c.out()
    dim = axis_of(c.op.arg(1), len(x))
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        c.equate(a, b)
        c.use(b, "normalise" if i == dim else "batch", Gauge.PERMUTATION if i == dim else Gauge.ANY)


def _cumulative_vanish(f: Flow) -> Atoms:
    over = _over(f, f.op.arg(1))
    f.inexact(over, "a running sum depends on every channel before")
    return f.zero(f.op.arg(0)) - over


@rule("aten.cumsum.default", vanish=_cumulative_vanish)
def cumsum(c: Context) -> None:
    """Keeps the shape; the order of the summed dimension matters."""
    x, out = c.dims(c.op.arg(0)), c.out()
    dim = axis_of(c.op.arg(1), len(x))
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        c.equate(a, b)
        c.use(b, *(("scan", Gauge.FIXED) if i == dim else ("map", Gauge.ANY)))
    c.pin(x[dim], "a running sum needs every channel in its place")


@rule("aten.diff.default", vanish=lambda f: frozenset())
def diff(c: Context) -> None:
    """Differences of neighbours: the dimension must stay."""
    x, out = c.dims(c.op.arg(0)), c.out()
    dim = axis_of(c.op.arg(2, -1), len(x))
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        if i != dim:
            c.equate(a, b)
    c.use(x[dim], "scan", Gauge.FIXED)
    c.pin(x[dim], "differences of neighbours need every channel in its place")
    c.pin(out[dim], "differences of neighbours need every channel in its place")


def _tail(op: Op) -> int:
    shape = op.arg(1)
    assert isinstance(shape, tuple)
    return len(shape)


def _affine_vanish(f: Flow) -> Atoms:
    """A place vanishes that was zero throughout; a channel that its scale and shift make zero."""
    x, weight = f.op.arg(0), f.op.arg(2)
    bias = f.op.arg(3) if "layer_norm" in f.op.target else None
    shifted = isinstance(bias, Ref | ParamRef)
    found: list[Atoms] = []
    for d in range(-f.rank(x), 0):
        if d < -_tail(f.op):
            found.append(Atoms() if shifted else vanishing(f, x, d))
        else:
            scaled = vanishing(f, weight, d)
            found.append(scaled & vanishing(f, bias, d) if shifted else scaled)
    return wherever(f, found)


def _layer_norm_vanish(f: Flow) -> Atoms:
    rank = _tail(f.op)
    over: Atoms = frozenset().union(*(f.at(f.op.arg(0), -1 - k) for k in range(rank)))
    f.inexact(over, "LayerNorm subtracts the mean over it, which masked channels take part in")
    return _affine_vanish(f)


def _rms_norm_vanish(f: Flow) -> Atoms:
    rank = _tail(f.op)
    over: Atoms = frozenset().union(*(f.at(f.op.arg(0), -1 - k) for k in range(rank)))
    f.inexact(over, "this fused RMSNorm divides by the width, which removal changes")
    return _affine_vanish(f)


def _rebuild_norm(r: Rebuild) -> Op:
    rank = _tail(r.op)
    new = r.operand(r.op.arg(0))[-rank:]
    return replace(r.op, args=(r.op.args[0], tuple(new), *r.op.args[2:]))  # type: ignore[arg-type]


def _norm(c: Context, gauge: Gauge, affine: tuple[Arg, ...]) -> None:
    x, out = c.dims(c.op.arg(0)), c.out()
    rank = _tail(c.op)
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        c.equate(a, b)
        last = i >= len(x) - rank
        c.use(b, "normalise" if last else "batch", gauge if last else Gauge.ANY)
    for arg in affine:
        if isinstance(arg, Ref | ParamRef):
            for a, b in zip(c.dims(arg), out[-rank:], strict=True):
                c.equate(a, b)


@rule("aten.layer_norm.default", vanish=_layer_norm_vanish, rebuild=_rebuild_norm)
def layer_norm(c: Context) -> None:
    """Normalises to zero mean and unit variance, then scales and shifts each channel."""
    _norm(c, Gauge.PERMUTATION, (c.op.arg(2), c.op.arg(3)))


@rule("aten.rms_norm.default", vanish=_rms_norm_vanish, rebuild=_rebuild_norm)
def rms_norm(c: Context) -> None:
    """Normalises to unit mean square, then scales each channel."""
    _norm(c, Gauge.SIGNED, (c.op.arg(2),))
