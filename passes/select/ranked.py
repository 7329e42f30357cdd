"""Ranks all indices of all axes together; the lowest go until the budget is met.

An index is ranked by what it costs for what it saves, or by its score alone. Where each enclosing
index chooses its own, one of each goes at a time, as their numbers have to agree. Scores that are
comparable within a role only are refused unless an option says how to make them so.

Reference: Liu et al., Learning Efficient Convolutional Networks through Network Slimming, 2017 (one
threshold for all layers); Molchanov et al., Importance Estimation for Neural Network Pruning, 2019;
An et al., FLAP, 2024, eq. 7 (scores standardised by layer before they are ranked).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from passes.select._shared import asked, costs_of, nothing, open_axes, plan_of
from surgeon.plugin import Axis, Budget, Code, Context, GetScores, Plan, SelectPass, SurgeonError


@dataclass(frozen=True)
class Ranked(SelectPass):
    """The lowest of all scores, whichever axis they belong to."""

    needs: ClassVar[frozenset[str]] = frozenset()

    roles: tuple[str, ...] = ("ffn", "kv_heads", "q_per_kv")
    """Roles whose axes are ranked."""

    by: Literal["saved", "score"] = "saved"
    """Rank by cost for what is saved of the budget's measure, or by the score as it is."""

    normalise: Literal["none", "mean", "max"] | None = None
    """Divide each axis's scores by their mean or largest first. Scores that are comparable within a
    role only need one of these, if only to say `none`."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not self.roles:
            raise ValueError("roles is empty, there is nothing to rank")

    def select(self, context: Context, scores: GetScores, budget: Budget) -> Plan:
        """Returns the plan that meets the budget within half a step.

        Raises:
            SurgeonError: `bad-option` for scores that can't be compared; `bad-ratio` where the
                budget can't be met, with the nearest that can.
        """
        wanted = asked(context, scores, budget)
        if budget.ratio is None:
            return plan_of(context, scores, wanted.kept, wanted.dropped)
        roles = [r for r in self.roles if r not in budget.roles]
        axes = open_axes(context, budget, roles)
        if not axes:
            raise nothing(context, self.roles[0], budget)
        if scores.unit == "role" and self.normalise is None:
            raise SurgeonError(
                Code.BAD_OPTION,
                "these scores can't be ranked together",
                at="select/ranked",
                why="they are comparable within a role, and not meant to be between axes",
                try_="a score in units of the loss, or the option normalise: mean",
            )
        meter = budget.meter(context.axes)
        goal = budget.ratio * meter.whole
        allowed = [budget.kept(axis) for axis in axes]
        found = scores([axis.name for axis in axes])
        start = {**wanted.kept, **{a.name: int(k[0]) for a, k in zip(axes, allowed, strict=True)}}
        steps = [
            self._steps(axis, found[axis.name], scores.cumulative, kept)
            for axis, kept in zip(axes, allowed, strict=True)
        ]
        if self.by == "saved":
            for axis, kept, step in zip(axes, allowed, steps, strict=True):
                left = meter.left({**start, axis.name: kept}, wanted.dropped)
                step /= np.maximum(-np.diff(left), 1e-300)
        # What goes later in an axis never ranks before what goes earlier.
        values = np.concatenate(
            [np.maximum.accumulate(step) for step in steps if len(step)] or [[]]
        )
        which = np.repeat(np.arange(len(axes)), [len(step) for step in steps])
        order = which[np.argsort(values, kind="stable")]

        def at(numbers: NDArray[np.int64]) -> dict[str, int]:
            chosen = zip(axes, allowed, numbers, strict=True)
            return {**wanted.kept, **{a.name: int(kept[n]) for a, kept, n in chosen}}

        def gone(numbers: NDArray[np.int64]) -> float:
            return meter.whole - meter.left(at(numbers), wanted.dropped)

        taken = _taken(order, len(axes), gone, goal)
        reached, every = gone(taken), np.array([len(step) for step in steps])
        if (reached < goal * (1 - 1e-9) and (taken == every).all()) or (
            reached > goal * (1 + 1e-9) and not taken.any()
        ):
            beyond = reached > goal
            why = "the roles asked for go beyond it" if beyond else "every axis is at its limit"
            raise budget.unreachable(reached / meter.whole, why)
        context.notes.append(f"{reached / meter.whole:.4%} go, {budget.ratio:.4%} was asked for")
        return plan_of(context, scores, at(taken), wanted.dropped)

    def _steps(
        self, axis: Axis, score: Any, cumulative: bool, kept: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Returns what each step from one allowed count to the next costs, or scores at most."""
        array = np.asarray(score, dtype=np.float64)
        if self.normalise == "mean":
            array = array / max(float(np.abs(array).mean()), 1e-300)
        elif self.normalise == "max":
            array = array / max(float(np.abs(array).max()), 1e-300)
        gone = axis.size - kept
        rows = (array if self.by == "score" else costs_of(array, cumulative=cumulative)).reshape(
            -1, axis.size
        )
        order = np.argsort(-array.reshape(-1, axis.size), axis=-1, kind="stable")[:, ::-1]
        own = np.take_along_axis(rows, order, axis=-1)
        if self.by == "score":
            return own[:, gone[1:] - 1].max(axis=0)
        sums = np.concatenate([np.zeros((len(own), 1)), np.cumsum(own, axis=-1)], axis=-1).sum(0)
        return np.diff(sums[gone])


def _taken(
    order: NDArray[np.int64], axes: int, gone: Callable[[NDArray[np.int64]], float], goal: float
) -> NDArray[np.int64]:
    """Returns how many steps of each axis come nearest to the goal, the lowest ranks first.

    A step that would go beyond the goal is left out, with all of its axis, and smaller ones of
    other axes follow as they rank.

    Args:
        order: of which axis each step is, the lowest rank first.
        axes: their number.
        gone: how much goes with so many steps of each axis.
        goal: how much should.
    """

    def numbers(first: int) -> NDArray[np.int64]:
        return np.bincount(order[:first], minlength=axes)

    low, high = 0, len(order) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gone(numbers(middle)) <= goal else (low, middle)
    taken = numbers(low)
    best, nearest = taken, abs(gone(taken) - goal)
    done: set[int] = set()
    for axis in order[low:].tolist():
        if len(done) == axes:
            break
        if axis in done:
            continue
        further = taken.copy()
        further[axis] += 1
        off = gone(further) - goal
        if abs(off) < nearest:
            best, nearest = further, abs(off)
        if off > 0:
            done.add(axis)
        else:
            taken = further
    return best
