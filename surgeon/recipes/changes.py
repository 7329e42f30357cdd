"""What a caller says beside a recipe, which holds in place of what the recipe says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgeon.emit.lowbit.scheme import scheme_of
from surgeon.errors import Code, SurgeonError
from surgeon.recipes.schema import (
    QuantizeKeys,
    Recipe,
    ScheduleKeys,
    SourceKeys,
    Step,
    VocabularyKeys,
    misplaced,
)


@dataclass(frozen=True)
class Named:
    """Passes of one kind: their names, and options that all of them get.

    Attributes:
        names: in place of the recipe's passes of this kind; None keeps those.
        options: of the named passes, or, where none is named, beside those of the recipe's.
    """

    names: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def applied(self, kind: str, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        """Returns the passes of this kind after the change."""
        if self.names is None:
            return tuple(_with(own, self.options) for own in steps)
        return tuple(step(kind, name, dict(self.options)) for name in self.names)


def _words(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def step(kind: Any, name: str, options: dict[str, Any]) -> Step:
    """Returns a pass by name; its options are checked where it is built."""
    return Step.model_construct(kind=kind, name=name, options=options)


def _with(before: Step, options: Mapping[str, Any]) -> Step:
    if not options:
        return before
    # Hyphens and underscores are the same in a pass's option; one may stand in for the other.
    own = {key.replace("-", "_"): value for key, value in before.options.items()}
    given = {key.replace("-", "_"): value for key, value in options.items()}
    return step(before.kind, before.name, {**own, **given})


@dataclass(frozen=True)
class Changes:
    """What holds in place of what a recipe says; None leaves it as it is.

    Attributes:
        budget: by key of a recipe's budget. What is by name (roles, limits, multiples) is added
            to the recipe's; the rest replaces.
        calibration: by key of a recipe's calibration.
        passes: by place (`surgeon.recipes.schema.PLACES`): a kind of pass, or `then`.
        schedule: by key of a recipe's schedule; a recipe without one gets one.
        target: of the result.
        seed: for passes and calibration windows.
        model: what the recipe is for.
        vocabulary: by key of a recipe's vocabulary; empty for none.
        quantize: by key of a recipe's section of that name; the scheme `none` takes it away.
    """

    budget: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    passes: Mapping[str, Named] = field(default_factory=dict[str, Named])
    schedule: Mapping[str, Any] = field(default_factory=dict[str, Any])
    target: str | None = None
    seed: int | None = None
    model: str | None = None
    vocabulary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    quantize: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def applied(self, recipe: Recipe) -> Recipe:
        """Returns the recipe with these changes.

        Raises:
            SurgeonError: `bad-option` where its passes no longer belong together.
        """
        budget = {key: value for key, value in self.budget.items() if value not in (None, {})}
        for key in ("roles", "limits", "multiple_of"):
            if key in budget:
                budget[key] = {**getattr(recipe.budget, key), **budget[key]}
        for key in ("freeze", "only"):
            if key in budget:
                budget[key] = _words(budget[key])
        data = {key: value for key, value in self.calibration.items() if value is not None}
        # A text in place of saved statistics, or the other way round.
        if "sources" in data:
            data["statistics"] = None
        elif "statistics" in data and recipe.calibration.sources:
            data["sources"] = ()
        steps = [
            made
            for place, own in recipe.placed.items()
            for made in self.passes.get(place, Named()).applied(
                "transform" if place == "then" else place, own
            )
        ]
        why = misplaced([made.kind for made in steps]) if steps else "no pass is left"
        if why is not None:
            raise SurgeonError(
                Code.BAD_OPTION,
                "these passes don't make a recipe",
                at=", ".join(f"{made.kind} {made.name}" for made in steps) or "--transform none",
                why=why,
                try_="a score and a selection, both or neither; or another recipe",
            )
        top = {"target": self.target, "seed": self.seed, "model": self.model}
        updates: dict[str, Any] = {key: value for key, value in top.items() if value is not None}
        updates["passes"] = tuple(steps)
        tokens = {key: value for key, value in self.vocabulary.items() if value is not None}
        if tokens:
            updates["vocabulary"] = _vocabulary(recipe, tokens)
        if self.quantize:
            updates["quantize"] = _quantize(recipe.quantize, self.quantize)
        if budget:
            updates["budget"] = recipe.budget.model_copy(update=budget)
        if data:
            updates["calibration"] = recipe.calibration.model_copy(update=data)
        rounds = {key: value for key, value in self.schedule.items() if value is not None}
        if rounds:
            updates["schedule"] = _schedule(recipe.schedule, rounds)
        return recipe.model_copy(update=updates)


def _vocabulary(recipe: Recipe, keys: Mapping[str, Any]) -> VocabularyKeys:
    """Returns which tokens stay, checked as a recipe's file is.

    Raises:
        SurgeonError: `bad-recipe`, with the key.
    """
    from surgeon.recipes import from_data

    before = {} if recipe.vocabulary is None else recipe.vocabulary.model_dump(exclude_unset=True)
    if "keep" in keys or "coverage" in keys:  # one stands in for the other
        before = {k: v for k, v in before.items() if k not in ("keep", "coverage")}
    given = dict(keys)
    if isinstance(given.get("corpus"), str | Path):
        given["corpus"] = (given["corpus"],)
    if "corpus" in given:
        given["corpus"] = [str(source) for source in given["corpus"]]
    data = {**recipe.to_data(), "vocabulary": {**before, **given}}
    found = from_data(data, "the options").vocabulary
    assert found is not None
    return found


def _schedule(before: ScheduleKeys | None, given: Mapping[str, Any]) -> ScheduleKeys:
    """Returns a schedule with some keys replaced.

    Raises:
        SurgeonError: `bad-option` for a key that there isn't, or a value that means nothing.
    """
    from pydantic import ValidationError

    own = {} if before is None else before.model_dump(exclude_unset=True)
    try:
        return ScheduleKeys.model_validate({**own, **given})
    except ValidationError as error:
        found = error.errors()[0]
        key = str(found["loc"][0]) if found["loc"] else "schedule"
        raise SurgeonError(
            Code.BAD_OPTION,
            f"'{key}' is not usable" if key in given else f"'{key}' is missing",
            at=f"schedule.{key}",
            why=found["msg"],
            try_="rounds=3; stop_if_worse_than is above 1: 1.2 allows a fifth more",
        ) from error


def _quantize(before: QuantizeKeys | None, given: Mapping[str, Any]) -> QuantizeKeys | None:
    """Returns what is asked for; another scheme than the recipe's starts from its own defaults."""
    if given.get("scheme") == "none" and len(given) == 1:
        return None
    own = {} if before is None else before.model_dump(exclude_none=True, exclude_unset=True)
    kept = own if given.get("scheme", own.get("scheme")) == own.get("scheme") else {}
    keys = {**kept, **{key: value for key, value in given.items() if value is not None}}
    scheme_of(keys)  # refuses, in the words of the option
    return QuantizeKeys(**keys)


def calibration_of(data: Any) -> dict[str, Any]:
    """Returns the keys of a recipe's calibration that say what these data are.

    Token ids have no name that could be read again: a recipe that says so is refused when it runs.

    Args:
        data: a `surgeon.calibrate.data.Recipe`, or None.
    """
    if data is None:
        return {}
    sources = tuple(SourceKeys(source=p.name, weight=float(p.weight)) for p in data.pieces)
    return {
        "sources": sources,
        "samples": data.samples,
        "length": data.length,
        "seed": data.seed,
    }


def two_sources() -> SurgeonError:
    """Returns the refusal of data and statistics at once."""
    return SurgeonError(
        Code.BAD_OPTION,
        "statistics stand in place of calibration data",
        at="--statistics with --calibration",
        why="only one of both can be what passes look at",
        try_="leave one of them out",
    )
