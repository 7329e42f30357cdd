"""Which maps are summed over an axis, and over which of their columns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.channels import along
from surgeon.axes.contractions import contractions


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
