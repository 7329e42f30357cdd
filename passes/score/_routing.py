"""What scores of experts need: numbers by expert, laid out as an axis's indices."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from surgeon.plugin import Context


def by_expert(context: Context, name: str, cost: Callable[[Any], Any]) -> Any:
    """Returns an axis's numbers `[*outer sizes, size]`, made of those of the experts it holds.

    An index of an axis of groups has the sum over its experts.

    Args:
        context: of the score.
        name: the axis.
        cost: from a mixture's `Routing` to one number for each expert.

    Raises:
        SurgeonError: for a branch, and for an axis that no token is sent along.
    """
    axes = context.axes
    axis = axes.by_name.get(name)
    number = axes.number.get(name)
    for value, found in context.routing().items():
        factors = [f for f in axes.dims["%" + value][-1] if isinstance(f, int)]
        if axis is None or number not in factors:
            continue
        sizes = [axes.numbered[f].size for f in factors]
        costs = np.asarray(cost(found), dtype=np.float64)
        assert prod(sizes) == costs.size, "every factor of the experts is an axis"
        wanted = [*(axes.number[o] for o in axis.outer if axes.number[o] in factors), number]
        rest = tuple(i for i, f in enumerate(factors) if f not in wanted)
        return costs.reshape(sizes).sum(axis=rest)
    raise context.unable(name, "no router sends tokens to its indices: it isn't one of experts")
