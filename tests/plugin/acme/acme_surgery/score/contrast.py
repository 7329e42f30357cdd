"""Scores channels by how much the weights that read them differ.

A channel that every reader weighs alike says the same to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from surgeon.plugin import Context, ScorePass, consumers


@dataclass(frozen=True)
class Contrast(ScorePass):
    """The spread of the weights that are summed over a channel."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    measure: Literal["std", "range"] = "std"
    """Standard deviation, or largest less smallest."""

    def score(self, context: Context) -> Mapping[str, Any]:
        """Returns float64 numbers; a branch, which no map reads as a whole, can't be scored."""
        axes = context.axes
        out: dict[str, Any] = {}
        for name in context.targets:
            axis = axes.by_name.get(name)
            if axis is None:
                raise context.unable(name, "a branch has no channels")
            outer = tuple(axes.by_name[o].size for o in axis.outer)
            total = np.zeros((*outer, axis.size))
            for reader in consumers(axes, axis):
                weight = context.weights(reader.param).double().numpy()
                weight = weight if reader.dim == 1 else weight.T
                columns = weight[:, reader.groups]  # [out, *outer, size, columns of an index]
                flat = np.moveaxis(columns, -1, 0).reshape(-1, *columns.shape[1:-1])
                total = total + (flat.std(0) if self.measure == "std" else np.ptp(flat, axis=0))
            out[name] = total
        return out
