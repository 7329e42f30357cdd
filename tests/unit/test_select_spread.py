"""Selections by one ranking of all indices, and by how sensitive each axis is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import pytest

from passes.select.ranked import Ranked
from passes.select.sensitivity import Sensitivity
from passes.select.uniform import Uniform
from surgeon.axes import Axes, analyse
from surgeon.axes.budget import Budget, allowed, decoder_params
from surgeon.axes.costs import Costs
from surgeon.axes.plan import Plan, check, counts
from surgeon.capture.model import capture_model
from surgeon.errors import Code, SurgeonError
from surgeon.plugin import Context, GetScores
from tests import models

pytestmark = pytest.mark.slow

FFN, OTHER = "model.layers.0.mlp/ffn", "model.layers.1.mlp/ffn"
CHANNEL = 48 * 3
"""Parameters of one channel of an MLP."""


@cache
def axes_of() -> Axes:
    return analyse(capture_model(models.tiny("Llama")).program)


class Told:
    """Calibration in which each removed index of a layer costs so much."""

    def __init__(self, worth: Mapping[str, float], alike: Mapping[str, float] | None = None):
        self.worth, self.alike, self.asked = worth, alike or {}, list[Plan]()

    def loss(self, plan: Plan, rewrites: Any = None) -> float:
        self.asked.append(plan)
        shares = [(c.axis, 1 - c.count / c.size) for c in plan.cuts]
        return 3.0 + sum(
            self.worth[layer] * s for n, s in shares for layer in self.worth if layer in n
        )

    def similarity(self, branches: Iterable[str]) -> dict[str, float]:
        return {name: self.alike[name] for name in branches}


def context(calibration: Any = None) -> Context:
    return Context(axes_of(), lambda name: None, calibration=calibration)


def get(scores: Mapping[str, Any], unit: Any = "loss", cumulative: bool = False) -> GetScores:
    return GetScores(lambda names: {n: scores[n] for n in names}, unit, cumulative)


def drawn(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    out: dict[str, Any] = {}
    for axis in axes_of().axes:
        outer = (axes_of().by_name[o].size for o in axis.outer)
        out[axis.name] = rng.random((*outer, axis.size))
    return out


def budget(ratio: float | None, only: Iterable[str] = (), **more: Any) -> Budget:
    cuttable, branches = allowed(axes_of(), [], list(only))
    return Budget(
        ratio, more.pop("roles", {}), decoder_params(axes_of()), cuttable, branches, **more
    )


def removed(plan: Plan) -> tuple[int, int]:
    before, after = counts(axes_of(), plan, decoder_params(axes_of()))
    return before - after, before


def kept(plan: Plan) -> dict[str, int]:
    return {c.axis: c.count for c in plan.cuts}


# --- one ranking ---------------------------------------------------------------------------------


def test_the_lowest_of_all_channels_go() -> None:
    scores = drawn()
    plan = Ranked(roles=("ffn",)).select(context(), get(scores), budget(0.25))
    gone, total = removed(plan)
    assert abs(gone - 0.25 * total) <= CHANNEL / 2
    every = sorted(float(s) for n in (FFN, OTHER) for s in scores[n])
    threshold = every[gone // CHANNEL - 1]
    for found in plan.cuts:
        assert set(found.kept) == set(np.flatnonzero(scores[found.axis] > threshold).tolist())


def test_cumulative_scores_are_ranked_by_what_each_adds() -> None:
    scores = drawn()
    sums: dict[str, Any] = {}
    for name in (FFN, OTHER):
        rising = np.sort(scores[name])
        sums[name] = np.cumsum(rising)[np.searchsorted(rising, scores[name])]
    options = Ranked(roles=("ffn",))
    plain = options.select(context(), get(scores), budget(0.25))
    assert options.select(context(), get(sums, cumulative=True), budget(0.25)) == plain


def test_costs_count_for_what_they_save() -> None:
    """A group of heads costs ten times what a channel does, and saves thirteen times as much."""
    scores = {n: np.full_like(s, 10.0 if "kv_heads" in n else 1.0) for n, s in drawn().items()}
    roles = ("ffn", "kv_heads")
    saved = Ranked(roles=roles).select(context(), get(scores), budget(0.1))
    assert [n for n in kept(saved) if n.endswith("kv_heads")]
    plain = Ranked(roles=roles, by="score").select(context(), get(scores), budget(0.1))
    assert all(n.endswith("ffn") for n in kept(plain))


def test_scores_within_a_role_are_refused_unless_it_is_said_how_they_compare() -> None:
    scores = drawn()
    scores[FFN] = scores[FFN] * 1000
    with pytest.raises(SurgeonError) as caught:
        Ranked().select(context(), get(scores, "role"), budget(0.2))
    assert caught.value.code == Code.BAD_OPTION and "normalise" in caught.value.try_
    for option, both in (("none", False), ("mean", True), ("max", True)):
        options = Ranked(roles=("ffn",), normalise=option)  # type: ignore[arg-type]
        found = kept(options.select(context(), get(scores, "role"), budget(0.2)))
        assert (FFN in found) == both


# --- sensitivity ---------------------------------------------------------------------------------


def test_what_the_loss_is_sensitive_to_keeps_more() -> None:
    told = Told({"layers.0": 5.0, "layers.1": 1.0})
    options = Sensitivity(roles=("ffn",))
    assert options.needs == {"loss"}
    plan = options.select(context(told), get(drawn(), "role"), budget(0.25))
    gone, total = removed(plan)
    assert abs(gone - 0.25 * total) <= CHANNEL / 2
    # Softmax of -5/3 and -1/3: shares are as 1 to e^(4/3).
    lost = {n: 80 - c for n, c in kept(plan).items()}
    assert lost[OTHER] / lost[FFN] == pytest.approx(np.exp(4 / 3), rel=0.1)
    # The dense model, and each axis alone.
    assert [[c.axis for c in p.cuts] for p in told.asked] == [[], [FFN], [OTHER]]


def test_a_high_temperature_gives_all_the_same_share() -> None:
    told = Told({"layers.0": 5.0, "layers.1": 1.0})
    options = Sensitivity(roles=("ffn",), temperature=1e6)
    found = kept(options.select(context(told), get(drawn(), "role"), budget(0.25)))
    assert abs(found[FFN] - found[OTHER]) <= 1


def test_a_layer_may_be_measured_as_a_whole() -> None:
    told = Told({"layers.0": 5.0, "layers.1": 1.0})
    Sensitivity(each="layer").select(context(told), get(drawn(), "role"), budget(0.25))
    assert [len(p.cuts) for p in told.asked] == [0, 2, 2]


def test_block_influence_takes_no_loss() -> None:
    alike = {f"model.layers.{i}/{k}": 0.6 + 0.3 * i for i in (0, 1) for k in ("mlp", "attention")}
    options = Sensitivity(roles=("ffn",), by="similarity")
    assert options.needs == {"activations: similarity"}
    found = kept(options.select(context(Told({}, alike)), get(drawn()), budget(0.25)))
    assert found[FFN] > found[OTHER]


# --- all of them ---------------------------------------------------------------------------------

ALL = (
    Ranked(normalise="none"),
    Sensitivity(by="similarity"),
    Uniform(),
)
ALIKE = Told(
    {}, dict.fromkeys((f"model.layers.{i}/{k}" for i in (0, 1) for k in ("mlp", "attention")), 0.9)
)


@pytest.mark.parametrize("options", ALL, ids=lambda o: type(o).__name__)
def test_a_budget_is_kept_to(options: Any) -> None:
    asked = budget(0.3, multiple_of={"ffn": 4}, limits={"kv_heads": 0.34, FFN: 0.5})
    plan = options.select(context(ALIKE), get(drawn()), asked)
    check(axes_of(), plan)
    gone, total = removed(plan)
    assert abs(gone - 0.3 * total) <= 2 * 4 * CHANNEL
    found = kept(plan)
    assert all(n % 4 == 0 for name, n in found.items() if name.endswith("ffn"))
    assert found.get(FFN, 80) >= 40
    assert all(n >= 2 for name, n in found.items() if name.endswith("kv_heads"))


@pytest.mark.parametrize("options", ALL, ids=lambda o: type(o).__name__)
def test_flops_may_be_what_is_measured(options: Any) -> None:
    costs = Costs(axes_of())
    plan = options.select(context(ALIKE), get(drawn()), budget(0.2, measure="flops"))
    share = 1 - costs.under(plan).flops / costs.whole.flops
    assert share == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("options", ALL, ids=lambda o: type(o).__name__)
def test_a_budget_that_can_t_be_met_names_the_nearest(options: Any) -> None:
    with pytest.raises(SurgeonError) as caught:
        options.select(context(ALIKE), get(drawn()), budget(0.9, ["ffn"]))
    assert caught.value.code == Code.BAD_RATIO
    reachable = caught.value.data["reachable"]
    again = options.select(context(ALIKE), get(drawn()), budget(reachable - 1e-6, ["ffn"]))
    gone, total = removed(again)
    assert gone / total == pytest.approx(reachable, abs=CHANNEL / total)


@pytest.mark.parametrize("options", ALL, ids=lambda o: type(o).__name__)
def test_shares_by_role_are_taken_as_they_are(options: Any) -> None:
    plan = options.select(context(ALIKE), get(drawn()), budget(None, roles={"ffn": 0.25}))
    assert kept(plan) == {FFN: 60, OTHER: 60}


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (Ranked, {"roles": ()}),
        (Sensitivity, {"roles": ()}),
        (Sensitivity, {"reference": 1.0}),
        (Sensitivity, {"temperature": 0.0}),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make(**wrong)
