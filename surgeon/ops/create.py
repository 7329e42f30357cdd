"""Tensors made from nothing but sizes."""

from __future__ import annotations

from surgeon.ops.rule import Atoms, Context, Flow, rule


def _nothing(f: Flow) -> Atoms:
    return frozenset()


@rule(
    *("aten.arange.default", "aten.arange.start", "aten.arange.start_step"),
    *("aten.ones.default", "aten.zeros.default", "aten.full.default", "aten.new_ones.default"),
    *("aten.new_zeros.default", "aten.ones_like.default", "aten.zeros_like.default"),
    *("aten.scalar_tensor.default", "aten.full_like.default", "aten.eye.default"),
    *("aten.empty.memory_format", "aten.new_full.default"),
    vanish=_nothing,
)
def create(c: Context) -> None:
    """A literal size can't follow an axis, so it must stay."""
    for dim, size in zip(c.out(), c.op.types[0].shape, strict=True):
        if isinstance(size, int) and size != 1:
            c.pin(dim, "a tensor is made here with this size as a literal")
