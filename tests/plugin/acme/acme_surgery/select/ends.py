"""Cuts one role in the middle of the model and leaves its first and last axes whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.plugin import (
    Axis,
    Budget,
    Code,
    Context,
    Plan,
    SelectPass,
    SurgeonError,
    counts,
    cut,
)


@dataclass(frozen=True)
class Ends(SelectPass):
    """The same share of every axis but those at the ends."""

    role: str = "ffn"
    """Whose axes are cut."""

    first: int = 1
    """Axes that stay whole at the beginning of the model."""

    last: int = 0
    """Axes that stay whole at its end."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if self.first < 0 or self.last < 0:
            raise ValueError("first and last count axes, and can't be below 0")

    def select(self, context: Context, scores: Any, budget: Budget) -> Plan:
        """Returns the plan whose parameters come nearest to the ratio."""
        found = [a for a in context.axes.of_role(self.role) if a.name in budget.axes]
        middle = found[self.first : len(found) - self.last]
        if budget.ratio is None or not middle:
            raise SurgeonError(
                Code.BAD_OPTION,
                "there is nothing to cut",
                at="select/ends",
                why=f"{len(found)} axes of role {self.role} may go, the ends are "
                f"{self.first} and {self.last} of them, and the ratio is {budget.ratio}",
                try_="a ratio, another role, or fewer at the ends",
            )
        largest = max(axis.size for axis in middle)
        plans = [self._plan(middle, gone / largest, budget) for gone in range(largest)]
        total, _ = counts(context.axes, Plan(), budget.counted)

        def removed(plan: dict[str, int]) -> int:
            cuts = (cut(context.axes.get(n), range(kept)) for n, kept in plan.items())
            return total - counts(context.axes, Plan(tuple(cuts)), budget.counted)[1]

        goal = budget.ratio * total
        best = min(plans, key=lambda plan: abs(removed(plan) - goal))
        wanted = scores(best)
        order = {
            n: np.argsort(-wanted[n], axis=-1, kind="stable")[..., :k] for n, k in best.items()
        }
        return Plan(tuple(self._cut(context.axes.get(n), kept) for n, kept in order.items()))

    def _plan(self, axes: list[Axis], share: float, budget: Budget) -> dict[str, int]:
        """Kept counts by axis, in multiples that the target wants."""
        out: dict[str, int] = {}
        for axis in axes:
            multiple = budget.multiple_of.get(axis.name, 1)
            kept = max(1, round(axis.size * (1 - share) / multiple)) * multiple
            if kept < axis.size:
                out[axis.name] = kept
        return out

    def _cut(self, axis: Axis, kept: Any) -> Any:
        return cut(axis, kept, axis.outer if kept.ndim > 1 else ())
