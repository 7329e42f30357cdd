"""Tensors made from nothing but sizes."""

from __future__ import annotations

from surgeon.ops.rule import Atoms, Context, Flow, Gauge, rule


def _nothing(f: Flow) -> Atoms:
    return frozenset()


@rule(
    *("aten.arange.default", "aten.arange.start", "aten.arange.start_step"),
    *("aten.ones.default", "aten.zeros.default", "aten.full.default", "aten.new_ones.default"),
    *("aten.new_zeros.default", "aten.scalar_tensor.default", "aten.eye.default"),
    *("aten.empty.memory_format", "aten.new_full.default"),
    vanish=_nothing,
)
def create(c: Context) -> None:
    """A literal size can't follow an axis, so it must stay."""
    for dim, size in zip(c.out(), c.op.types[0].shape, strict=True):
        if isinstance(size, int) and size != 1:
            c.pin(dim, "a tensor is made here with this size as a literal")


@rule(
    *("aten.zeros_like.default", "aten.ones_like.default", "aten.full_like.default"),
    vanish=_nothing,
)
def alike(c: Context) -> None:
    """Has the sizes of another tensor, whatever they come to."""
    for a, b in zip(c.dims(c.op.arg(0)), c.out(), strict=True):
        c.equate(a, b)
        c.use(b, "map", Gauge.PERMUTATION)
