"""Gives every axis a share of its own, smaller where the model is more sensitive.

How sensitive is measured: by how much the loss grows when that axis alone, or its layer alone, is
cut at a reference share; or by how much the branch that it lies in changes the residual stream
(block influence). Shares follow a softmax of the negative sensitivities, times one factor by which
the budget is met; then single steps of single axes close the rest.

Reference: Lin et al., MoDeGPT, 2024, section 3.3 (shares by softmax of block influence, with a
temperature); Men et al., ShortGPT, 2024 (block influence); Yin et al., OWL, 2024 (shares by layer);
Xia et al., Sheared LLaMA, 2024, found unequal layers slower for their size on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from passes.select._shared import asked, nearest, nothing, open_axes, plan_of
from surgeon.plugin import Axis, Branch, Budget, Context, GetScores, Meter, Plan, SelectPass

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sensitivity(SelectPass):
    """Larger shares of what matters less."""

    roles: tuple[str, ...] = ("ffn", "kv_heads")
    """Roles whose axes are cut."""

    by: Literal["loss", "similarity"] = "loss"
    """Measure the growth of the loss, or what a branch changes of the residual stream."""

    each: Literal["axis", "layer"] = "axis"
    """Of the loss: cut one axis at a time, or all of a layer's axes together."""

    reference: float = 0.2
    """Share of the indices that is cut to measure the loss."""

    temperature: float = 1.0
    """How little sensitivities matter, in units of their mean: large, and all shares are alike."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not self.roles:
            raise ValueError("roles is empty, there is nothing to cut")
        if not 0 < self.reference < 1:
            raise ValueError(f"reference is {self.reference}, a share lies between 0 and 1")
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature}, it has to be above 0")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What sensitivity is measured by."""
        return frozenset({"loss" if self.by == "loss" else "activations: similarity"})

    def select(self, context: Context, scores: GetScores, budget: Budget) -> Plan:
        """Returns the plan that meets the budget within half a step.

        Raises:
            SurgeonError: `bad-ratio` where the budget can't be met, with the nearest that can.
        """
        wanted = asked(context, scores, budget)
        if budget.ratio is None:
            return plan_of(context, scores, wanted.kept, wanted.dropped)
        axes = open_axes(context, budget, [r for r in self.roles if r not in budget.roles])
        if not axes:
            raise nothing(context, self.roles[0], budget)
        sensitive = self._sensitivities(context, scores, axes, budget)
        typical = max(float(sensitive.mean()), 1e-300)
        weights = np.exp(-(sensitive - sensitive.min()) / (self.temperature * typical))
        meter = budget.meter(context.axes)
        spread = _Spread(axes, weights, budget, meter, dict(wanted.kept), wanted.dropped)
        kept = spread.found(budget.ratio * meter.whole)
        gone = meter.whole - meter.left(kept, wanted.dropped)
        shares = [1 - kept[a.name] / a.size for a in axes]
        context.notes.append(
            f"shares from {min(shares):.3f} to {max(shares):.3f}; {gone / meter.whole:.4%} go, "
            f"{budget.ratio:.4%} was asked for"
        )
        return plan_of(context, scores, kept, wanted.dropped)

    def _sensitivities(
        self, context: Context, scores: GetScores, axes: list[Axis], budget: Budget
    ) -> Floats:
        """Returns by axis how sensitive the model is to it; never negative."""
        if self.by == "similarity":
            inside = {a.name: _branch(context, a) for a in axes}
            branches = [b.name for b in dict.fromkeys(inside.values()) if b is not None]
            alike = context.similarity(branches)
            # What lies in no branch, such as the residual width, changes all of it.
            found = [
                1.0 if (own := inside[a.name]) is None else 1.0 - alike[own.name] for a in axes
            ]
            return np.maximum(np.array(found), 0.0)
        groups: dict[str, list[Axis]] = {}
        for axis in axes:
            branch = _branch(context, axis)
            layer = branch.layer if branch is not None and self.each == "layer" else axis.name
            groups.setdefault(layer, []).append(axis)
        base = context.loss(Plan())
        found: list[float] = []
        grown: dict[str, float] = {}
        for group in groups.values():
            kept = {a.name: self._reference(a, budget) for a in group}
            loss = context.loss(plan_of(context, scores, kept))
            # An axis of few indices loses more than the reference share: by share they compare.
            share = float(np.mean([1 - kept[a.name] / a.size for a in group]))
            for axis in group:
                grown[axis.name] = max(loss - base, 0.0) / max(share, 1e-9)
        found = [grown[a.name] for a in axes]
        return np.array(found)

    def _reference(self, axis: Axis, budget: Budget) -> int:
        gone = max(1, round(self.reference * axis.size))
        return nearest(axis, axis.size - gone, budget.kept(axis), budget.multiple(axis))


