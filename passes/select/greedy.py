"""Drops branches or whole layers one after the other, each time the one that is missed least.

What several lose together is not the sum of what each loses alone: two neighbours may stand in for
one another. So after each step what is left is measured anew, as the divergence of the predictions
from the dense model's, for what it saves. Losses seldom fall when more is gone: only the few that
looked best are measured again.

Reference: Song et al., SLEB, 2024 (whole layers, one after the other, by a measured loss); Zhong et
al., BlockPruner, 2024 (attention and MLP apart); Minoux, Accelerated greedy algorithms, 1978 (what
looked worse before is left unmeasured).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from passes.select._shared import (
    LAYERS,
    asked,
    in_order,
    most_by_kind,
    nothing,
    plan_of,
    whole_layers,
)
from surgeon.plugin import Budget, Context, GetScores, Plan, SelectPass

Unit = tuple[str, ...]
"""Branches that go together."""

SLACK = 0.005
"""Share of a goal by which it may be missed where nothing more can go."""


@dataclass(frozen=True)
class Greedy(SelectPass):
    """One branch or layer after the other, that which moves the predictions least."""

    needs: ClassVar[frozenset[str]] = frozenset({"loss: divergence"})

    each: Literal["branch", "layer"] = "branch"
    """Drop attention and MLPs by themselves, or whole layers."""

    again: int = 6
    """How many are measured anew before each step: those that looked best when they last were."""

    max_share: float = 0.75
    """The largest share of the branches of a kind (attention, MLP) that may go, beside the budget's
    limits."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if self.again < 1:
            raise ValueError(f"again is {self.again}, at least 1 has to be measured")
        if not 0 < self.max_share <= 1:  # true for NaN as well
            raise ValueError(f"max_share is {self.max_share}, a share lies between 0 and 1")

    def select(self, context: Context, scores: GetScores, budget: Budget) -> Plan:
        """Returns the plan that comes as near to the budget as whole branches can.

        Raises:
            SurgeonError: `bad-ratio` where the budget can't be met, with the nearest that can.
        """
        wanted = asked(context, scores, budget)
        if budget.ratio is None:
            return plan_of(context, scores, wanted.kept, wanted.dropped)
        units = [] if LAYERS in budget.roles else self._units(context, budget)
        if not units:
            raise nothing(context, LAYERS, budget)
        base = plan_of(context, scores, wanted.kept)
        dropped = _Search(self, context, base, budget).found(units)
        return replace(base, branches=in_order(context, dropped))

    def _units(self, context: Context, budget: Budget) -> list[Unit]:
        if self.each == "layer":
            return [tuple(names) for names in whole_layers(context, budget).values()]
        return [(b.name,) for b in context.axes.branches if b.name in budget.branches]


class _Search:
    """One search: what is gone, and what is known of what is left."""

    def __init__(self, options: Greedy, context: Context, base: Plan, budget: Budget) -> None:
        self.options, self.context, self.base, self.budget = options, context, base, budget
        self.meter = budget.meter(context.axes)
        self.kinds = {branch.name: branch.kind for branch in context.axes.branches}
        self.most = most_by_kind(context, budget, options.max_share)
        self.counts = {cut.axis: cut.count for cut in base.cuts}
        self.dropped: tuple[str, ...] = ()
        self.lost = 0.0
        self.more: dict[Unit, float] = {}
        """By what may go: how much further predictions moved without it when that was measured."""

    def found(self, units: Sequence[Unit]) -> tuple[str, ...]:
        """Returns the branches that go.

        Raises:
            SurgeonError: `bad-ratio` where all that may go is not enough, or already too much.
        """
        budget, whole = self.budget, self.meter.whole
        assert budget.ratio is not None
        goal = budget.ratio * whole
        gone = self._gone(())
        if gone > goal * (1 + 1e-9):
            raise budget.unreachable(gone / whole, "what is asked for by role goes beyond it")
        while True:
            left = [u for u in units if not set(u) & set(self.dropped) and self._fits(u)]
            saved = {unit: self._gone(unit) - gone for unit in left}
            nearer = [unit for unit, more in saved.items() if abs(goal - gone - more) < goal - gone]
            if not nearer:
                break
            best = self._best(nearer, saved)
            self.dropped = (*self.dropped, *best)
            self.lost += self.more.pop(best)
            gone += saved[best]
        if not saved and gone < goal * (1 - SLACK):
            raise budget.unreachable(gone / whole, "as many branches of each kind go as may")
        measure = budget.measure.replace("_", " ")
        self.context.notes.append(
            f"{gone / whole:.4%} of the {measure} go with {len(self.dropped)} branches, "
            f"{budget.ratio:.4%} was asked for; predictions move by {self.lost:.3f} nats"
        )
        return self.dropped

    def _gone(self, unit: Unit) -> float:
        return self.meter.whole - self.meter.left(self.counts, (*self.dropped, *unit))

    def _fits(self, unit: Unit) -> bool:
        """Tells whether no kind of branch then loses more than it may."""
        gone = Counter(self.kinds[name] for name in (*self.dropped, *unit))
        return all(count <= self.most[kind] for kind, count in gone.items())

    def _best(self, units: Sequence[Unit], saved: Mapping[Unit, float]) -> Unit:
        """Returns the one that is missed least for what it saves, of those that look best."""

        def rate(unit: Unit) -> float:
            return self.more[unit] / saved[unit]

        known = sorted((u for u in units if u in self.more), key=rate)
        look = [*(u for u in units if u not in self.more), *known[: self.options.again]]
        plans = [replace(self.base, branches=(*self.dropped, *unit)) for unit in look]
        found = self.context.divergences((plan, _unchanged) for plan in plans)
        for unit, each in zip(look, found, strict=True):
            self.more[unit] = each.mean - self.lost
        return min(look, key=rate)


def _unchanged(_: str) -> None:
    """Puts nothing in any parameter's place."""
