"""The cut of a vocabulary that a recipe asks for, beside whatever its passes remove."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING

from surgeon.axes.budget import Budget
from surgeon.axes.plan import merged
from surgeon.axes.renumber import vocabulary_axes
from surgeon.effects import PassResult
from surgeon.opening import Model
from surgeon.pruned import Pruned, report_of

if TYPE_CHECKING:
    from surgeon.recipes.schema import Recipe
    from surgeon.vocabulary.trim import Trimming


ALONE = "neither a ratio nor a role was given: nothing but the vocabulary is cut"
"""What is said where no pass is run."""


@dataclass(frozen=True)
class Trimmed:
    """A cut of the vocabulary, and the record of it."""

    found: Trimming
    record: PassResult


def only_vocabulary(recipe: Recipe) -> bool:
    """Whether a recipe cuts the vocabulary and asks its selection for nothing."""
    nothing = recipe.budget.ratio is None and not recipe.budget.roles
    return recipe.vocabulary is not None and nothing and bool(recipe.placed["select"])


def trimming_of(origin: Model, recipe: Recipe, budget: Budget) -> Trimmed | None:
    """Returns the cut of the vocabulary that a recipe asks for, None where it doesn't.

    Raises:
        SurgeonError: why it can't be made.
    """
    asked = recipe.vocabulary
    if asked is None:
        return None
    from surgeon.vocabulary.trim import Wanted, trim

    start = time.perf_counter()
    multiple = lcm(*(budget.multiple(axis) for axis in vocabulary_axes(origin.axes)))
    wanted = Wanted(asked.corpus, asked.keep, asked.coverage, asked.always, multiple)
    found = trim(origin.axes, origin.source, wanted)
    record = PassResult(
        "vocabulary",
        "",
        {**asked.model_dump(mode="json"), "multiple_of": multiple},
        time.perf_counter() - start,
        {"removed": {c.axis: c.size - c.count for c in found.plan.cuts}},
        found.notes,
    )
    return Trimmed(found, record)


def trimmed(pruned: Pruned, trimming: Trimmed | None) -> Pruned:
    """Returns a result whose vocabulary is cut as well: the passes saw all of it."""
    if trimming is None:
        return pruned
    before = pruned.report
    plan = merged([pruned.plan, trimming.found.plan])
    report = report_of(
        pruned.origin,
        plan,
        (*before.recipe, trimming.record.to_json()),
        (*before.notes, *trimming.found.notes),
        before.ratio.get("asked"),
        {**before.seconds, "vocabulary": trimming.record.seconds},
    )
    facts = {**report.vocabulary, **trimming.found.facts} if report.vocabulary else {}
    report = replace(report, as_recipe=before.as_recipe, vocabulary=facts)
    return replace(pruned, plan=plan, report=report)
