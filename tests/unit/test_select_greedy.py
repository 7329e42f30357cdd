"""Greedy depth: after every step what is left is measured with what is gone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.select.greedy import Greedy
from surgeon.axes import Axes, analyse
from surgeon.axes.budget import Budget, allowed, decoder_params
from surgeon.axes.plan import check, counts
from surgeon.capture.model import capture_model
from surgeon.errors import Code, SurgeonError
from surgeon.plugin import Context, GetScores, Plan
from tests import models

LAYERS = 4


@cache
def axes_of() -> Axes:
    return analyse(capture_model(models.tiny("Llama", num_hidden_layers=LAYERS)).program)


def branch(layer: int, kind: str) -> str:
    return f"model.layers.{layer}/{kind}"


def budget(ratio: float | None, **more: Any) -> Budget:
    axes = axes_of()
    names, branches = allowed(axes, [], [])
    return Budget(ratio, more.pop("roles", {}), decoder_params(axes), names, branches, **more)


class Told:
    """Calibration that knows how far predictions move, whatever is missing."""

    def __init__(self, moved: Callable[[Collection[str]], float]) -> None:
        self.moved, self.asked = moved, list[list[Plan]]()

    def divergences(self, trials: Any) -> list[Any]:
        plans = [plan for plan, given in trials if given("any parameter") is None]
        self.asked.append(plans)
        return [SimpleNamespace(mean=self.moved(p.branches), deviation=9.0) for p in plans]


def chosen(told: Any, made: Greedy, asked: Budget) -> Plan:
    context = Context(axes_of(), lambda name: None, calibration=told)
    draw = np.random.default_rng(0)
    known = {a.name: draw.random(a.size) for a in axes_of().axes}
    known |= {b.name: np.asarray(1.0) for b in axes_of().branches}
    scores = GetScores(lambda names: {name: known[name] for name in names}, "role", False)
    return check(axes_of(), made.select(context, scores, asked))


def share(plan: Plan) -> float:
    before, after = counts(axes_of(), plan, decoder_params(axes_of()))
    return 1 - after / before


def size(*dropped: str) -> float:
    return share(Plan(branches=dropped))


NAMES = [branch(i, kind) for i in range(LAYERS) for kind in ("attention", "mlp")]


def test_what_one_branch_makes_up_for_is_not_dropped_with_it() -> None:
    """Either of the first two MLPs is missed little, both together much."""
    pair, third = {branch(0, "mlp"), branch(1, "mlp")}, branch(2, "mlp")

    def moved(gone: Collection[str]) -> float:
        each = {**dict.fromkeys(NAMES, 50.0), branch(0, "mlp"): 0.1, branch(1, "mlp"): 0.2}
        return sum((each | {third: 1.0})[n] for n in gone) + 80.0 * pair.issubset(gone)

    plan = chosen(Told(moved), Greedy(), budget(size(branch(0, "mlp"), third)))
    assert set(plan.branches) == {branch(0, "mlp"), third}


def test_a_branch_goes_for_what_it_saves() -> None:
    """An attention moves predictions less than an MLP, and saves less still."""
    assert size(branch(0, "mlp")) > 1.5 * size(branch(0, "attention"))
    each = {name: 1.5 if "mlp" in name else 1.0 for name in NAMES}
    told = Told(lambda gone: sum(each[n] for n in gone))
    plan = chosen(told, Greedy(), budget(size(branch(0, "mlp"))))
    assert [name.split("/")[1] for name in plan.branches] == ["mlp"]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.floats(0.02, 0.7), st.sampled_from(["branch", "layer"]))
def test_no_other_step_was_better_where_all_is_measured_anew(
    seed: int, ratio: float, each: Any
) -> None:
    """Brute force: from nothing to the plan, by the best rate among what brings it nearer."""
    draw = np.random.default_rng(seed)
    alone, both = draw.random(len(NAMES)), draw.random((len(NAMES), len(NAMES)))

    def moved(gone: Collection[str]) -> float:
        at = [NAMES.index(name) for name in gone]
        return float(alone[at].sum() + both[np.ix_(at, at)].sum())

    told = Told(moved)
    plan = chosen(told, Greedy(each, again=99, max_share=1.0), budget(ratio))
    units = (
        [(n,) for n in NAMES] if each == "branch" else [*zip(NAMES[::2], NAMES[1::2], strict=True)]
    )
    gone: tuple[str, ...] = ()
    while True:
        off = ratio - size(*gone)
        steps = [(*gone, *u) for u in units if not set(u) & set(gone)]
        steps = [s for s in steps if abs(ratio - size(*s)) < off]
        if not steps:
            break
        before, now = moved(gone), gone
        gone = min(steps, key=lambda s: (moved(s) - before) / (size(*s) - size(*now)))
    assert set(plan.branches) == set(gone)


def test_only_what_looked_best_is_measured_again() -> None:
    told = Told(lambda gone: sum(1.0 + NAMES.index(n) for n in gone))
    plan = chosen(told, Greedy(again=2), budget(0.4))
    first, *later = [[p.branches for p in plans] for plans in told.asked]
    assert sorted(first) == sorted((name,) for name in NAMES)
    assert later and all(len(found) <= 2 for found in later)
    assert all(set(found[0][:-1]) < set(plan.branches) for found in later)


def test_limits_hold_by_kind_and_what_can_not_be_reached_is_refused() -> None:
    told = Told(lambda gone: sum("attention" in n for n in gone))
    plan = chosen(told, Greedy(max_share=0.5), budget(0.45))
    kinds = [name.split("/")[1] for name in plan.branches]
    assert kinds.count("mlp") == 2
    with pytest.raises(SurgeonError) as caught:
        chosen(told, Greedy(max_share=0.5), budget(0.8))
    assert caught.value.code is Code.BAD_RATIO
    assert caught.value.data["reachable"] == pytest.approx(0.5)
    with pytest.raises(SurgeonError) as caught:
        chosen(told, Greedy(), budget(0.3, limits={"layers": 0.0}))
    assert caught.value.code is Code.BAD_RATIO


def test_widths_asked_for_by_role_count_and_are_measured_with_what_goes() -> None:
    told = Told(lambda gone: float(len(gone)))
    asked = budget(0.4, roles={"ffn": 0.25})
    plan = chosen(told, Greedy(), asked)
    assert all(p.cuts == plan.cuts != () for plans in told.asked for p in plans)
    assert share(plan) == pytest.approx(0.4, abs=size(NAMES[0]) / 2)
    with pytest.raises(SurgeonError) as caught:
        chosen(told, Greedy(), budget(0.05, roles={"ffn": 0.5}))
    assert caught.value.code is Code.BAD_RATIO
    assert chosen(told, Greedy(), budget(None, roles={"ffn": 0.5})).branches == ()


def test_layers_by_role_leave_nothing_to_choose() -> None:
    with pytest.raises(SurgeonError) as caught:
        chosen(Told(lambda gone: 0.0), Greedy(), budget(0.6, roles={"layers": 0.25}))
    assert caught.value.code is Code.BAD_OPTION


@pytest.mark.parametrize("options", [{"again": 0}, {"max_share": 0.0}, {"max_share": float("nan")}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Greedy(**options)
