"""Scores a channel by the size of its weights, over every tensor that carries it.

Reference: Li et al., Pruning Filters for Efficient ConvNets, 2017 (the L1 norm of a filter);
Fang et al., DepGraph, 2023 (the norm over all members of a coupled group).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from surgeon.plugin import Context, ScorePass, occurrences


@dataclass(frozen=True)
class Magnitude(ScorePass):
    """The L1 or L2 norm of all weights that go with a channel."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights"})

    p: Literal[1, 2] = 2
    """Which norm: 1 for the sum of absolute values, 2 for the root of the sum of squares."""

    normalise: Literal["none", "mean", "max", "size"] = "none"
    """Divide an axis's scores by their mean, their largest, or how many weights a channel has."""

    def score(self, context: Context) -> dict[str, Any]:
        """Returns the norms, float64, one parameter read at a time."""
        axes = context.axes
        wanted = [axes.by_name[n] for n in context.targets if n in axes.by_name]
        branches = {b.name: b for b in axes.branches if b.name in context.targets}
        carried: dict[str, list[Any]] = {}
        for axis in wanted:
            for param in dict.fromkeys(m.param for m in axis.members):
                if axes.program.param[param].kind in ("parameter", "buffer"):
                    carried.setdefault(param, []).append(axis)
        sums: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        totals = dict.fromkeys(branches, 0.0)
        owners: dict[str, list[str]] = {}
        for branch in branches.values():
            for param in branch.params:
                owners.setdefault(param, []).append(branch.name)
        for param in dict.fromkeys([*carried, *owners]):
            tensor = context.weights(param).detach().double().abs().pow(self.p)
            for name in owners.get(param, ()):
                totals[name] += float(tensor.sum())
            for axis in carried.get(param, ()):
                for view in occurrences(axes, axis, param, tensor):
                    part = np.broadcast_to(view.sum(-1).numpy(), self._shape(context, axis))
                    sums[axis.name] = sums.get(axis.name, 0.0) + part
                    sizes[axis.name] = sizes.get(axis.name, 0) + view.shape[-1]
        out = {name: np.asarray(total ** (1 / self.p)) for name, total in totals.items()}
        for axis in wanted:
            score = np.zeros(self._shape(context, axis)) + sums.get(axis.name, 0.0)
            out[axis.name] = self._scaled(score ** (1 / self.p), sizes.get(axis.name, 1))
        return out

    def _shape(self, context: Context, axis: Any) -> tuple[int, ...]:
        return (*(context.axes.by_name[name].size for name in axis.outer), axis.size)

    def _scaled(self, score: Any, size: int) -> Any:
        match self.normalise:
            case "mean":
                return score / (score.mean() or 1.0)
            case "max":
                return score / (score.max() or 1.0)
            case "size":
                return score / size ** (1 / self.p)
            case _:
                return score
