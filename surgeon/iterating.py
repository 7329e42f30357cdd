"""Round after round: prune a little, calibrate on what is left, go on until all of it is gone.

Every round's plan is told in indices of the original model, so that the result is one plan like any
other. What a finished round leaves is a checkpoint of its own, from which an interrupted run goes
on.

Reference: Han et al., Learning both Weights and Connections for Efficient Neural Networks, 2015
(iterative pruning); Zhu and Gupta, To Prune, or Not to Prune, 2017, eq. 1 (the cubic schedule).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes
from surgeon.axes.budget import Budget
from surgeon.effects import PassResult
from surgeon.errors import Code, SurgeonError
from surgeon.judging import Hooks, Quality, Verdict, judge_of
from surgeon.opening import Model
from surgeon.planning import Passes, planned, windows_of
from surgeon.rounds import State, ground_of, joined, left_of

if TYPE_CHECKING:
    from surgeon.calibrate.data import Recipe as CalibrationData
    from surgeon.calibrate.data import Windows
    from surgeon.pruned import Pruned
    from surgeon.recipes.schema import Recipe, ScheduleKeys

HELD = 8
"""One window in so many is held out where quality is watched."""


def share(schedule: ScheduleKeys, number: int) -> float:
    """Returns how much of all that is to go is gone after so many rounds, from 0 to 1."""
    rest = 1 - number / schedule.rounds
    return 1 - rest if schedule.shape == "linear" else 1 - rest**3


def remaining(origin: Axes, now: Axes, budget: Budget, part: float) -> Budget:
    """Returns what is to go of a model that has lost something, so that `part` of all is gone.

    Args:
        origin: axes of the original model.
        now: axes of what is left.
        budget: for the original model: everything that is to go.
        part: how much of it is to be gone afterwards, from 0 to 1.
    """
    axes = budget.axes & now.by_name.keys()
    branches = budget.branches & {b.name for b in now.branches}

    def still(asked: float, left: float) -> float:
        return max(0.0, 1 - (1 - asked) / left)

    def left_of_role(role: str) -> float:
        if role == "layers":
            layers = {b.layer for b in origin.branches}
            return len({b.layer for b in now.branches}) / max(1, len(layers))
        names = [a.name for a in origin.of_role(role) if a.name in axes]
        before = sum(origin.by_name[name].size for name in names)
        return sum(now.by_name[name].size for name in names) / before if before else 1.0

    ratio = None
    if budget.ratio is not None:
        whole = budget.meter(origin).whole
        there = replace(budget, axes=axes, branches=branches).meter(now).whole
        ratio = still(budget.ratio * part, there / whole)
    limits: dict[str, float] = {}
    for name in axes:
        before = origin.by_name[name]
        if (limit := budget.limit(before)) < 1:
            limits[name] = still(limit, now.by_name[name].size / before.size)
    if (limit := budget.limits.get("layers", 1.0)) < 1:
        limits["layers"] = still(limit, len(now.branches) / len(origin.branches))
    return replace(
        budget,
        ratio=ratio,
        roles={
            role: still(asked * part, left_of_role(role)) for role, asked in budget.roles.items()
        },
        axes=frozenset(axes),
        branches=frozenset(branches),
        limits=limits,
    )


def _split(
    origin: Model, data: CalibrationData, watched: bool, notes: list[str]
) -> tuple[Windows, Windows | None]:
    """Returns the windows that passes see and, where quality is watched, those held out."""
    from surgeon.calibrate.data import Windows

    if not watched:
        return windows_of(origin, data, "a pass of the schedule", notes), None
    held = max(1, data.samples // HELD)
    more = replace(data, samples=data.samples + held)
    drawn = windows_of(origin, more, "schedule.stop_if_worse_than", notes)
    # Evenly spread, as windows stand in the order of their sources.
    places = [i * len(drawn.ids) // held for i in range(held)]
    rest = [i for i in range(len(drawn.ids)) if i not in set(places)]
    return Windows(drawn.ids[rest], drawn.origin), Windows(drawn.ids[places], drawn.origin)


def iterate(
    origin: Model,
    recipe: Recipe,
    passes: Passes,
    budget: Budget,
    *,
    calibration: CalibrationData,
    keep: Keep | None = None,
    hooks: Hooks | None = None,
) -> State:
    """Returns what a schedule's rounds come to.

    Args:
        origin: the model.
        recipe: with a schedule.
        passes: the recipe's.
        budget: all that is to go.
        calibration: the data; it is drawn once, and each round computes on it anew.
        keep: where finished rounds are kept; the first one to do follows on those that are there.
        hooks: what the caller does in each round.

    Raises:
        SurgeonError: `bad-ratio` where the first round is already worse than allowed; what reading
            data and passes refuse.
    """
    schedule, hooks = recipe.schedule, hooks or Hooks()
    assert schedule is not None
    watched = schedule.stop_if_worse_than is not None and hooks.evaluate is None
    windows, quality = None, None
    said: list[str] = []
    if passes.look or watched:
        windows, held = _split(origin, calibration, watched, said)
        if held is not None and schedule.stop_if_worse_than is not None:
            quality = Quality(origin, held, schedule.stop_if_worse_than)
    judge = judge_of(quality, origin, hooks, schedule)
    state = State() if keep is None else keep.latest()
    for number in range(state.rounds + 1, schedule.rounds + 1):
        start = time.perf_counter()
        model = left_of(origin, state)
        now = remaining(origin.axes, model.axes, budget, share(schedule, number))
        if not (now.ratio or any(now.roles.values())):
            state = replace(state, rounds=number)  # the rounds before took more than their share
            continue
        made = planned(
            model,
            passes,
            now,
            calibration=windows or calibration,
            seed=recipe.seed,
            ground=ground_of(origin, state),
        )
        after, records = joined(origin, state, made.plan, made.rewrites), [*made.results]
        if hooks.train is not None:
            after, record = hooks.trained(origin, after, number)
            records.append(record)
        verdict = None if judge is None else judge(after)
        effect = {"gone": share(schedule, number), **(verdict.effect if verdict else {})}
        options = {"round": number, "of": schedule.rounds}
        result = PassResult("round", "", options, time.perf_counter() - start, effect)
        entries = [*state.entries, *(r.to_json() for r in records), result.to_json()]
        notes = tuple(dict.fromkeys([*said, *state.notes, *made.notes]))
        if verdict is not None and not verdict.good:
            return _stopped(state, number, verdict, result)
        state = replace(after, rounds=number, entries=tuple(entries), notes=notes)
        if keep is not None:
            keep.add(state)
    return state


def _stopped(state: State, number: int, verdict: Verdict, result: PassResult) -> State:
    """Returns the last good state.

    Raises:
        SurgeonError: `bad-ratio` where there is none.
    """
    if state.plan.empty:
        raise SurgeonError(
            Code.BAD_RATIO,
            "the first round is already worse than allowed",
            at="schedule.stop_if_worse_than",
            why=f"its {verdict.words}, {verdict.worst:g} is allowed",
            try_="a smaller ratio, more rounds, other passes, or a larger threshold",
            data={"value": verdict.value, "allowed": verdict.worst},
        )
    note = (
        f"stopped before round {number}, whose {verdict.words}: "
        f"this is the model after round {state.rounds}"
    )
    return replace(state, entries=(*state.entries, result.to_json()), notes=(*state.notes, note))


# --- what is kept --------------------------------------------------------------------------------


class Keep:
    """A folder of finished rounds, each a checkpoint of its own with its plan beside it.

    Args:
        folder: where they lie; it is made when the first round is finished.
        result: from a state to what is written.
        recipe: what this run is told, as data.
        fingerprint: of the model.
    """

    def __init__(
        self, folder: Path, result: Any, recipe: Mapping[str, Any], fingerprint: str
    ) -> None:
        self.folder, self.result, self.fingerprint = folder, result, fingerprint
        self.recipe = json.loads(json.dumps(recipe, default=str))

    def latest(self) -> State:
        """Returns the last finished round's state, or that of none.

        Raises:
            SurgeonError: `bad-output` where the rounds there are those of another run.
        """
        from surgeon.saving import read_plan

        found = sorted(
            (int(file.parent.name.removeprefix("round-")), file)
            for file in self.folder.glob("round-*/surgeon.json")
            if file.parent.name.removeprefix("round-").isdecimal()
        )
        if not found:
            return State()
        number, file = found[-1]
        try:
            report = json.loads(file.read_text("utf-8"))
            same = report["as_recipe"] == self.recipe
            same &= report["source"]["fingerprint"] == self.fingerprint
            entries, notes = tuple(report["recipe"]), tuple(report["notes"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._refused(f"{file.parent.name} can't be read: {error}") from error
        if not same:
            raise self._refused("its rounds are of another recipe or another model")
        plan, rewrites = read_plan(file.parent)
        return State(number, replace(plan, source=(), rewrites=()), rewrites, entries, notes)

    def add(self, state: State) -> None:
        """Keeps a finished round: complete, or not at all. The first process writes."""
        made: Pruned = self.result(state)
        made.save(self.folder / f"round-{state.rounds}", overwrite=True, verify=False)

    def _refused(self, why: str) -> SurgeonError:
        return SurgeonError(
            Code.BAD_OUTPUT,
            "there are rounds of another run",
            at=str(self.folder),
            why=why,
            try_=f"the recipe and model of that run; or remove {self.folder.name} to start anew",
        )
