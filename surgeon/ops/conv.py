"""Convolutions, their normalisation, and pooling: channels are axes, places of an image stay."""

from __future__ import annotations

from dataclasses import replace

from surgeon.ir.program import Arg, Op, ParamRef, Ref
from surgeon.ops.linear import contracted
from surgeon.ops.rule import Atoms, Context, Flow, Gauge, Rebuild, rule, vanishing, wherever

PLACES = "it is made of places of an image or a sequence"
_CONVOLUTIONS = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
_PADDED = ("aten.conv1d.padding", "aten.conv2d.padding", "aten.conv3d.padding")


def _groups_at(op: Op) -> int:
    """Returns the place of the number of groups among the arguments."""
    return 8 if op.target == "aten.convolution.default" else 6


def _is_tensor(arg: Arg) -> bool:
    return isinstance(arg, Ref | ParamRef)


def _conv_vanish(f: Flow) -> Atoms:
    """A channel is zero where its kernels and its bias are."""
    x, w, bias = f.op.arg(0), f.op.arg(1), f.op.arg(2)
    contracted(f, f.at(w, 1), x, w)
    rows = vanishing(f, w, 0)
    if _is_tensor(bias):
        rows &= vanishing(f, bias, 0)
    return wherever(f, [Atoms(), rows, *(Atoms() for _ in range(f.rank(x) - 2))])


def _rebuild_conv(r: Rebuild) -> Op:
    at = _groups_at(r.op)
    groups, now = r.op.arg(at, 1), r.label("groups")
    if groups == now:
        return r.op
    return replace(r.op, args=(*r.op.args[:at], now, *r.op.args[at + 1 :]))


@rule(
    *(*_CONVOLUTIONS, *_PADDED, "aten.convolution.default"),
    vanish=_conv_vanish,
    rebuild=_rebuild_conv,
)
def convolution(c: Context) -> None:
    """Couples the input's channels with the kernels' second dimension, kernels with the result.

    With groups, channels are groups × channels of a group on both sides; of a depthwise
    convolution each channel is a group.
    """
    x, w, out = c.dims(c.op.arg(0)), c.dims(c.op.arg(1)), c.out()
    transposed = c.op.target == "aten.convolution.default" and c.op.arg(6) is True
    if len(x) != len(w) or transposed:
        for dim in (*x, *w, *out):
            c.pin(dim, "such a convolution has no axis rule")
        c.fresh(1, "groups")
        return
    count = c.op.arg(_groups_at(c.op), 1)
    rows = c.shape(c.op.arg(1))[0]
    assert isinstance(count, int) and isinstance(rows, int)
    groups, made = c.fresh(count, "groups"), c.fresh(rows // count, "made")
    c.equate(x[1], (*groups, *w[1]))
    c.equate(w[0], (*groups, *made))
    c.equate(out[1], w[0])
    c.equate(out[0], x[0])
    if _is_tensor(c.op.arg(2)):
        c.equate(c.dims(c.op.arg(2))[0], w[0])
    c.use(w[1], "contract", Gauge.ANY)
    c.use(made, "produce", Gauge.ANY)
    c.use(groups, "batch", Gauge.PERMUTATION)
    for dim in (x[1], out[1]):
        c.tag(dim, "channels")
    for dim in w[2:]:
        c.pin(dim, "it is the extent of a kernel")
        c.tag(dim, "kernel")
    for dim in (*x[2:], *out[2:]):
        c.pin(dim, PLACES)
        c.tag(dim, "places")


def _batch_norm_vanish(f: Flow) -> Atoms:
    """A channel is zero where its scale and its shift are, whatever mean was taken off."""
    weight, bias, mean = (f.op.arg(i) for i in (1, 2, 3))
    if _is_tensor(weight):
        kept = vanishing(f, weight, 0)
    else:
        kept = vanishing(f, f.op.arg(0), 1) & vanishing(f, mean, 0)
    if _is_tensor(bias):
        kept &= vanishing(f, bias, 0)
    rest = (Atoms() for _ in range(f.rank(f.op.arg(0)) - 2))
    return wherever(f, [Atoms(), kept, *rest])


@rule(
    *("aten.batch_norm.default", "aten._native_batch_norm_legit_no_training.default"),
    *("aten._batch_norm_no_update.default", "aten.cudnn_batch_norm.default"),
    vanish=_batch_norm_vanish,
)
def batch_norm(c: Context) -> None:
    """Scales and shifts each channel by stored statistics; channels don't see one another."""
    x, out = c.dims(c.op.arg(0)), c.out()
    for a, b in zip(x, out, strict=True):
        c.equate(a, b)
    for arg in c.op.args[1:5]:
        if _is_tensor(arg):
            c.equate(c.dims(arg)[0], out[1])
    if c.op.arg(5) is True and "no_training" not in c.op.target:
        c.pin(out[1], "a batch norm in training reads the batch")
    c.use(out[1], "map", Gauge.PERMUTATION)


def _pool_vanish(f: Flow) -> Atoms:
    x = f.op.arg(0)
    spread = _spread(f.op)
    dims = range(-f.rank(x), 0)
    return wherever(f, [vanishing(f, x, d) if d < -spread else Atoms() for d in dims])


def _spread(op: Op) -> int:
    """Returns over how many dimensions an operation pools."""
    return next(n for n in (1, 2, 3) if f"pool{n}d" in op.target)


@rule(
    *(f"aten.{kind}_pool{n}d.default" for kind in ("max", "avg") for n in (1, 2, 3)),
    *(f"aten.adaptive_avg_pool{n}d.default" for n in (1, 2, 3)),
    vanish=_pool_vanish,
)
def pool(c: Context) -> None:
    """Draws neighbouring places together, channel by channel."""
    x, out = c.dims(c.op.arg(0)), c.out()
    first = len(x) - _spread(c.op)
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        if i < first:
            c.equate(a, b)
            c.use(b, "map", Gauge.PERMUTATION)
        else:
            c.pin(a, PLACES)
            c.pin(b, PLACES)
