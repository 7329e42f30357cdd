"""Which maps are summed over an axis, and over which of their columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.channels import along
from surgeon.ir.program import ParamRef, Program, Ref

_CONTRACT = {
    "aten.linear.default": (0, 1, 1),
    "aten.addmm.default": (1, 2, 0),
    "aten.matmul.default": (0, 1, 0),
    "aten.mm.default": (0, 1, 0),
}
"""Operations that sum over the last dimension of a value against a parameter: which operand is the
value, which the parameter, and which of its dimensions is summed over."""

_BIAS = {"aten.linear.default": 2, "aten.addmm.default": 0}
"""Of these, which operand is added to the product."""


@dataclass(frozen=True)
class Contraction:
    """A parameter that a value is multiplied with.

    Attributes:
        param: its name.
        dim: its dimension that is summed over.
        value: the value whose last dimension is summed over.
        out: what comes of it.
        bias: the parameter that is added to the product by the same operation, if one is.
    """

    param: str
    dim: int
    value: str
    out: str = ""
    bias: str | None = None


@dataclass(frozen=True)
class Consumer:
    """A map that is summed over an axis.

    Attributes:
        param: its weight.
        dim: the weight's dimension that is summed over.
        groups: [*outer sizes, size, g]: the columns that go with each index of the axis. Where the
            weight doesn't carry an enclosing axis, that dimension is 1.
        bias: the parameter that the map adds to its outputs, if it has one.
    """

    param: str
    dim: int
    groups: NDArray[np.int64]
    bias: str | None = None


def contractions(program: Program) -> tuple[Contraction, ...]:
    """Returns every product of a value with a parameter, in order."""
    found: list[Contraction] = []
    for op in program.ops:
        places = _CONTRACT.get(op.target)
        if places is None:
            continue
        value, param = op.arg(places[0]), op.arg(places[1])
        if isinstance(value, Ref) and isinstance(param, ParamRef):
            added = op.arg(_BIAS[op.target]) if op.target in _BIAS else None
            bias = added.name if isinstance(added, ParamRef) else None
            found.append(Contraction(param.name, places[2], value.name, op.outputs[0], bias))
    return tuple(found)


def consumers(axes: Axes, axis: Axis) -> tuple[Consumer, ...]:
    """Returns the maps that are summed over an axis, each once, in the program's order."""
    out: dict[str, Consumer] = {}
    carried = {(member.param, member.dim) for member in axis.members}
    for found in contractions(axes.program):
        if (found.param, found.dim) not in carried:
            continue
        expr = axes.param_dims(found.param)[found.dim]
        if found.param not in out:
            groups = together(along(axes, axis, expr))
            out[found.param] = Consumer(found.param, found.dim, groups, found.bias)
    return tuple(out.values())


def together(places: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Returns places [*outer sizes or 1, size, any] side by side, [*outer sizes, size, g]."""
    found = list(places)
    lead = np.broadcast_shapes(*(place.shape[:-1] for place in found))
    spread = [np.broadcast_to(place, (*lead, place.shape[-1])) for place in found]
    return np.concatenate(spread, axis=-1)
