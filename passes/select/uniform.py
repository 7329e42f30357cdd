"""Removes the same share from every axis of a role, the lowest scores first.

The parameter budget is spread over roles in a fixed order: MLP channels first, up to `ffn_limit`
of their width; then whole key/value groups; then query heads inside groups; then the residual
width. On models with few key/value heads a group carries much more than its share of parameters,
which is why attention comes after the MLP (the measurements are in the project's protocol: removing
one of three groups in every layer doubles perplexity).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from passes.select._shared import asked, nearest, open_axes, plan_of
from surgeon.plugin import Budget, Context, GetScores, Meter, Plan, SelectPass

Tried = tuple[dict[str, int], float]
"""Kept counts by axis, and how much of the measure goes with the rest."""

ORDER = ("ffn", "kv_heads", "q_per_kv", "hidden", "width")


@dataclass(frozen=True)
class Uniform(SelectPass):
    """The same share of every axis of a role."""

    needs: ClassVar[frozenset[str]] = frozenset()

    ffn_limit: float = 0.75
    """Largest share of the MLP width that the overall ratio takes before it turns to attention."""

    multiple_of: int = 1
    """Kept MLP and residual widths are multiples of this (64 suits tensor cores)."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not 0 < self.ffn_limit < 1:  # false for NaN as well
            raise ValueError(f"ffn_limit is {self.ffn_limit}, a share lies between 0 and 1")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of}, it has to be 1 or more")

    def select(self, context: Context, scores: GetScores, budget: Budget) -> Plan:
        """Returns the plan that meets the budget within half of one selection step."""
        own = {
            role: lcm(self.multiple_of, budget.multiple_of.get(role, 1))
            for role in ("ffn", "hidden")
        }
        budget = replace(budget, multiple_of={**budget.multiple_of, **own})
        wanted = asked(context, scores, budget)
        keep = dict(wanted.kept)
        if budget.ratio is not None:
            keep = _Fill(self, context, budget, wanted.dropped).fill(keep)
        return plan_of(context, scores, keep, wanted.dropped)


class _Fill:
    """Adds to fixed counts what the overall ratio still needs."""

    def __init__(
        self, options: Uniform, context: Context, budget: Budget, dropped: tuple[str, ...]
    ) -> None:
        assert budget.ratio is not None
        self.options, self.context, self.budget = options, context, budget
        self.dropped = dropped
        self.meter: Meter = budget.meter(context.axes)
        self.whole = self.meter.whole
        self.goal = budget.ratio * self.whole
        self.axes = {role: open_axes(context, budget, (role,)) for role in ORDER}
        self.allowed: Mapping[str, NDArray[np.int64]] = {
            a.name: budget.kept(a) for axes in self.axes.values() for a in axes
        }

    def fill(self, fixed: dict[str, int]) -> dict[str, int]:
        """Returns the counts that come nearest to the goal."""
        roles = [r for r in ORDER if r not in self.budget.roles and self.axes[r]]
        keep = dict(fixed)
        floor = self.removed(keep)
        if not roles:
            if abs(floor - self.goal) > 0.005 * self.goal:
                raise self._unreachable(floor, "no role is left to fill it with")
            return keep
        first, before = roles[0], None
        for role in [None, *roles[1:]]:
            steps = self._steps(role) if role else [{}]
            for step in steps:
                at = self._tried({**keep, **step}, first)
                if at(self._last(first))[1] >= self.goal:
                    return self._closest(first, at, before)
                before = at(self._last(first))
            if role:
                keep = {**keep, **steps[-1]}
        assert before is not None
        raise self._unreachable(before[1], "every role is at its limit")

    def _last(self, role: str) -> int:
        """The most indices that the overall ratio takes from the largest axis of a role."""
        largest = max(a.size for a in self.axes[role])
        return max(1, int((self.options.ffn_limit if role == "ffn" else 0.5) * largest))

    def _steps(self, role: str) -> list[dict[str, int]]:
        """Ever stronger uniform cuts of a role, one index of its largest axis at a time."""
        return [self._uniform(role, gone) for gone in range(1, self._last(role) + 1)]

    def _uniform(self, role: str, gone: int) -> dict[str, int]:
        """Counts where so many indices of the largest axis of a role go, and as much of others."""
        axes = self.axes[role]
        share = gone / max(a.size for a in axes)
        return {
            a.name: nearest(
                a,
                a.size - round(share * a.size),
                self.allowed[a.name],
                self.budget.multiple(a),
            )
            for a in axes
        }

    def _tried(self, keep: dict[str, int], role: str) -> Callable[[int], Tried]:
        """Returns what so many indices of the largest axis of `role` come to, beside `keep`."""

        def at(gone: int) -> Tried:
            trial = {**keep, **self._uniform(role, gone)}
            return trial, self.removed(trial)

        return at

    def _closest(
        self, role: str, at: Callable[[int], Tried], before: Tried | None
    ) -> dict[str, int]:
        """Searches the uniform cut of `role` whose count is nearest to the goal.

        Args:
            role: the role that is searched.
            at: what a number of indices comes to.
            before: the most that weaker cuts of the other roles come to, if there are any.
        """
        goal, low, high = self.goal, 0, self._last(role)
        what = f"one index of every {role} axis"
        if before is not None and at(0)[1] >= goal:
            below, above = before, at(0)
            what = "one index of another role"
        else:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if at(middle)[1] < goal else (low, middle)
            below, above = at(low), at(high)
        step = above[1] - below[1]
        best = min(below, above, key=lambda found: abs(found[1] - goal))
        if best[1] - goal > step / 2:
            raise self._unreachable(best[1], "the roles asked for go beyond it")
        measure = self.budget.measure.replace("_", " ")
        self.context.notes.append(
            f"one selection step ({what}) is {step:,.{0 if step >= 10 else 3}f} {measure}, "
            f"{step / self.whole:.4%} of those counted"
        )
        return best[0]

    def removed(self, keep: Mapping[str, int]) -> float:
        """How much of the measure goes. Which indices go doesn't matter."""
        return self.whole - self.meter.left(keep, self.dropped)

    def _unreachable(self, reached: float, why: str) -> Exception:
        return self.budget.unreachable(reached / self.whole, why)
