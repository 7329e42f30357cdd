"""Passes that look at activations: against brute force, and through the whole of a prune."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

import surgeon
from passes._refit import refitted
from passes.compensate.least_squares import LeastSquares
from passes.score.obs import OptimalBrainSurgeon
from surgeon.axes.consumers import consumers
from surgeon.axes.plan import Plan, cut
from surgeon.calibrate.data import Piece, Recipe, Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.opening import Model, open_model
from surgeon.plugin import Context
from tests import models
from tests.masking import masked_logits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

DATA = Recipe((Piece(list(np.random.default_rng(0).integers(3, 100, 400))),), 12, 16)


@pytest.fixture(scope="module")
def llama() -> Model:
    return open_model(models.tiny("Llama"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return models.tokens(100, 12, 16)


@pytest.fixture(scope="module")
def context(llama: Model, ids: torch.Tensor) -> Context:
    data = Gathered(llama.axes, llama.read, Windows(ids.numpy()))
    return Context(llama.axes, llama.read, calibration=data)


def test_a_consumer_knows_the_columns_of_every_index(llama: Model) -> None:
    axes = llama.axes
    (down,) = consumers(axes, axes.get("model.layers.0.mlp/ffn"))
    assert down.param.endswith("down_proj.weight") and down.groups.shape == (80, 1)
    (out,) = consumers(axes, axes.get("model.layers.0.self_attn/kv_heads"))
    assert out.param.endswith("o_proj.weight")
    assert np.array_equal(out.groups, np.arange(48).reshape(3, 16))
    (inner,) = consumers(axes, axes.get("model.layers.0.self_attn/q_per_kv"))
    assert np.array_equal(inner.groups, np.arange(48).reshape(3, 2, 8))


# --- optimal brain surgeon -----------------------------------------------------------------------


def least_error(weight: torch.Tensor, second: torch.Tensor, gone: Sequence[int]) -> float:
    """What is left of the output's change when the other columns are chosen best: by solving."""
    kept = [i for i in range(len(second)) if i not in set(gone)]
    best = torch.linalg.solve(second[kept][:, kept], second[kept] @ weight.T).T
    change = weight.clone()
    change[:, kept] -= best
    return float((change @ second * change).sum())


def eliminated(weight: torch.Tensor, second: torch.Tensor, groups: Any, batch: int) -> Any:
    from passes.score.obs import _eliminate

    return _eliminate(weight, torch.linalg.inv(second), torch.as_tensor(groups), batch).numpy()


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(200, 8, generator=draw, dtype=torch.float64)
    x[:, 1] += 2 * x[:, 0]
    return torch.randn(5, 8, generator=draw, dtype=torch.float64), x.T @ x / 200


def test_the_first_index_to_go_is_the_one_that_can_best_be_made_up_for(problem: Any) -> None:
    weight, second = problem
    scores = eliminated(weight, second, [[i] for i in range(8)], 1)
    alone = [least_error(weight, second, [i]) for i in range(8)]
    first = int(np.argmin(alone))
    assert int(scores.argmin()) == first and scores[first] == pytest.approx(alone[first], rel=1e-9)


def test_costs_add_up_to_the_error_of_all_that_went(problem: Any) -> None:
    weight, second = problem
    scores = eliminated(weight, second, [[i] for i in range(8)], 1)
    order = scores.argsort()
    for count in range(1, 8):
        error = least_error(weight, second, order[:count].tolist())
        assert scores[order[count - 1]] == pytest.approx(error, rel=1e-6)


def test_groups_of_columns_go_together(problem: Any) -> None:
    weight, second = problem
    groups = [[0, 4], [1, 5], [2, 6], [3, 7]]
    scores = eliminated(weight, second, groups, 1)
    errors = [least_error(weight, second, g) for g in groups]
    assert int(scores.argmin()) == int(np.argmin(errors))
    assert scores.min() == pytest.approx(min(errors), rel=1e-9)


def test_greedy_elimination_is_near_the_best_of_all_choices(problem: Any) -> None:
    weight, second = problem
    order = eliminated(weight, second, [[i] for i in range(8)], 1).argsort()[:3].tolist()
    best = min(least_error(weight, second, list(c)) for c in combinations(range(8), 3))
    assert least_error(weight, second, order) <= 1.5 * best


