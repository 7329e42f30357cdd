"""Minimises the predicted loss subject to the budget, over all roles at once.

Every axis gives a curve: what is predicted to be lost for each number of kept indices, the lowest
scores gone. Axes that share tensors (heads, and the channels within them) make one part, of which
every combination of counts is looked at with what it really saves; a dropped branch is one
combination more, which frees everything that lies in it. Of each part one combination is chosen so
that the sum of the losses is least and the budget is met.

Where scores predict the growth of the loss they are used as they are. Others are comparable within
a role only; `unit: measured` then measures, for every role, by how much the loss grows when that
role alone is cut, and scales its curves by it.

What a second-order prediction misses differs from layer to layer: `unit: divergence` measures every
axis by itself, cut at one count, its readers solved for anew, on windows that the statistics have
not seen; its curve is scaled to how far the predictions move. Where that is due to few tokens
(rare words, in the first and last layers) other text fares worse than the mean says: the standard
deviation over tokens is added, times `caution`. SmolLM2-135M, 20 % of the decoder, after least
squares, growth of the log-perplexity on text of other articles: 0.466 with predictions alone, 0.411
with measured means, 0.388 with a caution of 0.6.

Reference: Frantar and Alistarh, SPDY, 2022, and Kurtić et al., ZipLM, 2023 (layers' widths by
dynamic programming on predicted losses); Shen et al., Structural pruning via latency-saliency
knapsack (HALP), 2022; Sinha and Zoltners, 1979 (the multiple-choice knapsack); Namkoong and Duchi,
Variance-based Regularization with Convex Objectives, 2017 (the deviation that is added).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from passes._refit import RIDGE, refitted
from passes.select._curves import Curve, Grid, Maker, owned, silencing
from passes.select._knapsack import Points, choose
from passes.select._shared import (
    LAYERS,
    Asked,
    asked,
    costs_of,
    in_order,
    most_by_kind,
    nearest,
    nothing,
    open_axes,
    plan_of,
)
from surgeon.plugin import (
    Axis,
    Budget,
    Code,
    Context,
    GetScores,
    Meter,
    Plan,
    Selection,
    SelectPass,
    consumers,
)
from surgeon.plugin import SurgeonError as Refusal


def _most() -> dict[str, float]:
    return {"ffn": 0.9, "kv_heads": 0.67, "q_per_kv": 0.67, "v": 0.75, "layers": 0.5}


@dataclass(frozen=True)
class Budgeted(SelectPass):
    """The counts of all axes, and the branches, that lose least for what they save."""

    roles: tuple[str, ...] = ("ffn", "kv_heads", "q_per_kv")
    """Roles that are searched; `layers` adds dropping branches, `v` the width of value heads."""

    max_share: Mapping[str, float] = field(default_factory=_most)
    """By role, the largest share of an axis's indices that may go, beside the budget's limits."""

    unit: Literal["score", "measured", "divergence"] = "score"
    """Compare roles by the scores as they are, or scaled to the growth of the loss, measured by
    cutting each role alone; or compare axes, scaled to the divergence of each cut alone."""

    reference: float = 0.1
    """Share of a role's or an axis's indices that is cut to measure it; at most twice the share
    that the budget asks for, as little is then cut of most of them."""

    caution: float = 0.6
    """Standard deviations over tokens that are added to a mean divergence."""

    measure: tuple[str, ...] = ()
    """Roles whose axes' divergence is measured; those of others are scaled by the median of what is
    found. All of them without it."""

    depth: Literal["curves", "score", "measured"] = "curves"
    """What a branch loses: what the axis that its last map reads loses with all its indices; its
    own score; or the measured growth of the loss without it. What several lose together is more
    than the sum: where mostly branches go, `greedy` is better."""

    alike: bool = False
    """Keep the same counts in every layer, as a target without widths by layer needs it."""

    convex: bool = True
    """Go by the curves' lower convex hulls, which is fast; else also by dynamic programming over
    all their points, which is better where they are far from convex."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not self.roles:
            raise ValueError("roles is empty, there is nothing to search")
        if self.alike and LAYERS in self.roles:
            raise ValueError("alike is set, and dropping a branch makes a layer unlike the others")
        for role, share in self.max_share.items():
            if not 0 <= share <= 1:  # false for NaN as well
                raise ValueError(f"max_share[{role}] is {share}, a share lies between 0 and 1")
        if not 0 < self.reference < 1:
            raise ValueError(f"reference is {self.reference}, a share lies between 0 and 1")
        if not set(self.measure) <= set(self.roles):
            raise ValueError(f"measure is {self.measure}, of the roles {self.roles}")
        if not self.caution >= 0:  # true for NaN as well
            raise ValueError(f"caution is {self.caution}, it has to be 0 or more")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Calibration data where a loss is measured."""
        measured = self.unit == "measured" or (self.depth == "measured" and LAYERS in self.roles)
        found = frozenset({"loss"}) if measured else frozenset[str]()
        if self.unit == "divergence":
            found |= {"loss: divergence", "activations: second moment"}
        return found

    def select(self, context: Context, scores: GetScores, budget: Budget) -> Plan:
        """Returns the plan of least predicted loss that meets the budget.

        Raises:
            SurgeonError: `bad-ratio` where it can't be met, with the nearest that can;
                `no-such-role` and others for roles of which nothing can go.
        """
        wanted = asked(context, scores, budget)
        if budget.ratio is None:
            return plan_of(context, scores, wanted.kept, wanted.dropped)
        for role in self.roles:
            if role not in context.axes.roles and role not in _most():
                raise nothing(context, role, budget)
        search = _Search(self, context, scores, budget, wanted)
        kept, dropped = search.found()
        return plan_of(context, search.scores, kept, dropped)


class _Search:
    """One search: its curves, its parts, and what it comes to."""

    def __init__(
        self, options: Budgeted, context: Context, scores: GetScores, budget: Budget, wanted: Asked
    ) -> None:
        self.options, self.context, self.budget, self.wanted = options, context, budget, wanted
        self._known: dict[str, Any] = {}
        self._scores = scores
        self.scores = GetScores(self._score, scores.unit, scores.cumulative)
        self.meter: Meter = budget.meter(context.axes)
        moot = frozenset[str]().union(*owned(context.axes, wanted.dropped).values())
        roles = [r for r in options.roles if r != LAYERS and r not in budget.roles]
        self.axes = [a for a in open_axes(context, budget, roles) if a.name not in moot]
        self.branches = self._branches()

    def _score(self, names: Any) -> Mapping[str, Any]:
        """Scores each axis and branch once."""
        every = tuple(names)
        new = [name for name in every if name not in self._known]
        if new:
            self._known.update(self._scores(new))
        return {name: self._known[name] for name in every}

    def _branches(self) -> list[str]:
        searched = LAYERS in self.options.roles and LAYERS not in self.budget.roles
        return sorted(self.budget.branches) if searched else []

    # --- the search ------------------------------------------------------------------------------

    def found(self) -> tuple[dict[str, int], tuple[str, ...]]:
        """Returns the counts and dropped branches of least loss."""
        assert self.budget.ratio is not None
        wanted, whole = self.wanted, self.meter.whole
        goal = self.budget.ratio * whole
        fixed = whole - self.meter.left(wanted.kept, wanted.dropped)
        grids = self._grids()
        if not grids:
            return self._nothing(fixed, goal)
        curves = [_points(part) for part in grids]
        self._check(curves, goal, fixed)
        rest, kept, dropped = goal - fixed, dict(wanted.kept), wanted.dropped
        for _ in range(3):
            choice = choose(curves, rest, convex=self.options.convex)
            kept, dropped = self._plan(grids, curves, choice.points)
            off = goal - (whole - self.meter.left(kept, dropped))
            # What goes with several branches together is in no part: count again with it.
            error = off - (rest - choice.saved)
            if abs(error) <= 1e-9 * whole:
                break
            rest += error
        self._note(goal, whole - self.meter.left(kept, dropped))
        return kept, dropped

    def _plan(
        self, grids: list[list[list[Grid]]], curves: list[Points], points: tuple[int, ...]
    ) -> tuple[dict[str, int], tuple[str, ...]]:
        kept, dropped = dict(self.wanted.kept), list(self.wanted.dropped)
        for part, curve, point in zip(grids, curves, points, strict=True):
            flat = int(curve.origin[point])
            for alike in part:  # of which each member has the same combinations
                size = alike[0].saved.size
                if flat < size:
                    for grid in alike:
                        kept.update(grid.kept(flat))
                        dropped += grid.dropped
                    break
                flat -= size
        return kept, in_order(self.context, dropped)

    def _grids(self) -> list[list[list[Grid]]]:
        """Returns the parts: of each the sets of dropped branches, of each those alike."""
        curves = self._curves()
        drops = self._drops(curves)
        names = [axis.name for axis in self.axes]
        if not names and not drops:
            return []
        maker = Maker(self.context.axes, curves, drops, owned(self.context.axes, drops))
        parts = self.meter.parts(names, list(drops), self.wanted.kept)
        base = self.wanted.dropped
        live = [p for p in parts if not set(p.branches) & set(base)]
        made = [maker.grids(part) for part in live]
        if not self.options.alike:
            return [[[grid] for grid in part] for part in made]
        groups: dict[tuple[Any, ...], list[list[Grid]]] = {}
        for part in made:
            roles = tuple(self.context.axes.by_name[n].role for n in part[0].axes)
            key = (roles, *(grid.like for grid in part))
            groups.setdefault(key, []).append(part)
        return [[list(same) for same in zip(*group, strict=True)] for group in groups.values()]

    def _check(self, curves: list[Points], goal: float, fixed: float) -> None:
        """Refuses a goal beyond what every curve's end comes to."""
        whole = self.meter.whole
        most = fixed + sum(float(c.saved[-1]) for c in curves)
        least = fixed + sum(float(c.saved[0]) for c in curves)
        step = min(c.step for c in curves)
        slack = step / 2 if np.isfinite(step) else 0.005 * goal
        if goal > most + slack:
            raise self.budget.unreachable(most / whole, "every role is at its limit")
        if goal < least - slack:
            raise self.budget.unreachable(least / whole, "what is asked for by role goes beyond it")

    def _nothing(self, fixed: float, goal: float) -> tuple[dict[str, int], tuple[str, ...]]:
        if abs(fixed - goal) > 0.005 * goal:
            why = f"nothing of the roles {', '.join(self.options.roles)} is left to fill it with"
            raise self.budget.unreachable(fixed / self.meter.whole, why)
        return dict(self.wanted.kept), self.wanted.dropped

    def _note(self, goal: float, gone: float) -> None:
        whole = self.meter.whole
        self.context.notes.append(
            f"{gone / whole:.4%} of the {self.budget.measure.replace('_', ' ')} go, "
            f"{goal / whole:.4%} was asked for"
        )

    # --- curves ----------------------------------------------------------------------------------

    def _curves(self) -> dict[str, Curve]:
        """Returns the curves of the axes that are searched, and of fixed ones that enclose them."""
        by_name = self.context.axes.by_name
        outer = [n for axis in self.axes for n in axis.outer if n in self.wanted.kept]
        around = [by_name[n] for n in dict.fromkeys(outer)]
        found = self.scores([a.name for a in (*self.axes, *around)])
        most = self.options.max_share
        curves: dict[str, Curve] = {}
        for axis in self.axes:
            kept = self.budget.kept(axis, most.get(axis.role, 1.0))
            curves[axis.name] = self._curve(axis, found[axis.name], kept)
        for axis in around:
            kept = np.array([self.wanted.kept[axis.name]])
            curves[axis.name] = self._curve(axis, found[axis.name], kept)
        return self._calibrated(curves)

    def _curve(self, axis: Axis, score: Any, kept: Any) -> Curve:
        array = np.asarray(score, dtype=np.float64)
        costs = costs_of(array, cumulative=self.scores.cumulative)
        return Curve.of(axis, costs, array, kept)

    def _calibrated(self, curves: dict[str, Curve]) -> dict[str, Curve]:
        roles = list(dict.fromkeys(axis.role for axis in self.axes))
        if self.options.unit == "score":
            if self.scores.unit == "role" and (len(roles) > 1 or (roles and self.branches)):
                self.context.notes.append(
                    f"scores are compared across {', '.join(roles)} as they are, and are only "
                    "meant to be compared within a role: see the option unit"
                )
            return curves
        if self.options.unit == "divergence":
            return self._diverged(curves)
        base = self.context.loss(Plan())
        factors = {role: self._factor(role, curves, base) for role in roles}
        said = ", ".join(f"{role} {factor:.3g}" for role, factor in factors.items())
        self.context.notes.append(f"scores are scaled to the growth of the loss: {said}")
        return {n: c.scaled(factors.get(c.axis.role, 1.0)) for n, c in curves.items()}

    def _factor(self, role: str, curves: dict[str, Curve], base: float) -> float:
        """Returns the measured growth of the loss over the predicted, of one role cut alone."""
        kept: dict[str, int] = {}
        for axis in (a for a in self.axes if a.role == role):
            kept[axis.name] = self._reference(axis, curves[axis.name])
        cut = {name: count for name, count in kept.items() if count < curves[name].axis.size}
        predicted = sum(curves[name].at(count) for name, count in cut.items())
        if not cut or predicted <= 0:
            return 1.0
        grown = self.context.loss(plan_of(self.context, self.scores, cut)) - base
        # What costs nothing to cut a little is still not free.
        return max(grown, 1e-6 * base) / predicted

    def _reference(self, axis: Axis, curve: Curve) -> int:
        """Returns the count at which an axis is measured."""
        assert self.budget.ratio is not None
        share = min(self.options.reference, 2 * self.budget.ratio)
        gone = max(1, round(share * axis.size))
        return nearest(axis, axis.size - gone, curve.kept, self.budget.multiple(axis))

    def _diverged(self, curves: dict[str, Curve]) -> dict[str, Curve]:
        """Returns the curves scaled to the divergence of each axis that is cut alone."""
        roles = self.options.measure or self.options.roles
        axes = [axis for axis in self.axes if axis.role in roles]
        counts = {axis.name: self._reference(axis, curves[axis.name]) for axis in axes}
        counts = {n: k for n, k in counts.items() if curves[n].at(k) > 0}
        plans = [plan_of(self.context, self.scores, {n: k}) for n, k in counts.items()]
        found = self.context.divergences((p, self._refitted(p)) for p in plans)
        factors: dict[str, float] = {}
        for (name, count), each in zip(counts.items(), found, strict=True):
            # How far predictions move, with what they may on another text.
            lost = each.mean + self.options.caution * each.deviation
            # What costs nothing to cut a little is still not free.
            factors[name] = max(lost, 1e-9) / curves[name].at(count)
        if factors:
            least, most = min(factors.values()), max(factors.values())
            self.context.notes.append(
                f"scores are scaled to the measured divergence by axis: {least:.3g} to {most:.3g}"
            )
        others = float(np.median(list(factors.values()))) if factors else 1.0
        return {n: c.scaled(factors.get(n, others)) for n, c in curves.items()}

    def _refitted(self, plan: Plan) -> Callable[[str], Any]:
        """Returns what gives the readers of a cut axis, solved for anew by themselves."""
        axes, selection = self.context.axes, Selection(self.context.axes, plan)
        found = {c.param: c for cut in plan.cuts for c in consumers(axes, axes.get(cut.axis))}

        def solve(name: str) -> Any:
            if name not in found:
                return None
            dim = found[name].dim
            second = self.context.moments([name])[name].second.double()
            kept = selection.kept(name)[dim]
            return refitted(self.context.weights(name), dim, kept, second, second, RIDGE)

        return solve

    # --- branches --------------------------------------------------------------------------------

    def _drops(self, curves: dict[str, Curve]) -> dict[str, float]:
        """Returns what each branch that may be dropped loses."""
        if not self.branches:
            return {}
        match self.options.depth:
            case "score":
                found = self.scores(self.branches)
                losses = {name: max(float(found[name]), 0.0) for name in self.branches}
            case "measured":
                base = self.context.loss(Plan())
                losses = {
                    name: max(self.context.loss(Plan(branches=(name,))) - base, 0.0)
                    for name in self.branches
                }
            case "curves":
                losses = {name: self._silenced(name, curves) for name in self.branches}
        kinds = {b.name: b.kind for b in self.context.axes.branches}
        share = self.options.max_share.get(LAYERS, 1.0)
        allowed: dict[str, float] = {}
        for kind, most in most_by_kind(self.context, self.budget, share).items():
            own = sorted((n for n in losses if kinds[n] == kind), key=lambda n: (losses[n], n))
            allowed |= {n: losses[n] for n in own[:most]}
        return allowed

    def _silenced(self, branch: str, curves: dict[str, Curve]) -> float:
        """Returns what the axis that a branch's last map reads loses with all its indices."""
        names = silencing(self.context, branch)
        own = [curves[name].whole for name in names if name in curves]
        if own:
            return max(own)
        if not names or self.options.unit != "score":
            why = "no single map ends it, whose inputs could all go"
            raise Refusal(
                Code.BAD_OPTION,
                f"nothing predicts what {branch} loses",
                at=branch,
                why="its role is not among those that are measured" if names else why,
                try_="the option depth: score or measured, or roles without layers",
            )
        axis = self.context.axes.by_name[names[0]]
        score = self.scores([axis.name])[axis.name]
        return self._curve(axis, score, np.array([axis.size])).whole


def _points(part: list[list[Grid]]) -> Points:
    """Returns the curve of a part: all its combinations, those of parts alike added up."""
    saved = [sum(grid.saved.ravel() for grid in alike) for alike in part]
    loss = [sum(grid.loss.ravel() for grid in alike) for alike in part]
    return Points.of(np.concatenate(saved), np.concatenate(loss))
