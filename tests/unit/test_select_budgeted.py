"""Budgeted selection: against every combination of counts, and what it must keep to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.select import budgeted as module
from passes.select._shared import Asked, costs_of, plan_of
from passes.select.budgeted import Budgeted
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
KV, Q = "model.layers.0.self_attn/kv_heads", "model.layers.0.self_attn/q_per_kv"
SEARCHED = (FFN, KV, Q, OTHER)


@cache
def axes_of(name: str = "Llama") -> Axes:
    return analyse(capture_model(models.tiny(name)).program)


class Told:
    """Calibration that knows what each cut and each branch costs."""

    def __init__(self, worth: Mapping[str, float]) -> None:
        self.worth, self.asked = worth, list[Plan]()

    def loss(self, plan: Plan, rewrites: Any = None) -> float:
        self.asked.append(plan)
        gone = [(axes_of().get(c.axis).role, c.size - c.count) for c in plan.cuts]
        kinds = [(name.split("/")[-1], 1) for name in plan.branches]
        return 3.0 + sum(self.worth.get(name, 0.0) * n for name, n in (*gone, *kinds))


def context(calibration: Any = None) -> Context:
    return Context(axes_of(), lambda name: None, calibration=calibration)


def drawn(
    seed: int = 0, *, cumulative: bool = False, weight: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Scores for every axis and branch: skewed, heads worth more than channels."""
    axes, rng = axes_of(), np.random.default_rng(seed)
    weight = weight or {"kv_heads": 30.0, "q_per_kv": 15.0, "v": 2.0}
    out: dict[str, Any] = {}
    for axis in axes.axes:
        outer = (axes.by_name[o].size for o in axis.outer)
        score = rng.random((*outer, axis.size)) ** 3 * weight.get(axis.role, 1.0)
        if cumulative:
            flat = np.sort(score.reshape(-1))
            score = np.cumsum(flat)[np.searchsorted(flat, score)]
        out[axis.name] = score
    return {**out, **{b.name: np.asarray(rng.random() * 40) for b in axes.branches}}


def get(scores: Mapping[str, Any], unit: Any = "loss", *, cumulative: bool = False) -> GetScores:
    def call(names: Iterable[str]) -> dict[str, Any]:
        return {name: scores[name] for name in names}

    return GetScores(call, unit, cumulative)


def budget(ratio: float | None, names: Iterable[str] | None = SEARCHED, **more: Any) -> Budget:
    axes = axes_of()
    cuttable, branches = allowed(axes, [], [])
    names = cuttable if names is None else frozenset(names)
    return Budget(ratio, more.pop("roles", {}), decoder_params(axes), names, branches, **more)


def removed(plan: Plan) -> tuple[int, int]:
    before, after = counts(axes_of(), plan, decoder_params(axes_of()))
    return before - after, before


def predicted(plan: Plan, scores: Mapping[str, Any], *, cumulative: bool = False) -> float:
    """What a plan costs, index by index; what is in a group that goes costs nothing more."""
    costs = {n: costs_of(s, cumulative=cumulative) for n, s in scores.items()}
    groups = plan.by_axis.get(KV)
    total = 0.0
    for found in plan.cuts:
        own = costs[found.axis]
        rows = range(len(own)) if found.outer else [...]
        for row in rows:
            if found.axis == Q and groups and row not in groups.kept:
                continue
            kept = found.kept[row] if found.outer else found.kept
            total += sum(float(own[row][i]) for i in range(found.size) if i not in kept)
    return total


def kept(plan: Plan) -> dict[str, int]:
    return {c.axis: c.count for c in plan.cuts}


# --- the optimum ---------------------------------------------------------------------------------


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_no_combination_that_removes_as_much_loses_less(
    seed: int, cumulative: bool, convex: bool
) -> None:
    scores = drawn(seed, cumulative=cumulative)
    given_ = get(scores, cumulative=cumulative)
    every: list[tuple[int, float]] = []
    for numbers in product(range(8, 81, 8), (1, 2, 3), (1, 2), range(8, 81, 8)):
        plan = plan_of(context(), given_, dict(zip(SEARCHED, numbers, strict=True)))
        every.append((removed(plan)[0], predicted(plan, scores, cumulative=cumulative)))
    half = 8 * 48 * 3 / 2  # eight channels of an MLP: the finest step that there is
    options = Budgeted(convex=convex, max_share={})
    for ratio in (0.05, 0.2, 0.4):
        plan = options.select(context(), given_, budget(ratio, multiple_of={"ffn": 8}))
        gone, total = removed(plan)
        assert abs(gone - ratio * total) <= half
        found = predicted(plan, scores, cumulative=cumulative)
        enough = [loss for saved, loss in every if saved >= ratio * total]
        assert found <= min(enough) * (1 + 1e-3)


