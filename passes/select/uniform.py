"""Removes the same share from every axis of a role, the lowest scores first.

The parameter budget is spread over roles in a fixed order: MLP channels first, up to `ffn_limit`
of their width; then whole key/value groups; then query heads inside groups; then the residual
width. On models with few key/value heads a group carries much more than its share of parameters,
which is why attention comes after the MLP (the measurements are in the project's protocol: removing
one of three groups in every layer doubles perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from surgeon.plugin import (
    Axis,
    Budget,
    Code,
    Context,
    Plan,
    SelectPass,
    SurgeonError,
    count,
    counts,
    cut,
)

Tried = tuple[dict[str, int], int]
"""Kept counts by axis, and the parameters that go with the rest."""

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

    def select(self, context: Context, scores: Any, budget: Budget) -> Plan:
        """Returns the plan that meets the budget within half of one selection step."""
        fixed = self._fixed(context, budget)
        layers = self._layers(context, budget)
        branches = self._dropped(context, scores, layers, budget)
        keep = self._fill(context, budget, fixed, branches) if budget.ratio is not None else fixed
        wanted = [name for name, kept in keep.items() if kept < context.axes.by_name[name].size]
        found = scores(wanted) if wanted else {}
        cuts = [self._cut(context.axes.by_name[n], keep[n], found[n]) for n in wanted]
        return Plan(tuple(cuts), branches)

    def _axes(self, context: Context, role: str, budget: Budget) -> list[Axis]:
        return [a for a in context.axes.of_role(role) if a.name in budget.axes]

    def _fixed(self, context: Context, budget: Budget) -> dict[str, int]:
        """Kept counts for the roles that were asked for by name."""
        keep: dict[str, int] = {}
        for role, share in budget.roles.items():
            if role == "layers":
                continue
            axes = self._axes(context, role, budget)
            if not axes:
                raise _nothing(context, role, budget)
            for axis in axes:
                gone = self._rounded(role, axis, share, budget)
                if gone >= axis.size:
                    raise SurgeonError(
                        Code.EMPTY_AXIS,
                        f"{role}={share:g} would empty {axis.name}",
                        at=axis.name,
                        why=f"it has {axis.size} indices and {gone} would go",
                        try_=f"{role} below {(axis.size - 0.5) / axis.size:.3f}, or drop layers",
                        data={"axis": axis.name, "size": axis.size, "removed": gone},
                    )
                keep[axis.name] = axis.size - gone
        return keep

    def _rounded(self, role: str, axis: Axis, share: float, budget: Budget) -> int:
        gone = round(share * axis.size)
        own = self.multiple_of if role in ("ffn", "hidden") else 1
        multiple = math.lcm(own, budget.multiple_of.get(axis.name, 1))
        if gone and multiple > 1:
            kept = max(1, round((axis.size - gone) / multiple)) * multiple
            gone = axis.size - min(kept, axis.size)
        return gone

    def _layers(self, context: Context, budget: Budget) -> int:
        share = budget.roles.get("layers")
        if share is None:
            return 0
        layers = self._whole_layers(context, budget)
        if not layers:
            raise _nothing(context, "layers", budget)
        gone = round(share * len(layers))
        if gone >= len(layers):
            raise SurgeonError(
                Code.EMPTY_AXIS,
                f"layers={share:g} would leave no layer",
                at="layers",
                why=f"the model has {len(layers)} layers that may go, and {gone} would",
                try_=f"layers below {(len(layers) - 0.5) / len(layers):.3f}",
                data={"size": len(layers), "removed": gone},
            )
        return gone

    def _whole_layers(self, context: Context, budget: Budget) -> dict[str, list[str]]:
        layers: dict[str, list[str]] = {}
        frozen: set[str] = set()
        for branch in context.axes.branches:
            layers.setdefault(branch.layer, []).append(branch.name)
            if branch.name not in budget.branches:
                frozen.add(branch.layer)
        return {layer: names for layer, names in layers.items() if layer not in frozen}

    def _dropped(
        self, context: Context, scores: Any, count_: int, budget: Budget
    ) -> tuple[str, ...]:
        if not count_:
            return ()
        layers = self._whole_layers(context, budget)
        found = scores([name for names in layers.values() for name in names])
        total = {layer: sum(float(found[n]) for n in names) for layer, names in layers.items()}
        worst = sorted(layers, key=lambda layer: (total[layer], layer))[:count_]
        return tuple(n for layer in layers if layer in worst for n in layers[layer])

    def _fill(
        self, context: Context, budget: Budget, fixed: dict[str, int], branches: tuple[str, ...]
    ) -> dict[str, int]:
        """Adds to the fixed counts what the overall ratio still needs."""
        assert budget.ratio is not None
        goal = budget.ratio * count(context.program, budget.counted)
        roles = [r for r in ORDER if r not in budget.roles and self._axes(context, r, budget)]
        keep = dict(fixed)
        floor = self._removed(context, budget, keep, branches)
        if not roles:
            if abs(floor - goal) > 0.005 * goal:
                raise self._unreachable(context, budget, floor, "no role is left to fill it with")
            return keep
        first, before = roles[0], None
        for role in [None, *roles[1:]]:
            steps = self._steps(context, budget, role) if role else [{}]
            for step in steps:
                trial = {**keep, **step}
                at = self._tried(context, budget, trial, first, branches)
                if at(self._last(context, budget, first))[1] >= goal:
                    return self._closest(context, budget, first, at, before, goal)
                before = at(self._last(context, budget, first))
            if role:
                keep = {**keep, **steps[-1]}
        assert before is not None
        raise self._unreachable(context, budget, before[1], "every role is at its limit")

    def _last(self, context: Context, budget: Budget, role: str) -> int:
        """The most indices that the overall ratio takes from the largest axis of a role."""
        largest = max(a.size for a in self._axes(context, role, budget))
        return max(1, int((self.ffn_limit if role == "ffn" else 0.5) * largest))

    def _steps(self, context: Context, budget: Budget, role: str) -> list[dict[str, int]]:
        """Ever stronger uniform cuts of a role, one index of its largest axis at a time."""
        axes = self._axes(context, role, budget)
        largest = max(a.size for a in axes)
        return [
            {a.name: a.size - self._gone(role, a, gone / largest, budget) for a in axes}
            for gone in range(1, self._last(context, budget, role) + 1)
        ]

    def _gone(self, role: str, axis: Axis, share: float, budget: Budget) -> int:
        return min(self._rounded(role, axis, share, budget), axis.size - 1)

    def _tried(
        self,
        context: Context,
        budget: Budget,
        keep: dict[str, int],
        role: str,
        branches: tuple[str, ...],
    ) -> Callable[[int], Tried]:
        """Returns what so many indices of the largest axis of `role` come to, beside `keep`."""
        axes = self._axes(context, role, budget)
        largest = max(a.size for a in axes)

        def at(gone: int) -> Tried:
            own = {a.name: a.size - self._gone(role, a, gone / largest, budget) for a in axes}
            trial = {**keep, **own}
            return trial, self._removed(context, budget, trial, branches)

        return at

    def _closest(
        self,
        context: Context,
        budget: Budget,
        role: str,
        at: Callable[[int], Tried],
        before: Tried | None,
        goal: float,
    ) -> dict[str, int]:
        """Searches the uniform cut of `role` whose count is nearest to the goal.

        Args:
            context: what the driver gave.
            budget: what must be met.
            role: the role that is searched.
            at: what a number of indices comes to.
            before: the most that weaker cuts of the other roles come to, if there are any.
            goal: parameters to remove.
        """
        low, high = 0, self._last(context, budget, role)
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
        total = count(context.program, budget.counted)
        best = min(below, above, key=lambda found: abs(found[1] - goal))
        if best[1] - goal > step / 2:
            raise self._unreachable(context, budget, best[1], "the roles asked for go beyond it")
        context.notes.append(
            f"one selection step ({what}) is {step:,} parameters, "
            f"{step / total:.4%} of those counted"
        )
        return best[0]

    def _removed(
        self, context: Context, budget: Budget, keep: dict[str, int], branches: tuple[str, ...]
    ) -> int:
        """Parameters that go, counted as the ratio counts them. Which indices go doesn't matter."""
        axes = context.axes
        cuts = tuple(
            cut(axes.by_name[name], np.arange(kept))
            for name, kept in keep.items()
            if kept < axes.by_name[name].size
        )
        before, after = counts(axes, Plan(cuts, branches), budget.counted)
        return before - after

    def _cut(self, axis: Axis, kept: int, score: Any) -> Any:
        """Keeps the highest scores; ties go to the lower index."""
        order = np.argsort(-score, axis=-1, kind="stable")[..., :kept]
        outer = axis.outer if score.ndim > 1 else ()
        return cut(axis, order, outer)

    def _unreachable(self, context: Context, budget: Budget, best: int, why: str) -> SurgeonError:
        assert budget.ratio is not None
        total = count(context.program, budget.counted)
        if best < budget.ratio * total:
            most = math.floor(best / total * 1000) / 1000
            try_ = f"a ratio up to {most:.3f}, other roles (--role layers=…), or less frozen"
        else:
            try_ = f"a ratio from {math.ceil(best / total * 1000) / 1000:.3f}, or smaller shares"
        return SurgeonError(
            Code.BAD_RATIO,
            f"a ratio of {budget.ratio:g} can't be met",
            at="--ratio",
            why=f"{why}: {best / total:.4f} of the {total:,} counted parameters would go",
            try_=try_,
            data={"reachable": best / total, "parameters": total},
        )


def _nothing(context: Context, role: str, budget: Budget) -> SurgeonError:
    known = context.axes.roles
    pinned = [a for a in context.axes.of_role(role) if a.pins]
    if role not in (*known, "qk") or (role == "qk" and not context.axes.of_role(role)):
        why = f"the operations of this model give these roles: {', '.join(known)}"
        return SurgeonError(
            Code.NO_SUCH_ROLE,
            f"the model has no role {role!r}",
            at=f"--role {role}",
            why=why,
            try_="one of those",
            data={"role": role, "roles": list(known)},
        )
    if pinned:
        return SurgeonError(
            Code.PINNED,
            f"the role {role} can't be pruned",
            at=pinned[0].name,
            why=pinned[0].pins[0].why,
            try_="another role: `surgeon inspect` shows what each may lose",
            data={"role": role, "pins": [r.why for a in pinned for r in a.pins]},
        )
    return SurgeonError(
        Code.BAD_OPTION,
        f"nothing of the role {role} is left to prune",
        at=f"--role {role}",
        why="every axis of that role is frozen, or has a single index",
        try_="loosen --freeze or --only",
        data={"role": role},
    )
