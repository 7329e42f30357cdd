"""What each pass did: the record that a result keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any, Literal

import numpy as np

from surgeon.axes.axes import Axes
from surgeon.axes.factors import Product
from surgeon.axes.plan import Plan, counts


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        kind: of the pass; `calibration` and `round` are the driver's own steps.
        name: of the pass; empty for the driver's steps.
        options: all of them, defaults included.
        seconds: of wall time; a score's are not counted in the selection that asked for it.
        effect: by what it is called: indices `removed` by role, `branches` dropped, `parameters`
            removed, `predicted_loss` (by how much the scores say that the mean negative
            log-likelihood grows), tensors `replaced`, maps `factored`, …
        notes: what the pass had to say.
    """

    kind: str
    name: str
    options: Mapping[str, Any]
    seconds: float
    effect: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Kind and name, as a report calls it."""
        return f"{self.kind}/{self.name}" if self.name else self.kind

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of a report's `recipe`."""
        return {
            "pass": self.label,
            "options": dict(self.options),
            "seconds": self.seconds,
            "effect": dict(self.effect),
            "notes": list(self.notes),
        }


def options_of(made: Any) -> dict[str, Any]:
    """Returns the options that a pass was built with."""
    return asdict(made)


def of_scores(scores: Mapping[str, Any], axes: Axes) -> dict[str, Any]:
    """Returns how many axes and branches were scored."""
    over = sum(name in axes.by_name for name in scores)
    return {"axes": over, "branches": len(scores) - over}


def of_plan(
    axes: Axes,
    plan: Plan,
    counted: tuple[str, ...],
    scores: Mapping[str, Any],
    *,
    unit: Literal["role", "loss"],
    cumulative: bool,
) -> dict[str, Any]:
    """Returns what a selection removed, and what its scores say that it costs.

    Args:
        axes: of the model.
        plan: what was selected.
        counted: the parameters that a ratio is a share of.
        scores: those that were asked for, by axis and branch.
        unit: of the scores.
        cumulative: whether a score is the cost of its index with all that score less.
    """
    removed: dict[str, int] = {}
    for found in plan.cuts:
        role = axes.get(found.axis).role
        removed[role] = removed.get(role, 0) + found.size - found.count
    before, after = counts(axes, plan, counted)
    effect: dict[str, Any] = {"removed": removed, "parameters": before - after}
    if plan.branches:
        effect["branches"] = list(plan.branches)
    if unit == "loss":
        predicted = _predicted(plan, scores, cumulative)
        if predicted is not None:
            effect["predicted_loss"] = predicted
    return effect


def _predicted(plan: Plan, scores: Mapping[str, Any], cumulative: bool) -> float | None:
    """Adds up what the removed indices cost; None where something was removed without a score."""
    names = [*(found.axis for found in plan.cuts), *plan.branches]
    if any(name not in scores for name in names):
        return None
    total = sum(float(np.asarray(scores[name])) for name in plan.branches)
    for found in plan.cuts:
        array = np.asarray(scores[found.axis], dtype=np.float64)
        kept = found.array
        gone = np.ones((*kept.shape[:-1], found.size), dtype=bool)
        np.put_along_axis(gone, kept, False, axis=-1)
        # A choice that is the same everywhere goes with every index of the axes around it.
        gone = np.broadcast_to(gone, array.shape) if array.ndim >= gone.ndim else gone
        array = np.broadcast_to(array, gone.shape)
        costs = np.where(gone, array, 0.0)
        total += float(costs.max() if cumulative else costs.sum())
    return total


def of_tensors(tensors: Mapping[str, Any], axes: Axes, plan: Plan) -> dict[str, Any]:
    """Returns how many tensors were replaced, and how many elements those have.

    Of those that became products it says the rank, the share of energy kept, and the elements
    before and after.

    Args:
        tensors: what a pass gave.
        axes: of the model.
        plan: what goes.
    """
    shapes = {n: axes.program.param[n].type.shape for n in tensors}
    effect: dict[str, Any] = {
        "replaced": len(tensors),
        "elements": sum(prod(s for s in shape if isinstance(s, int)) for shape in shapes.values()),
    }
    made = {n: found for n, found in tensors.items() if isinstance(found, Product)}
    if made:
        effect["parameters"] = 0
        effect["factored"] = {}
    now = replace(plan, factors=tuple((name, found.rank) for name, found in made.items()))
    for name, found in made.items():
        before, after = (counts(axes, p, [name])[1] for p in (plan, now))
        effect["parameters"] += before - after
        effect["factored"][name] = {
            "rank": found.rank,
            "energy": found.energy,
            "before": before,
            "after": after,
        }
    return effect