@given(st.integers(0, 20), st.lists(st.floats(0.02, 0.6), min_size=2, max_size=4))
@settings(max_examples=15, deadline=None)
def test_more_removed_is_never_less_lost(seed: int, ratios: list[float]) -> None:
    """Of channels: a cheap head may be too much for the smaller of two ratios."""
    scores, fine = drawn(seed), (FFN, OTHER)
    options = Budgeted(max_share={})
    losses = [
        predicted(options.select(context(), get(scores), budget(ratio, fine)), scores)
        for ratio in sorted({round(r, 2) for r in ratios})
    ]
    assert all(a <= b * (1 + 1e-3) for a, b in pairwise(losses))


@pytest.mark.parametrize("measure", ["parameters", "flops", "bytes", "cache_bytes"])
def test_a_ratio_of_any_measure_is_met(measure: Any) -> None:
    costs = Costs(axes_of())
    roles = ("ffn", "kv_heads", "q_per_kv", "v")
    plan = Budgeted(roles=roles).select(context(), get(drawn()), budget(0.2, None, measure=measure))
    check(axes_of(), plan)
    if measure == "parameters":
        gone, whole = removed(plan)
    else:
        whole = getattr(costs.whole, measure)
        gone = whole - getattr(costs.under(plan), measure)
    # In the cache, a step is a whole channel of every value head.
    assert gone / whole == pytest.approx(0.2, abs=0.02 if measure == "cache_bytes" else 0.002)
    if measure == "cache_bytes":
        assert not set(kept(plan)) & {FFN, OTHER}


def test_what_is_worth_nothing_goes_first() -> None:
    scores = drawn()
    for name in (FFN, OTHER):
        scores[name] = np.where(np.arange(80) % 2, 0.0, 1.0)
    plan = Budgeted().select(context(), get(scores), budget(0.15, None))
    assert kept(plan) and set(kept(plan)) <= {FFN, OTHER}
    assert all(set(range(0, 80, 2)) <= set(c.kept) for c in plan.cuts)


# --- limits --------------------------------------------------------------------------------------


def test_alignment_limits_and_shares_hold() -> None:
    asked = budget(0.3, None, multiple_of={"ffn": 16}, limits={"*layers.0.mlp*": 0.25})
    plan = Budgeted(max_share={"kv_heads": 0.34}).select(context(), get(drawn()), asked)
    found = kept(plan)
    assert all(n % 16 == 0 for name, n in found.items() if name.endswith("ffn"))
    assert found.get(FFN, 80) >= 64
    assert all(n >= 2 for name, n in found.items() if name.endswith("kv_heads"))


def test_heads_are_dealt_out_to_all_devices() -> None:
    plan = Budgeted().select(context(), get(drawn()), budget(0.4, None, tensor_parallel=2))
    found = kept(plan)
    assert {n for name, n in found.items() if name.endswith("kv_heads")} == {2}
    assert all(n % 2 == 0 for name, n in found.items() if name.endswith("ffn"))
    assert len([n for n in found if n.endswith("kv_heads")]) == 2  # three can't be


def test_frozen_axes_stay_whole() -> None:
    plan = Budgeted().select(context(), get(drawn()), budget(0.2, [FFN, KV]))
    assert set(kept(plan)) <= {FFN, KV}


def test_layers_that_must_be_alike_are() -> None:
    plan = Budgeted(alike=True).select(context(), get(drawn()), budget(0.35, None))
    by_role: dict[str, set[int]] = {}
    for found in plan.cuts:
        by_role.setdefault(axes_of().get(found.axis).role, set()).add(found.count)
    assert by_role and all(len(numbers) == 1 for numbers in by_role.values())
    assert all(len([n for n in kept(plan) if n.endswith(role)]) == 2 for role in by_role)


def test_shares_by_role_are_taken_as_they_are_and_the_ratio_fills_the_rest() -> None:
    asked = budget(0.5, None, roles={"kv_heads": 1 / 3, "hidden": 0.25})
    plan = Budgeted().select(context(), get(drawn()), asked)
    found = kept(plan)
    assert found[KV] == 2 and found["hidden"] == 36
    gone, total = removed(plan)
    assert abs(gone - 0.5 * total) <= 36 * 3 / 2
    alone = Budgeted().select(context(), get(drawn()), budget(None, None, roles={"ffn": 0.25}))
    assert kept(alone) == {FFN: 60, OTHER: 60}


