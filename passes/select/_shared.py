"""What every selection does: shares asked for by name, kept indices from scores, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.plugin import Axis, Budget, Code, Context, Cut, GetScores, Plan, SurgeonError, cut

LAYERS = "layers"
"""The role that stands for whole branches."""


@dataclass(frozen=True)
class Asked:
    """What a budget asks for by role.

    Attributes:
        kept: counts of the axes of those roles.
        dropped: branches.
    """

    kept: Mapping[str, int]
    dropped: tuple[str, ...]


def asked(context: Context, scores: GetScores, budget: Budget) -> Asked:
    """Returns the counts and branches that a budget's roles come to.

    Args:
        context: what the driver gave.
        scores: for branches, the worst of which go.
        budget: what is asked for.

    Raises:
        SurgeonError: where a role isn't there, is pinned or frozen, or nothing would be left.
    """
    counts: dict[str, int] = {}
    for role, share in budget.roles.items():
        if role == LAYERS:
            continue
        axes = open_axes(context, budget, (role,))
        if not axes:
            raise nothing(context, role, budget)
        for axis in axes:
            counts[axis.name] = rounded(axis, share, budget, role)
    return Asked(counts, _dropped(context, scores, budget))


def open_axes(context: Context, budget: Budget, roles: Iterable[str]) -> list[Axis]:
    """Returns the axes of some roles that may be cut, each once."""
    found = {a.name: a for role in roles for a in context.axes.of_role(role)}
    return [axis for name, axis in found.items() if name in budget.axes]


def rounded(axis: Axis, share: float, budget: Budget, role: str) -> int:
    """Returns the count nearest to what is left when a share of an axis goes.

    Args:
        axis: what is cut.
        share: of its indices.
        budget: its limits and multiples.
        role: what was asked for, which may stand for several roles, as `qk` does.

    Raises:
        SurgeonError: `empty-axis` or `bad-ratio` where that isn't what was asked for.
    """
    gone = round(share * axis.size)
    if gone >= axis.size:
        raise SurgeonError(
            Code.EMPTY_AXIS,
            f"{role}={share:g} would empty {axis.name}",
            at=axis.name,
            why=f"it has {axis.size} indices and {gone} would go",
            try_=f"{role} below {(axis.size - 0.5) / axis.size:.3f}, or drop layers",
            data={"axis": axis.name, "size": axis.size, "removed": gone},
        )
    if gone > budget.limit(axis) * axis.size + 1e-9:
        raise SurgeonError(
            Code.BAD_RATIO,
            f"{role}={share:g} goes beyond a limit",
            at=axis.name,
            why=f"at most {budget.limit(axis):g} of its indices may go",
            try_=f"{role}={budget.limit(axis):g}, or a larger limit",
            data={"reachable": budget.limit(axis)},
        )
    return nearest(axis, axis.size - gone, budget.kept(axis), budget.multiple(axis))


def nearest(axis: Axis, count: int, kept: NDArray[np.int64], multiple: int) -> int:
    """Returns the count that may be kept nearest to one.

    A size that is no multiple of what is wanted stands for the next that is, unless all is meant
    to stay: it is not kept whole because that is nearer than rounding down.

    Args:
        axis: that is cut.
        count: what would be kept.
        kept: counts that may be, most first.
        multiple: what all of those but the size itself are multiples of.
    """
    if count >= axis.size:
        return int(kept[0])
    stands = -(-kept // multiple) * multiple
    return int(kept[np.abs(stands - count).argmin()])


def _dropped(context: Context, scores: GetScores, budget: Budget) -> tuple[str, ...]:
    share = budget.roles.get(LAYERS)
    if share is None:
        return ()
    layers = whole_layers(context, budget)
    if not layers:
        raise nothing(context, LAYERS, budget)
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
    if not gone:
        return ()
    found = scores([name for names in layers.values() for name in names])
    total = {layer: sum(float(found[n]) for n in names) for layer, names in layers.items()}
    worst = sorted(layers, key=lambda layer: (total[layer], layer))[:gone]
    return tuple(n for layer in layers if layer in worst for n in layers[layer])


def whole_layers(context: Context, budget: Budget) -> dict[str, list[str]]:
    """Returns the branches by layer, of the layers that may go whole."""
    layers: dict[str, list[str]] = {}
    frozen: set[str] = set()
    for branch in context.axes.branches:
        layers.setdefault(branch.layer, []).append(branch.name)
        if branch.name not in budget.branches:
            frozen.add(branch.layer)
    return {layer: names for layer, names in layers.items() if layer not in frozen}


def most_by_kind(context: Context, budget: Budget, share: float) -> dict[str, int]:
    """Returns how many branches of each kind (attention, MLP) may go.

    Args:
        context: what the driver gave.
        budget: its limits.
        share: the largest share of a kind that may go, beside the budget's limit.
    """
    kinds = Counter(branch.kind for branch in context.axes.branches)
    share = min(share, budget.limits.get(LAYERS, 1.0))
    return {kind: int(share * every + 1e-9) for kind, every in kinds.items()}


def in_order(context: Context, branches: Iterable[str]) -> tuple[str, ...]:
    """Returns branches in the order of the program."""
    order = [branch.name for branch in context.axes.branches]
    return tuple(sorted(branches, key=order.index))


def plan_of(
    context: Context, scores: GetScores, kept: Mapping[str, int], dropped: Iterable[str] = ()
) -> Plan:
    """Returns the plan that keeps so many of the highest scores; ties go to the lower index.

    Where each enclosing index has scores of its own, each chooses its own.
    """
    by_name = context.axes.by_name
    wanted = [name for name, count in kept.items() if count < by_name[name].size]
    found = scores(wanted) if wanted else {}
    return Plan(tuple(_cut(by_name[n], kept[n], found[n]) for n in wanted), tuple(dropped))


def _cut(axis: Axis, kept: int, score: Any) -> Cut:
    order = np.argsort(-score, axis=-1, kind="stable")[..., :kept]
    return cut(axis, order, axis.outer if score.ndim > 1 else ())


def costs_of(score: NDArray[np.float64], *, cumulative: bool) -> NDArray[np.float64]:
    """Returns what each index costs beside all that score less, of the scores' shape.

    A cumulative score is the cost of an index together with those, whichever enclosing index they
    belong to: its own is what it adds. Nothing costs less than nothing.
    """
    flat = np.asarray(score, dtype=np.float64).reshape(-1)
    if cumulative:
        order = np.argsort(-flat, kind="stable")[::-1]  # as they go: of equal ones the last first
        own = np.empty_like(flat)
        own[order] = np.diff(flat[order], prepend=0.0)
        flat = own
    return np.maximum(flat, 0.0).reshape(np.shape(score))


def nothing(context: Context, role: str, budget: Budget) -> SurgeonError:
    """Returns the refusal of a role of which nothing can go."""
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
