"""Maps as products of two: what is lost, what is saved, and how each target writes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgeon
from passes.transform._ranks import Costs, spread
from passes.transform._spectrum import spectrum
from passes.transform.low_rank import LowRank
from surgeon.axes.axes import Axes
from surgeon.axes.factors import Product, factorable, splits
from surgeon.axes.plan import Plan, Selection, check, cut
from surgeon.axes.settle import analyse
from surgeon.axes.surgery import operate
from surgeon.calibrate.data import Piece
from surgeon.calibrate.data import Recipe as Data
from surgeon.emit.layers import layer_shapes
from surgeon.errors import Code, SurgeonError
from surgeon.ir.verify import verify
from surgeon.opening import Model, open_model
from surgeon.plugin import Context
from surgeon.runtime.lower import lower
from surgeon.saving import load_transformers, read_plan
from surgeon.viewing import costs_of
from tests import models
from tests.fakes import Drawn

pytestmark = pytest.mark.slow

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"
OUT = "model.layers.1.self_attn.o_proj.weight"
TEXT = Data((Piece([3 + 7 * i % 89 for i in range(400)]),), samples=8, length=16)


@cache
def opened(name: str = "Llama") -> Model:
    return open_model(models.tiny(name))


def recipe(*before: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    budget = {"budget": {"roles": {"ffn": 0.25}}} if before else {}
    return {"version": 1, **budget, "passes": [*before, {"transform": "low_rank", **options}]}


PRUNE = ({"score": "magnitude"}, {"select": "uniform"})


@cache
def made(*, after_prune: bool = False, target: str = "transformers") -> Any:
    """A tenth of the parameters fewer, by the weights alone, of a Qwen2, which has biases."""
    told = recipe(*(PRUNE if after_prune else ()), budget=0.1, by="weights")
    return surgeon.prune(opened("Qwen2"), recipe=told, target=target, verify=False)


def context(name: str = "Llama") -> Context:
    model = opened(name)
    data: Any = Drawn(model.axes, 400)
    return Context(model.axes, model.read, calibration=data)


def error(weight: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor) -> float:
    """The mean square by which outputs differ, summed over outputs."""
    apart = (weight - other).double()
    return float(torch.trace(apart @ inputs.double() @ apart.mT))


# --- one map --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("weighed", ["weights", "inputs", "loss"])
def test_a_product_loses_the_singular_values_beyond_its_rank(
    shape: tuple[int, int], weighed: str
) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=draw, dtype=torch.float64)
    sides = [torch.randn(n, 40, generator=draw, dtype=torch.float64) for n in shape]
    outputs, inputs = (x @ x.mT for x in sides)
    found = spectrum(
        weight,
        None if weighed == "weights" else inputs,
        outputs if weighed == "loss" else None,
    )
    left = torch.linalg.cholesky(outputs).mT if weighed == "loss" else torch.eye(shape[0]).double()
    right = torch.eye(shape[1]).double()
    right = right if weighed == "weights" else torch.linalg.cholesky(inputs)
    singular = torch.linalg.svdvals(left @ weight @ right)
    for rank in (1, 4, 6):
        up, down = found.halves(rank)
        assert up.shape == (shape[0], rank)
        assert down.shape == (rank, shape[1])
        apart = (left @ (weight - up @ down) @ right).square().sum()
        lost = singular[rank:].square().sum()
        assert float(apart) == pytest.approx(float(lost), rel=1e-8, abs=1e-8)


def test_inputs_that_span_less_than_all_channels_need_no_inverse() -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 6, generator=draw, dtype=torch.float64)
    seen = torch.randn(6, 3, generator=draw, dtype=torch.float64)
    up, down = spectrum(weight, seen @ seen.mT).halves(3)
    assert torch.allclose(up @ down @ seen, weight @ seen)


def test_at_full_rank_the_model_is_what_it_was() -> None:
    model = opened("GPT2")  # its maps are stored the other way round, with biases
    axes = model.axes
    ranks = {n: min(axes.program.param[n].type.shape) for n in factorable(axes)}
    plan = check(axes, Plan(factors=tuple(ranks.items())))
    tensors: dict[str, torch.Tensor] = {}
    for name, split in splits(axes.program, ranks).items():
        u, s, v = torch.linalg.svd(model.read(name), full_matrices=False)
        tensors |= {split.rows.name: u * s, split.columns.name: v}
    ids = models.tokens(100)
    given = ids, torch.ones_like(ids), torch.arange(ids.shape[1]).expand(len(ids), -1)
    program = verify(operate(axes, plan))
    with torch.no_grad():
        before = lower(axes.program, model.read)(*given)
        after = lower(program, lambda n: tensors[n] if n in tensors else model.read(n))(*given)
    assert len(program.ops) == len(axes.program.ops) + len(ranks)
    assert float((before - after).abs().max()) <= 1e-4 * float(before.abs().max())


# --- ranks ----------------------------------------------------------------------------------------


def test_the_budget_is_met_within_a_step_and_ranks_are_highest_where_most_is_lost() -> None:
    draw = np.random.default_rng(0)
    steep, flat = np.geomspace(1, 1e-6, 40), np.ones(40)
    maps = [Costs(40, 60, e * draw.uniform(0.9, 1.1, 40)) for e in (steep, flat, steep, flat)]
    for goal in (100, 1000, 3000, 5000):
        ranks = spread(maps, goal)
        assert ranks is not None
        saved = sum(found.saved(rank) for found, rank in zip(maps, ranks, strict=True))
        assert goal <= saved < goal + 100 or all(r is None or r == 23 for r in ranks)
    assert ranks is not None
    assert max(r for r in ranks[::2] if r) < min(24 if r is None else r for r in ranks[1::2])
    assert spread(maps, 4 * 2400) is None


def test_a_rank_is_the_least_that_keeps_the_energy_or_the_largest_that_saves_the_share() -> None:
    found = Costs(10, 10, np.array([5.0, 3.0, 1.0, 1.0]))
    assert [found.by_energy(share) for share in (0.5, 0.51, 0.8, 0.95)] == [1, 2, 2, 4]
    assert [found.by_ratio(ratio) for ratio in (0.5, 0.2, 0.99)] == [2, 4, 1]
    assert replace(found, step=4).by_energy(0.5) == 4
    assert [found.saved(r) for r in (None, 4)] == [0, 20]


# --- the pass -------------------------------------------------------------------------------------


def test_weighed_by_their_inputs_maps_lose_less_on_these_data() -> None:
    given = context()
    plain, aware = (LowRank(ratio=0.5, by=by).transform(given) for by in ("weights", "inputs"))
    assert plain.keys() == aware.keys()
    for name in plain:
        weight, inputs = given.weights(name), given.moments([name])[name].second
        lost = [error(weight, found[name].whole, inputs) for found in (plain, aware)]
        assert lost[1] < lost[0]
        energy = error(weight, torch.zeros_like(weight), inputs)
        assert aware[name].energy == pytest.approx(1 - lost[1] / energy, abs=1e-5)
        assert 0.4 < aware[name].rank * sum(weight.shape) / weight.numel() <= 0.5


def test_maps_stay_one_where_two_would_have_no_fewer_parameters() -> None:
    given = context()
    found = LowRank(rank=20, by="weights").transform(given)
    for name in factorable(given.axes):
        rows, columns = given.program.param[name].type.shape
        saves = 20 * (rows + columns) < rows * columns
        assert (name in found) == (saves and name != "lm_head.weight")
    assert any("stay one" in note for note in given.notes)
    assert not LowRank(energy=0.9999, by="weights").transform(given)


def test_the_head_becomes_two_where_that_is_asked_for() -> None:
    assert "lm_head.weight" in LowRank(rank=8, by="weights", head=True).transform(context())
    tied = open_model(models.tiny("Llama", tie_word_embeddings=True))
    with pytest.raises(SurgeonError, match="embedding"):
        LowRank(rank=8, by="weights", head=True).transform(Context(tied.axes, tied.read))


def test_what_is_frozen_or_two_already_stays() -> None:
    given = context()
    budget = replace(given.budget, params=frozenset([UP, OUT]))
    found = LowRank(rank=4, by="weights").transform(replace(given, budget=budget))
    assert set(found) == {UP, OUT}
    again = replace(given, budget=budget, factored=frozenset([UP]))
    assert set(LowRank(rank=4, by="weights").transform(again)) == {OUT}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"energy": 0.9, "rank": 3}, "it takes one of energy, ratio, budget and rank, and has"),
        ({"budget": 1.0}, "budget is 1.0"),
        ({"rank": 0}, "1 or more"),
        ({"rank": 3, "damping": 0.0}, "damping is 0.0"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(opened(), recipe=recipe(**options))
    assert caught.value.code is Code.BAD_OPTION
    assert text in f"{caught.value.what} {caught.value.why}"


def test_a_budget_that_no_rank_meets_is_refused() -> None:
    with pytest.raises(SurgeonError, match="with the lowest ranks, 14 maps would lose"):
        LowRank(budget=0.99, by="weights").transform(context())


# --- the whole ------------------------------------------------------------------------------------


def test_the_report_says_of_each_map_what_became_of_it() -> None:
    found = made().report
    assert 0.1 <= found.ratio["removed"] < 0.11
    (effect,) = (step["effect"] for step in found.recipe)
    assert (
        effect["parameters"]
        == found.parameters["decoder"]["before"] - (found.parameters["decoder"]["after"])
    )
    assert dict(made().plan.factors) == {n: f["rank"] for n, f in effect["factored"].items()}
    for name, entry in effect["factored"].items():
        rows, columns = opened("Qwen2").program.param[name].type.shape
        assert entry["after"] == entry["rank"] * (rows + columns) < entry["before"]
        assert 0 < entry["energy"] < 1
    left = costs_of(made().origin).under(made().plan)
    assert left.parameters == found.parameters["total"]["after"]


def test_a_checkpoint_loads_by_its_own_modelling_file_and_can_be_opened_again(
    tmp_path: Path,
) -> None:
    result = made(after_prune=True)
    report = result.save(tmp_path / "out")
    assert report.verification is not None
    assert report.verification["largest"] <= 1e-4
    assert report.target["remote_code"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    ranks = {name + ".weight": rank for name, rank in config["ranks"].items()}
    assert ranks == dict(result.plan.factors)
    plan, rewrites = read_plan(tmp_path / "out")
    assert plan == replace(result.plan, rewrites=plan.rewrites)
    assert set(rewrites) == set(plan.rewrites) >= set(result.selection.halves)

    again = open_model(tmp_path / "out")
    assert len(again.axes.of_role("rank")) == len(ranks)
    assert {a.size for a in again.axes.of_role("ffn")} == {60}
    loaded = load_transformers(tmp_path / "out", torch.float32)
    smaller = surgeon.prune(again, roles={"rank": 0.25}, verify=True)
    assert smaller.report.verification is not None
    assert smaller.model.config.ranks == {
        name: rank - round(rank * 0.25) for name, rank in loaded.config.ranks.items()
    }


@pytest.mark.parametrize("target", ["pt2", "onnx"])
def test_graphs_have_both_maps(tmp_path: Path, target: str) -> None:
    result = made(after_prune=True, target=target)
    assert len(result.program.ops) == len(result.origin.program.ops) + len(result.plan.factors)
    report = result.save(tmp_path / "out")  # what is written is compared with the masked model
    assert report.verification is not None
    assert report.verification["largest"] <= 1e-4


def test_a_prune_and_a_product_of_what_is_left_compose() -> None:
    result = made(after_prune=True)
    for name in result.selection.splits:
        down, up = (result.tensor(part) for part in result.selection.parts(name))
        rank = dict(result.plan.factors)[name]
        rows, columns = result.selection.shape(name)
        assert up.shape == (rows, rank)
        assert down.shape == (rank, columns)
    assert {c.count for c in result.plan.cuts} == {60}
    assert result.report.ratio["removed"] > made().report.ratio["removed"]


def test_classes_of_transformers_are_refused_before_any_work() -> None:
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(opened("GPT2"), recipe=recipe(rank=4, by="weights"))
    assert caught.value.code is Code.TARGET_REFUSED
    assert "GPT2LMHeadModel: two maps stand in place of one" in caught.value.why


def test_it_stands_last_and_in_no_schedule() -> None:
    first = {"transform": "low_rank", "rank": 4}
    told = {"version": 1, "budget": {"ratio": 0.2}, "passes": [first, *PRUNE]}
    with pytest.raises(SurgeonError, match="before the selection"):
        surgeon.prune(opened(), recipe=told)
    rounds = {**recipe(*PRUNE, rank=4), "schedule": {"rounds": 2}}
    with pytest.raises(SurgeonError, match="part of a schedule"):
        surgeon.prune(opened(), recipe=rounds)


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "text"),
    [
        ((("nothing.weight", 3),), "no such parameter"),
        (((UP, 0),), "its rank is from 1 to 48"),
        (((UP, 49),), "its rank is from 1 to 48"),
        ((("model.embed_tokens.weight", 3),), "no matrix"),
        (((UP, 3),), "it isn't there"),
    ],
)
def test_plans_that_fit_no_model_are_refused(
    factors: tuple[tuple[str, int], ...], text: str
) -> None:
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(opened(), plan=Plan(factors=factors))
    assert text in caught.value.why


def test_plans_with_ranks_are_read_back_and_others_are_written_as_ever() -> None:
    plan = Plan(factors=((UP, 3),))
    assert Plan.from_json(plan.to_json()) == plan
    assert "factors" not in Plan().to_json()


def test_new_names_are_those_of_no_parameter() -> None:
    axes: Axes = opened().axes
    taken = UP.replace("weight", "down.weight")
    program = axes.program
    renamed = tuple(replace(p, name=taken) if p.name == OUT else p for p in program.params)
    found = splits(replace(program, params=renamed), {UP: 3})[UP]
    assert found.down.name == UP.replace("weight", "down_.weight")
    assert found.up.name == UP.replace("weight", "up.weight")


def test_the_axis_between_two_maps_has_the_role_rank() -> None:
    model = opened()
    axes = analyse(operate(model.axes, Plan(factors=((DOWN, 3), (UP, 5), (OUT, 7)))))
    assert sorted(a.size for a in axes.of_role("rank")) == [3, 5, 7]
    assert [a.size for a in axes.of_role("ffn")] == [80, 80]
    assert [shape.widths for shape in layer_shapes(axes, Plan())] == [
        shape.widths for shape in layer_shapes(model.axes, Plan())
    ]


def test_a_product_keeps_its_rows_and_columns_beside_a_cut() -> None:
    model = opened()
    axis = next(a for a in model.axes.of_role("ffn") if "layers.0" in a.name)
    plan = check(model.axes, Plan((cut(axis, range(0, 80, 2)),), factors=((UP, 5),)))
    selection = Selection(model.axes, plan)
    down, up = selection.parts(UP)
    assert (selection.shape(down), selection.shape(up)) == ((5, 48), (40, 5))
    assert Product(torch.ones(80, 5), torch.ones(5, 48)).whole.shape == (80, 48)