@pytest.mark.parametrize("freeze", [(), ("kv_heads",)])
def test_a_budget_that_can_t_be_met_names_the_nearest(freeze: tuple[str, ...]) -> None:
    cuttable = allowed(axes_of(), list(freeze), [])[0]
    with pytest.raises(SurgeonError) as caught:
        Budgeted().select(context(), get(drawn()), budget(0.9, cuttable))
    assert caught.value.code == Code.BAD_RATIO
    reachable = caught.value.data["reachable"]
    plan = Budgeted().select(context(), get(drawn()), budget(reachable - 1e-9, cuttable))
    gone, total = removed(plan)
    assert gone / total == pytest.approx(reachable)
    assert kept(plan)[FFN] == 8  # nine tenths are the most by default


def test_roles_that_go_beyond_the_ratio_are_refused() -> None:
    with pytest.raises(SurgeonError) as caught:
        Budgeted().select(context(), get(drawn()), budget(0.05, None, roles={"kv_heads": 0.4}))
    assert caught.value.code == Code.BAD_RATIO and "beyond" in caught.value.why


def test_axes_that_run_through_the_whole_model_can_t_be_searched() -> None:
    wide = Budgeted(roles=("ffn", "kv_heads", "q_per_kv", "v", "hidden"))
    with pytest.raises(SurgeonError) as caught:
        wide.select(context(), get(drawn()), budget(0.2, None))
    assert caught.value.code == Code.BAD_OPTION and "combinations" in caught.value.why


def test_a_role_that_there_isn_t_is_refused() -> None:
    with pytest.raises(SurgeonError) as caught:
        Budgeted(roles=("fnn",)).select(context(), get(drawn()), budget(0.2, None))
    assert caught.value.code == Code.NO_SUCH_ROLE


@pytest.mark.parametrize(
    "wrong",
    [
        {"roles": ()},
        {"max_share": {"ffn": 1.5}},
        {"reference": 0.0},
        {"caution": -1.0},
        {"measure": ("hidden",)},
        {"alike": True, "roles": ("layers",)},
    ],
)
def test_options_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Budgeted(**wrong)


# --- branches ------------------------------------------------------------------------------------

DEPTH = ("ffn", "kv_heads", "layers")


def test_a_branch_that_costs_nothing_goes_with_all_that_lies_in_it() -> None:
    scores = drawn()
    scores["model.layers.1/mlp"] = np.asarray(0.0)
    plan = Budgeted(roles=DEPTH, depth="score").select(context(), get(scores), budget(0.4, None))
    assert plan.branches == ("model.layers.1/mlp",)
    assert OTHER not in kept(plan)
    gone, total = removed(plan)
    assert abs(gone - 0.4 * total) <= 48 * 3 / 2


def test_a_branch_costs_what_its_last_map_s_inputs_do() -> None:
    """An MLP that is nothing but cheap channels: dropping it whole saves its norm as well."""
    scores = drawn()
    scores[OTHER] = scores[OTHER] * 1e-6
    plan = Budgeted(roles=DEPTH).select(context(), get(scores), budget(0.4, None))
    assert plan.branches == ("model.layers.1/mlp",)
    scores[OTHER] = scores[OTHER] * 1e9
    plan = Budgeted(roles=DEPTH).select(context(), get(scores), budget(0.4, None))
    assert plan.branches != ("model.layers.1/mlp",)


def test_only_branches_that_may_go_are_dropped() -> None:
    scores = {
        n: np.zeros_like(s) if n.endswith(("mlp", "attention")) else s for n, s in drawn().items()
    }
    found = Budgeted(roles=DEPTH, depth="score").select(context(), get(scores), budget(0.5, None))
    assert sorted(n.split("/")[1] for n in found.branches) == ["attention", "mlp"]  # half of each
    held = budget(0.4, None, limits={"layers": 0})
    assert not Budgeted(roles=DEPTH, depth="score").select(context(), get(scores), held).branches


def test_the_loss_without_a_branch_can_be_measured() -> None:
    told = Told({"attention": 0.0, "mlp": 50.0})
    options = Budgeted(roles=DEPTH, depth="measured")
    assert options.needs == {"loss"}
    plan = options.select(context(told), get(drawn()), budget(0.25, None))
    assert [n.split("/")[1] for n in plan.branches] == ["attention"]


# --- scores within a role ------------------------------------------------------------------------


def test_scores_within_a_role_are_scaled_to_the_loss() -> None:
    """Heads have low scores; measured, they are what costs most."""
    scores = drawn(weight={"kv_heads": 1e-6, "q_per_kv": 1e-6})
    plain = Budgeted()
    assert not plain.needs
    told = context()
    cheap = plain.select(told, get(scores, "role"), budget(0.2, None))
    assert any(n.endswith("kv_heads") for n in kept(cheap))
    assert any("within a role" in note for note in told.notes)
    calibration = Told({"ffn": 1e-4, "kv_heads": 900.0, "q_per_kv": 900.0})
    measured = Budgeted(unit="measured")
    assert measured.needs == {"loss"}
    plan = measured.select(context(calibration), get(scores, "role"), budget(0.2, None))
    assert set(kept(plan)) == {FFN, OTHER}
    # One evaluation for the dense model and one for each role, which is cut alone.
    cut_roles = [{axes_of().get(c.axis).role for c in p.cuts} for p in calibration.asked]
    assert cut_roles == [set(), {"ffn"}, {"kv_heads"}, {"q_per_kv"}]


