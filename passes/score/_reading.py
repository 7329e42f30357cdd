"""What several scores need: the maps that read an axis, and their sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from surgeon.plugin import Consumer, Context, consumers


def readers(context: Context, name: str) -> tuple[Consumer, ...]:
    """Returns the maps that are summed over an axis; refuses a branch, and an axis without any."""
    axis = context.axes.by_name.get(name)
    if axis is None:
        raise context.unable(name, "a branch is not read by one map: score it otherwise")
    found = consumers(context.axes, axis)
    if not found:
        raise context.unable(name, "no map is summed over it")
    return found


def matrix(context: Context, param: str, dim: int) -> Any:
    """Returns a map's weight as float64 [out, d], whichever way round it is stored."""
    weight = context.weights(param).double()
    return weight if dim == 1 else weight.T


def grouped(consumer: Consumer, costs: Any) -> Any:
    """Returns numbers [d], one for each column, added up by index: [*outer or 1, size]."""
    return np.asarray(costs)[consumer.groups].sum(-1)


def added(
    context: Context, name: str, found: tuple[Consumer, ...], cost: Callable[..., Any]
) -> Any:
    """Returns the costs of some maps added up, float64 [*outer sizes, size]."""
    axis = context.axes.by_name[name]
    size = tuple(context.axes.by_name[outer].size for outer in axis.outer)
    total = sum(cost(context, consumer) for consumer in found)
    return np.broadcast_to(total, (*size, axis.size)).astype(np.float64)