def _branch(context: Context, axis: Axis) -> Branch | None:
    """Returns the branch that an axis lies in; None if it goes beyond one."""
    params = {m.param for m in axis.members}
    return next((b for b in context.axes.branches if params <= set(b.params)), None)


class _Spread:
    """Shares in proportion to weights, of which a factor meets the budget."""

    def __init__(
        self,
        axes: list[Axis],
        weights: Floats,
        budget: Budget,
        meter: Meter,
        fixed: dict[str, int],
        dropped: tuple[str, ...],
    ) -> None:
        self.axes, self.weights, self.budget, self.meter = axes, weights, budget, meter
        self.fixed, self.dropped = fixed, dropped
        self.allowed = [budget.kept(axis) for axis in axes]

    def exact(self, factor: float) -> Floats:
        """Returns what each axis would keep if it could keep any part of an index."""
        sizes = np.array([axis.size for axis in self.axes], dtype=np.float64)
        least = np.array([kept[-1] for kept in self.allowed])
        return np.maximum(sizes * (1 - factor * self.weights), least)

    def counts(self, factor: float) -> list[int]:
        """Returns the places, among the counts allowed, at or above what would be kept."""
        exact = self.exact(factor)
        # Counts are sorted most first.
        return [
            max(int(np.searchsorted(-kept, -want, side="right")) - 1, 0)
            for kept, want in zip(self.allowed, exact, strict=True)
        ]

    def kept(self, places: list[int]) -> dict[str, int]:
        """Returns the counts at some places."""
        chosen = zip(self.axes, self.allowed, places, strict=True)
        return {**self.fixed, **{a.name: int(kept[p]) for a, kept, p in chosen}}

    def gone(self, places: list[int]) -> float:
        """Returns how much of the measure goes."""
        return self.meter.whole - self.meter.left(self.kept(places), self.dropped)

    def found(self, goal: float) -> dict[str, int]:
        """Returns the counts nearest to the goal.

        Raises:
            SurgeonError: `bad-ratio` where it lies beyond all of them.
        """
        whole = self.meter.whole
        most, least = [len(kept) - 1 for kept in self.allowed], [0] * len(self.axes)
        if self.gone(most) < goal * (1 - 1e-9):
            raise self.budget.unreachable(self.gone(most) / whole, "every axis is at its limit")
        if self.gone(least) > goal * (1 + 1e-9):
            why = "what is asked for by role goes beyond it"
            raise self.budget.unreachable(self.gone(least) / whole, why)
        low, high = 0.0, 1.0 / float(self.weights.min())
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.gone(self.counts(middle)) < goal else (low, middle)
        places = self.counts(low)
        return self.kept(self._closed(places, self.exact(high), goal))

    def _closed(self, places: list[int], exact: Floats, goal: float) -> list[int]:
        """Takes single steps of those that are furthest behind, until none brings it nearer.

        A step that would go beyond the goal is left to axes with smaller ones.
        """
        off = goal - self.gone(places)
        done: set[int] = set()
        best, nearest_ = places, abs(off)
        while True:
            behind = [
                (float(kept[p] - want) / max(int(kept[p] - kept[p + 1]), 1), -i)
                for i, (kept, p, want) in enumerate(zip(self.allowed, places, exact, strict=True))
                if p + 1 < len(kept) and i not in done
            ]
            if not behind:
                return best
            part = -max(behind)[1]
            further = [p + (i == part) for i, p in enumerate(places)]
            off = goal - self.gone(further)
            if abs(off) < nearest_:
                best, nearest_ = further, abs(off)
            if off < 0:
                done.add(part)
            else:
                places = further
