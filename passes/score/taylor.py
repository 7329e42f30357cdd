"""Scores channels and branches by their weights times the loss's gradients.

To first order the loss changes by g·w when a weight w goes; to second order by g·w - ½ F w², where
the diagonal Fisher matrix F, the mean square of the gradients over calibration windows, stands for
the Hessian. An index's score is taken over all weights that go with it, in every tensor that
carries the axis: the sum of the absolute changes, or the absolute sum.

Reference: Molchanov et al., Importance Estimation for Neural Network Pruning, 2019 (first and
second order); Ma et al., LLM-Pruner, 2023, eq. 3 to 5 (their vector-wise importance is the absolute
sum, the element-wise one the sum of absolute values).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from surgeon.plugin import Axis, Context, ScorePass, occurrences


@dataclass(frozen=True)
class Taylor(ScorePass):
    """The change of the loss that gradients predict when all weights of a channel go."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "gradients: weights"})

    order: Literal[1, 2] = 1
    """1 takes gradient times weight; 2 takes off half the diagonal Fisher times weight squared."""

    by: Literal["element", "channel"] = "element"
    """The sum of absolute changes of single weights, or the absolute change of a channel."""

    def score(self, context: Context) -> dict[str, Any]:
        """Returns the changes of the loss, float64, in nats a token."""
        axes = context.axes
        wanted = [axes.by_name[name] for name in context.targets if name in axes.by_name]
        branches = [branch for branch in axes.branches if branch.name in context.targets]
        trained = {p.name for p in axes.program.params if p.kind == "parameter"}
        carried = [m.param for axis in wanted for m in axis.members if m.param in trained]
        owned = [param for branch in branches for param in branch.params if param in trained]
        out: dict[str, Any] = {axis.name: np.zeros(_shape(context, axis)) for axis in wanted}
        out |= {branch.name: np.zeros(()) for branch in branches}
        params = tuple(dict.fromkeys([*carried, *owned]))
        gradients = context.gradients(params)
        for param in params:
            changes = self._changes(context.weights(param).double(), gradients[param])
            for axis in wanted:
                if any(m.param == param for m in axis.members):
                    for view in occurrences(axes, axis, param, changes):
                        out[axis.name] = out[axis.name] + view.sum(-1).numpy()
            for branch in branches:
                if param in branch.params:
                    out[branch.name] = out[branch.name] + float(changes.sum())
        return {name: np.abs(found) for name, found in out.items()}

    def _changes(self, weight: Any, found: Any) -> Any:
        """Returns by how much the loss changes without each weight, of the parameter's shape."""
        change = found.mean.double() * weight
        if self.order == 2:
            change = change - found.square.double() * weight.square() / 2
        return change.abs() if self.by == "element" else change


def _shape(context: Context, axis: Axis) -> tuple[int, ...]:
    return (*(context.axes.by_name[name].size for name in axis.outer), axis.size)
