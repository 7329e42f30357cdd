"""From a model, passes and a budget to a plan and the tensors that belong to it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes
from surgeon.axes.budget import Budget
from surgeon.axes.plan import Plan
from surgeon.errors import Code, SurgeonError, no_weights
from surgeon.opening import Model
from surgeon.plugin import Calibration, Context, GetScores
from surgeon.registry import build

if TYPE_CHECKING:
    from surgeon.calibrate.data import Recipe

Named = tuple[str, Mapping[str, Any]]
"""A pass by name, and its options."""


@dataclass(frozen=True)
class Passes:
    """The passes of one prune, built: each with its name."""

    score: tuple[str, Any]
    select: tuple[str, Any]
    compensate: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, score: Named, select: Named, compensate: Iterable[Named] = ()) -> Passes:
        """Returns the passes of these names.

        Raises:
            SurgeonError: `no-such-pass`, or `bad-option` for one that a pass hasn't.
        """
        return cls(
            (score[0], build("score", *score)),
            (select[0], build("select", *select)),
            tuple((named[0], build("compensate", *named)) for named in compensate),
        )

    @property
    def every(self) -> tuple[Any, ...]:
        """All of them, in the order in which they run."""
        return (self.score[1], self.select[1], *(made for _, made in self.compensate))


def planned(
    origin: Model,
    passes: Passes,
    budget: Budget,
    record: list[dict[str, Any]],
    *,
    calibration: Recipe | None = None,
    seed: int = 0,
    notes: list[str] | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """Returns the plan, and the tensors that replace others before it is applied.

    Args:
        origin: the model.
        passes: what scores, selects and compensates.
        budget: how much is to go, and from where.
        record: gets an entry for every pass: its name, options and seconds.
        calibration: the data for passes that need activations.
        seed: for passes that draw at random.
        notes: gets what passes have to say.

    Raises:
        SurgeonError: `bad-option` where a pass needs data and there is none; what passes refuse.
    """
    data = _calibration(origin, passes, calibration, record)
    notes = [] if notes is None else notes
    context = Context(origin.axes, origin.read, seed=seed, notes=notes, calibration=data)
    plan = _select(context, budget, passes, record)
    return plan, _compensate(context, plan, passes, record)


def _calibration(
    origin: Model, passes: Passes, recipe: Recipe | None, record: list[dict[str, Any]]
) -> Calibration | None:
    """Returns the calibration data that passes need, or None where none of them needs any."""
    needy = [p for p in passes.every if any(need.startswith("activations") for need in p.needs)]
    if not needy:
        return None
    if recipe is None:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{type(needy[0]).__name__} needs calibration data",
            at="--calibration",
            why="it looks at what the model computes on a text, and none was given",
            try_="--calibration FILE, with some hundred kilobytes of text as the model will see",
        )
    if origin.tensors is None:
        raise no_weights(origin.id)
    from surgeon.calibrate.data import draw
    from surgeon.calibrate.gathered import Gathered

    source = origin.source
    vocab = int(source.config.vocab_size) if source else None
    windows = draw(recipe, source.load_tokenizer() if source else None, vocab=vocab)
    samples, length = windows.ids.shape
    options = {"samples": samples, "length": length, "seed": recipe.seed}
    record.append({"pass": "calibration", "options": options, "data": dict(windows.origin)})
    return Gathered(origin.axes, origin.read, windows)


def _compensate(
    context: Context,
    plan: Plan,
    passes: Passes,
    record: list[dict[str, Any]],
) -> dict[str, Any]:
    """Returns the tensors that make up for a plan; each pass sees those of the ones before it."""
    found: dict[str, Any] = {}
    for name, mender in passes.compensate:
        start = time.perf_counter()
        made = mender.compensate(context, plan)
        for param, tensor in made.items():
            shape = context.program.param[param].type.shape
            if tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
                raise SurgeonError(
                    Code.BAD_PLAN,
                    f"compensate/{name} gave no usable tensor for {param}",
                    at=param,
                    why=f"it must be finite and of shape {list(shape)}",
                    try_="more calibration data, or a larger ridge",
                )
        found.update(made)
        spent = time.perf_counter() - start
        options = asdict(mender)
        record.append({"pass": f"compensate/{name}", "options": options, "seconds": spent})
    return found


def _select(
    context: Context,
    budget: Budget,
    passes: Passes,
    record: list[dict[str, Any]],
) -> Plan:
    (score, scorer), (select, selector) = passes.score, passes.select
    axes = context.axes
    spent = [0.0]

    def scores(names: Iterable[str]) -> Mapping[str, Any]:
        begin = time.perf_counter()
        wanted = tuple(names)
        found = scorer.score(replace(context, targets=wanted))
        _check_scores(axes, score, wanted, found)
        spent[0] += time.perf_counter() - begin
        return found

    start = time.perf_counter()
    plan = selector.select(context, GetScores(scores, scorer.unit, scorer.cumulative), budget)
    whole = time.perf_counter() - start
    record.append({"pass": f"score/{score}", "options": asdict(scorer), "seconds": spent[0]})
    options = {**asdict(selector), "ratio": budget.ratio, "roles": dict(budget.roles)}
    record.append({"pass": f"select/{select}", "options": options, "seconds": whole - spent[0]})
    return plan


def _check_scores(axes: Axes, name: str, wanted: tuple[str, ...], found: Mapping[str, Any]) -> None:
    import numpy as np

    for target in wanted:
        array = found.get(target)
        axis = axes.by_name.get(target)
        ok = array is not None and bool(np.isfinite(array).all())
        if array is not None and ok and axis is not None:
            outer = tuple(axes.by_name[o].size for o in axis.outer)
            ok = array.shape in ((axis.size,), (*outer, axis.size))
        if not ok:
            raise SurgeonError(
                Code.BAD_PLAN,
                f"score/{name} gave no usable scores for {target}",
                at=target,
                why="scores must be finite numbers, one for each index",
                try_="check the weights for NaN, and the pass",
            )
