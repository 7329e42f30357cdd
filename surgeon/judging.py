"""What is made of each round's model beside pruning it: training by the caller, and a verdict."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgeon.axes.plan import Plan
from surgeon.conditions import check_tensors
from surgeon.effects import PassResult, of_tensors
from surgeon.errors import Code, SurgeonError
from surgeon.opening import Model
from surgeon.rounds import State, ground_of, left_of

if TYPE_CHECKING:
    from surgeon.calibrate.data import Windows
    from surgeon.recipes.schema import ScheduleKeys


class Quality:
    """Perplexity on windows that no pass sees, relative to the dense model's.

    Args:
        origin: the original model.
        held: the windows.
        worst: the largest that will do.
    """

    def __init__(self, origin: Model, held: Windows, worst: float) -> None:
        self.held, self.worst = held, worst
        self.dense = self._loss(origin)

    def _loss(self, model: Model) -> float:
        from surgeon.calibrate.gathered import Gathered

        return Gathered(model.axes, model.read, self.held).loss(Plan())

    def of(self, model: Model) -> float:
        """Returns the model's perplexity over the dense one's."""
        return math.exp(self._loss(model) - self.dense)


@dataclass(frozen=True)
class Hooks:
    """What a caller does in each round.

    Attributes:
        train: gets the smaller model in fp32 and the round's number, and trains it in place.
        evaluate: gets the smaller model as it would be loaded; the less it returns the better.
        worst: the largest that will do, as `evaluate` returns it; None for what the schedule says
            relative to the dense model.
        model: from a state to the model that `evaluate` gets.
    """

    train: Callable[[Any, int], Any] | None = None
    evaluate: Callable[[Any], float] | None = None
    worst: float | None = None
    model: Callable[[State], Any] | None = None

    def trained(self, origin: Model, state: State, number: int) -> tuple[State, PassResult]:
        """Returns the state after the caller's training, and its record."""
        assert self.train is not None
        start = time.perf_counter()
        small = ground_of(origin, state).small()
        self.train(small.model, number)
        learnt = check_tensors(origin.axes, "train_fn", small.learnt())
        seconds = time.perf_counter() - start
        effect = of_tensors(learnt, origin.axes, state.plan)
        record = PassResult("train", "", {"round": number}, seconds, effect)
        return replace(state, rewrites={**state.rewrites, **learnt}), record


@dataclass(frozen=True)
class Verdict:
    """How good a model is.

    Attributes:
        value: what is held against `worst`.
        worst: the largest that will do.
        words: of the value.
        effect: for the report.
    """

    value: float
    worst: float
    words: str
    effect: Mapping[str, Any]

    @property
    def good(self) -> bool:
        """Whether it will do; what is no number won't."""
        return self.value <= self.worst


Judge = Callable[[State], Verdict]


def judge_of(
    quality: Quality | None, origin: Model, hooks: Hooks, schedule: ScheduleKeys
) -> Judge | None:
    """Returns what judges a state, or None where nothing is asked for."""
    if hooks.evaluate is None:
        if quality is None:
            return None

        def by_perplexity(state: State) -> Verdict:
            value = quality.of(left_of(origin, state))
            effect = {"perplexity": math.exp(quality.dense) * value, "relative": value}
            words = f"perplexity is {value:.3f} times the dense model's"
            return Verdict(value, quality.worst, words, effect)

        return by_perplexity
    assert hooks.model is not None
    evaluate, model, dense = hooks.evaluate, hooks.model, math.nan
    relative = hooks.worst is None
    if relative:
        dense = float(evaluate(model(State())))
        if not 0 < dense < math.inf:
            raise SurgeonError(
                Code.BAD_OPTION,
                "the dense model's evaluation can't be what others are relative to",
                at="eval_fn",
                why=f"it is {dense:g}, and has to be above 0",
                try_="stop_above, which is absolute",
            )

    def by_caller(state: State) -> Verdict:
        found = float(evaluate(model(state)))
        if relative:
            worst, value = schedule.stop_if_worse_than or math.inf, found / dense
            words = f"evaluation is {value:.3f} times the dense model's"
            effect = {"evaluation": found, "relative": value}
        else:
            worst, value = hooks.worst or 0.0, found
            words, effect = f"evaluation is {value:.4g}", {"evaluation": found}
        return Verdict(value, worst, words, effect)

    return by_caller