def test_it_scores_every_axis_that_a_map_is_summed_over(context: Context) -> None:
    names = [a.name for a in context.axes.axes if a.role in ("ffn", "kv_heads", "q_per_kv", "v")]
    found = OptimalBrainSurgeon().score(_asked(context, names))
    for name in names:
        axis = context.axes.get(name)
        outer = tuple(context.axes.get(n).size for n in axis.outer)
        assert found[name].shape == (*outer, axis.size) and np.isfinite(found[name]).all()


def test_each_of_a_few_heads_has_a_cost_of_its_own(context: Context) -> None:
    name = "model.layers.0.self_attn/kv_heads"
    one, many = (
        OptimalBrainSurgeon(batch=batch).score(_asked(context, [name]))[name] for batch in (1, 16)
    )
    assert len(set(many.tolist())) == 3 and np.array_equal(one, many)


def _asked(context: Context, names: Sequence[str]) -> Context:
    from dataclasses import replace

    return replace(context, targets=tuple(names))


# --- least squares -------------------------------------------------------------------------------


def test_nothing_removed_changes_nothing(context: Context, llama: Model) -> None:
    plan = Plan((cut(llama.axes.get("model.layers.0.mlp/ffn"), range(80)),))
    found = LeastSquares().compensate(context, plan)
    (name,) = found
    torch.testing.assert_close(found[name], llama.read(name), rtol=1e-3, atol=1e-4)


def test_it_brings_the_logits_nearer(context: Context, llama: Model, ids: torch.Tensor) -> None:
    cuts = [cut(a, range(0, 80, 2)) for a in llama.axes.of_role("ffn")]
    plan = Plan(tuple(cuts))
    found = LeastSquares().compensate(context, plan)
    assert len(found) == len(cuts)
    dense = masked_logits(llama, {}, Plan(), ids)
    without = float((masked_logits(llama, {}, plan, ids) - dense).square().mean())
    mended = float((masked_logits(llama, found, plan, ids) - dense).square().mean())
    assert mended < 0.7 * without


def test_the_ridge_holds_weights_where_they_were(context: Context, llama: Model) -> None:
    axis = llama.axes.get("model.layers.0.mlp/ffn")
    plan = Plan((cut(axis, range(40)),))
    (stiff,) = LeastSquares(ridge=1e6).compensate(context, plan).values()
    old = llama.read("model.layers.0.mlp.down_proj.weight")
    torch.testing.assert_close(stiff[:, :40], old[:, :40], rtol=1e-3, atol=1e-4)


def test_a_ridge_that_cannot_hold_a_singular_moment_is_refused() -> None:
    weight, second = torch.randn(2, 3), torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(surgeon.SurgeonError, match="can't be solved for") as caught:
        refitted(weight, 1, None, second, second, 1e-20)
    assert caught.value.at == "ridge: 1e-20"
    assert torch.isfinite(refitted(weight, 1, None, second, second, 1e-6)).all()


# --- the whole way -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen3"])
def test_a_calibrated_prune_is_verified_and_records_itself(name: str) -> None:
    pruned = surgeon.prune(
        models.tiny(name), ratio=0.2, score="obs", compensate=["least_squares"], calibration=DATA
    )
    kinds = [entry["pass"] for entry in pruned.report.recipe]
    assert kinds == ["calibration", "score/obs", "select/uniform", "compensate/least_squares"]
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-4
    assert pruned.rewrites


def test_the_same_seed_gives_the_same_plan() -> None:
    def once(seed: int) -> Any:
        recipe = Recipe(DATA.pieces, 6, 16, seed)
        made = surgeon.prune(
            models.tiny("Llama"), ratio=0.2, score="obs", calibration=recipe, verify=False
        )
        return made.plan.cuts

    assert once(0) == once(0) != once(1)


def test_a_pass_that_needs_data_says_so() -> None:
    with pytest.raises(surgeon.SurgeonError) as caught:
        surgeon.prune(models.tiny("Llama"), ratio=0.2, score="obs")
    assert "--calibration" in caught.value.try_
