"""Softmax and top-k, in a masked reference, over what is kept only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Selection
from surgeon.axes.space import leaves
from surgeon.ir.program import Op, ParamRef, Ref

Choice = Callable[..., Any]

_DIM = {"aten.softmax.int": 1, "aten._softmax.default": 1, "aten.topk.default": 2}
"""Operations in which the indices of a dimension compete, and which argument says the dimension."""


def _among(op: Op, kept: torch.Tensor) -> Choice:
    """Returns the operation on a value whose removed indices are -∞."""
    family, name, overload = op.target.split(".")
    call = getattr(getattr(getattr(torch.ops, family), name), overload)

    def choose(x: torch.Tensor, *args: object, **kwargs: object) -> object:
        return call(x.masked_fill(~kept.to(x.device), float("-inf")), *args, **kwargs)

    return choose


def kept_choices(
    axes: Axes, selection: Selection, program_ops: Mapping[str, int]
) -> dict[int, Choice]:
    """Returns for a masked reference the softmaxes and top-ks that must see kept indices only.

    A masked expert's logit is 0, which takes part in a softmax and may be chosen; what is removed
    does neither.

    Args:
        axes: the axes of the whole model.
        selection: what is removed.
        program_ops: the index, in the reference program, of the operation that makes each value.
    """
    out: dict[int, Choice] = {}
    for op in axes.program.ops:
        place, index = _DIM.get(op.target), program_ops.get(op.outputs[0])
        x = op.arg(0)
        if place is None or index is None or not isinstance(x, Ref | ParamRef):
            continue
        dims = axes.dims[("%" if isinstance(x, Ref) else "$") + x.name]
        given = op.arg(place, -1)
        dim = (given if isinstance(given, int) else -1) % len(dims)
        if not any(a in selection.cuts for a in leaves(dims[dim])):
            continue
        shape = axes.program.type_of(x).shape
        # Enclosing axes stand in fixed dimensions of their own, or in this one.
        fixed = [d for d in range(len(dims)) if isinstance(shape[d], int)]
        sizes = [s for s in shape if isinstance(s, int)]
        kept = torch.zeros(prod(sizes), dtype=torch.bool)
        kept[torch.from_numpy(selection.indices(tuple(f for d in fixed for f in dims[d])))] = True
        kept = kept.reshape([s if isinstance(s, int) else 1 for s in shape])
        out[index] = _among(op, kept | ~kept.any(dim, keepdim=True))
    return out