def widths(name: str) -> tuple[int, ...]:
    return tuple(int(n) for n in axes_of().program.param[name].type.shape)


class Diverged(Told):
    """Calibration that knows how far each cut moves predictions, and gives made-up moments."""

    def __init__(self, found: Mapping[str, tuple[float, float]]) -> None:
        super().__init__({})
        self.found, self.given = found, dict[str, Any]()

    def moments(self, params: Iterable[str], *, full: bool = True) -> Mapping[str, Any]:
        return {p: SimpleNamespace(second=torch.eye(widths(p)[1])) for p in params}

    def divergences(self, trials: Iterable[tuple[Plan, Any]]) -> tuple[Any, ...]:
        out: list[Any] = []
        for plan, give in trials:
            self.asked.append(plan)
            ((name, count),) = kept(plan).items()
            param = name.replace("/ffn", ".down_proj.weight")
            self.given[name] = (count, give(param), give("model.norm.weight"))
            out.append(SimpleNamespace(mean=self.found[name][0], deviation=self.found[name][1]))
        return tuple(out)


def test_axes_are_weighed_by_how_far_each_moves_the_predictions_cut_alone() -> None:
    """The second layer's predicted losses are as great, and what is measured decides."""
    same = {FFN: np.arange(1.0, 25.0), OTHER: np.arange(1.0, 25.0)}
    size = axes_of().get(FFN).size
    scores = {n: np.resize(s, size) for n, s in same.items()}
    told = Diverged({FFN: (0.02, 0.0), OTHER: (0.01, 0.1)})

    def chosen(caution: float) -> dict[str, int]:
        options = Budgeted(("ffn",), unit="divergence", reference=0.25, caution=caution)
        given = Context(axes_of(), lambda n: torch.ones(widths(n)), calibration=told)
        return kept(options.select(given, get(scores), budget(0.2, (FFN, OTHER))))

    mean, careful = chosen(0.0), chosen(1.0)
    assert mean.get(OTHER, size) < mean.get(FFN, size)
    assert careful.get(OTHER, size) > careful.get(FFN, size)
    count, reader, norm = told.given[FFN]
    assert count == size - round(size / 4)
    assert reader is not None and int((reader.abs().sum(0) > 0).sum()) == count
    assert norm is None


@pytest.mark.parametrize(("asked", "measured"), [(0.05, 0.1), (0.2, 0.25)])
def test_where_little_goes_little_is_cut_to_measure_it(asked: float, measured: float) -> None:
    told = Diverged({FFN: (0.02, 0.0), OTHER: (0.02, 0.0)})
    given = Context(axes_of(), lambda n: torch.ones(widths(n)), calibration=told)
    options = Budgeted(("ffn",), unit="divergence", reference=0.25)
    options.select(given, get(drawn()), budget(asked, (FFN, OTHER)))
    size = axes_of().get(FFN).size
    assert {count for count, _, _ in told.given.values()} == {size - round(measured * size)}


def test_axes_of_roles_that_are_not_measured_are_scaled_by_the_median() -> None:
    """Heads that are predicted to cost next to nothing cost a hundred times that, as MLPs do."""
    scores = drawn(weight={"kv_heads": 1e-6})
    scores[KV] = np.full_like(scores[KV], 0.001)
    told = Diverged({FFN: (100 * scores[FFN].sum(), 0.0), OTHER: (100 * scores[OTHER].sum(), 0.0)})
    given = Context(axes_of(), lambda n: torch.ones(widths(n)), calibration=told)
    options = Budgeted(("ffn", "kv_heads"), unit="divergence", measure=("ffn",), caution=0.0)
    assert options.needs == {"loss: divergence", "activations: second moment"}
    search = module._Search(options, given, get(scores), budget(0.2), Asked({}, ()))
    curves = search._curves()
    plain = Budgeted(("ffn", "kv_heads"))
    before = module._Search(plain, given, get(scores), budget(0.2), Asked({}, ()))._curves()
    factors = {n: c.whole / before[n].whole for n, c in curves.items()}
    assert set(told.given) == {FFN, OTHER}
    assert factors[KV] == pytest.approx(np.median([factors[FFN], factors[OTHER]]))
    assert factors[KV] > 100
