"""Scores that look at data: against sums over every sample and every weight, taken one by one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import surgeon
from passes.score.block_influence import BlockInfluence
from passes.score.fisher import Fisher
from passes.score.flap import Flap
from passes.score.obs import OptimalBrainSurgeon, _eliminate
from passes.score.taylor import Taylor
from passes.score.wanda import Wanda
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.axes.producers import ending, producers
from surgeon.calibrate.data import Piece, Recipe, Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.errors import SurgeonError
from surgeon.opening import open_model
from surgeon.plugin import Context
from tests import models
from tests.fakes import Drawn

pytestmark = pytest.mark.slow

LAYER = "model.layers.1"
FFN, KV, REP, V = (
    f"{LAYER}.{end}"
    for end in ("mlp/ffn", *(f"self_attn/{r}" for r in ("kv_heads", "q_per_kv", "v")))
)
DOWN, OUT = f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.self_attn.o_proj.weight"
READER = {FFN: DOWN, KV: OUT, REP: OUT, V: OUT}


@cache
def context(name: str = "Llama") -> Context:
    model = open_model(models.tiny(name))
    data: Any = Drawn(model.axes)
    return Context(model.axes, model.read, calibration=data)


def asked(found: Context, *names: str) -> Context:
    return replace(found, targets=names, notes=[])


def gone(found: Context, axis: str, index: tuple[int, ...], param: str) -> torch.Tensor:
    """Which elements of a parameter go with one index of an axis: what a plan without it takes."""
    whole = found.axes.get(axis)
    rest = [i for i in range(whole.size) if i != index[-1]]
    if len(index) == 1:
        kept: Any = rest
    else:
        # The other enclosing indices lose another one, which doesn't count here.
        sizes = [found.axes.get(o).size for o in whole.outer]
        kept = np.broadcast_to(np.asarray(rest), (*sizes, len(rest)))
    selection = Selection(found.axes, Plan((cut(whole, kept, whole.outer[: len(index) - 1]),)))
    mask = torch.ones(tuple(map(int, found.program.param[param].type.shape))).reshape(-1)
    mask[torch.from_numpy(selection.flat(param))] = 0
    mask = mask.reshape(tuple(map(int, found.program.param[param].type.shape)))
    if len(index) > 1:
        inside = torch.zeros_like(mask).reshape(-1)
        (outer,) = whole.outer
        own = Selection(found.axes, Plan((cut(found.axes.get(outer), [index[0]]),)))
        inside[torch.from_numpy(own.flat(param))] = 1
        mask = mask * inside.reshape(mask.shape)
    return mask.bool()


def every(found: Context, axis: str) -> list[tuple[int, ...]]:
    whole = found.axes.get(axis)
    return list(np.ndindex(*(found.axes.get(o).size for o in whole.outer), whole.size))


def by_index(found: Context, axis: str, cost: Any) -> np.ndarray:
    """The cost of each index, of the columns of the one map that reads an axis."""
    param = READER[axis]
    weight = found.weights(param).double()
    shape = [found.axes.get(o).size for o in found.axes.get(axis).outer]
    out = np.zeros((*shape, found.axes.get(axis).size))
    for index in every(found, axis):
        columns = gone(found, axis, index, param)[0].nonzero()[:, 0].tolist()
        out[index] = cost(param, weight, columns)
    return out


AXES = (FFN, KV, REP, V)

# --- Wanda and FLAP ------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
def test_wanda_is_the_sum_of_weights_times_the_size_of_their_inputs(axis: str) -> None:
    found = context()

    def cost(param: str, weight: torch.Tensor, columns: Sequence[int]) -> float:
        x = found.calibration.inputs(param)  # type: ignore[union-attr]
        sizes = [sum(float(v) ** 2 for v in x[:, j]) / len(x) for j in range(x.shape[1])]
        rows = range(len(weight))
        return sum(abs(float(weight[i, j])) * sizes[j] ** 0.5 for i in rows for j in columns)

    scores = Wanda().score(asked(found, axis))[axis]
    np.testing.assert_allclose(scores, by_index(found, axis, cost), rtol=1e-6)


@pytest.mark.parametrize("axis", AXES)
def test_flap_is_the_variance_of_inputs_times_the_square_of_their_weights(axis: str) -> None:
    found = context()

    def cost(param: str, weight: torch.Tensor, columns: Sequence[int]) -> float:
        x = found.calibration.inputs(param)  # type: ignore[union-attr]
        return sum(float(x[:, j].var()) * float(weight[:, j].square().sum()) for j in columns)

    plain = Flap(standardise=False).score(asked(found, axis))[axis]
    expected = by_index(found, axis, cost)
    np.testing.assert_allclose(plain, expected, rtol=1e-6)
    scores = Flap().score(asked(found, axis))[axis]
    np.testing.assert_allclose(scores, (expected - expected.mean()) / expected.std(), rtol=1e-6)


@pytest.mark.parametrize("score", [Wanda(), Flap(), OptimalBrainSurgeon()])
def test_scores_of_columns_refuse_what_no_map_is_summed_over(score: Any) -> None:
    found = context()
    for name, why in (("model/rotary", "no map is summed"), (f"{LAYER}/mlp", "a branch")):
        with pytest.raises(SurgeonError) as caught:
            score.score(asked(found, name))
        assert caught.value.at == name and caught.value.why.startswith(why)


# --- growth of the loss --------------------------------------------------------------------------


def growth(slopes: torch.Tensor, changes: torch.Tensor) -> float:
    """½ E[(gᵀδ)²] where gradient and change are independent: over every pair of samples."""
    pairs = [float(g @ d) ** 2 for g in slopes for d in changes]
    return sum(pairs) / len(pairs) / 2


@pytest.mark.parametrize("axis", AXES)
def test_fisher_is_how_much_the_loss_grows_without_an_index(axis: str) -> None:
    found = context()

    def cost(param: str, weight: torch.Tensor, columns: Sequence[int]) -> float:
        x, g = found.calibration.inputs(param), found.calibration.slopes(param)  # type: ignore[union-attr]
        return growth(g, x[:, columns] @ weight[:, columns].T)

    scores = Fisher().score(asked(found, axis))[axis]
    picked = every(found, axis)[:: max(1, len(every(found, axis)) // 6)]
    expected = by_index(found, axis, lambda *_: 0.0)
    weight = found.weights(READER[axis]).double()
    for index in picked:
        columns = gone(found, axis, index, READER[axis])[0].nonzero()[:, 0].tolist()
        expected[index] = cost(READER[axis], weight, columns)
        assert scores[index] == pytest.approx(expected[index], rel=1e-6)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_fisher_of_a_branch_is_the_growth_without_all_that_it_adds(name: str) -> None:
    found = context(name)
    for branch in found.axes.branches[-2:]:
        last = ending(found.axes, branch)
        assert last is not None and last.param in branch.params
        x, g = found.calibration.inputs(last.param), found.calibration.slopes(last.param)  # type: ignore[union-attr]
        weight = found.weights(last.param).double()
        y = x @ (weight.T if last.dim == 1 else weight)
        y = y if last.bias is None else y + found.weights(last.bias).double()
        score = Fisher().score(asked(found, branch.name))[branch.name]
        assert score.shape == () and float(score) == pytest.approx(growth(g, y), rel=1e-6)


def test_fisher_adds_up_all_maps_that_read_an_axis_and_says_which_it_leaves_out() -> None:
    found = context()
    whole = asked(found, "hidden")
    everything = Fisher().score(whole)["hidden"]
    assert whole.notes == []
    narrow = asked(found, "hidden")
    without = Fisher(widest=100).score(narrow)["hidden"]
    assert len(narrow.notes) == 1 and "lm_head.weight" in narrow.notes[0]
    head = found.weights("lm_head.weight").double()
    x, g = (f("lm_head.weight") for f in (found.calibration.inputs, found.calibration.slopes))  # type: ignore[union-attr]
    expected = growth(g, x[:, [5]] @ head[:, [5]].T)
    assert everything[5] - without[5] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(SurgeonError, match="can't treat"):
        Fisher(widest=10).score(asked(found, FFN))


def test_what_predicts_the_loss_says_so() -> None:
    assert Fisher().unit == "loss" and not Fisher().cumulative
    assert OptimalBrainSurgeon().unit == "role" and OptimalBrainSurgeon().cumulative
    loss = OptimalBrainSurgeon(weigh="loss")
    assert loss.unit == "loss" and loss.cumulative
    assert loss.needs - OptimalBrainSurgeon().needs == {"gradients: outputs"}


# --- optimal brain surgeon -----------------------------------------------------------------------


def test_weighed_by_the_loss_it_is_the_growth_that_is_left_after_the_rest_made_up() -> None:
    found = context()
    damping = 1e-6
    scores = OptimalBrainSurgeon(damping, 1, "loss").score(asked(found, KV))[KV]
    x, g = found.calibration.inputs(OUT), found.calibration.slopes(OUT)  # type: ignore[union-attr]
    first = int(scores.argmin())
    weight = found.weights(OUT).double()
    root = torch.linalg.cholesky(g.T @ g / len(g) + 1e-12 * torch.eye(g.shape[1])).T
    second = x.T @ x / len(x)
    second += damping * second.diagonal().mean() * torch.eye(len(second))
    left = []
    for head in range(3):
        columns = list(range(16 * head, 16 * head + 16))
        kept = [j for j in range(48) if j not in columns]
        change = root @ weight
        best = torch.linalg.solve(second[kept][:, kept], second[kept] @ change.T).T
        change[:, kept] -= best
        left.append(float((change @ second * change).sum()) / 2)
    assert first == int(np.argmin(left))
    assert scores[first] == pytest.approx(left[first], rel=1e-4)


def reindexed(weight: torch.Tensor, inverse: torch.Tensor, groups: Any, batch: int) -> Any:
    """Elimination that copies what is left after every step."""
    at = {int(c): int(c) for c in range(weight.shape[1])}
    alive, total, scores = list(range(len(groups))), 0.0, np.zeros(len(groups))
    while alive:
        places = [[at[int(c)] for c in groups[i]] for i in alive]
        errors = [
            float((weight[:, p] @ torch.linalg.inv(inverse[p][:, p]) * weight[:, p]).sum())
            for p in places
        ]
        order = np.argsort(errors, kind="stable")[:batch]
        total += sum(errors[i] for i in order)
        out = [c for i in order for c in places[i]]
        for i in order:
            scores[alive[i]] = total
        rest = [j for j in range(weight.shape[1]) if j not in out]
        told = torch.linalg.solve(inverse[out][:, out], inverse[out])
        weight = (weight - weight[:, out] @ told)[:, rest]
        inverse = (inverse - inverse[:, out] @ told)[rest][:, rest]
        back = {j: i for i, j in enumerate(rest)}
        at = {c: back[j] for c, j in at.items() if j in back}
        alive = [a for k, a in enumerate(alive) if k not in set(order.tolist())]
    return scores


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize("width", [1, 2])
def test_elimination_is_that_which_copies_after_every_step(batch: int, width: int) -> None:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(60, 24, generator=draw, dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x / 60)
    weight = torch.randn(5, 24, generator=draw, dtype=torch.float64)
    # Some columns belong to no group: they stay, and make up for the others.
    groups = torch.randperm(24, generator=draw)[: 20 // width * width].reshape(-1, width)
    found = _eliminate(weight, inverse, groups, batch).numpy()
    np.testing.assert_allclose(found, reindexed(weight, inverse, groups, batch), rtol=1e-7)


HEADS = """
import torch
from passes.score.obs import _eliminate

draw = torch.Generator().manual_seed(1)
x = torch.randn(1200, 576, generator=draw, dtype=torch.float64)
inverse, weight = torch.linalg.inv(x.T @ x / 1200), torch.randn(8, 576, generator=draw).double()
groups = torch.arange(576).reshape(3, 192)
torch.set_num_threads(THREADS)
print(*_eliminate(weight, inverse, groups, 1).tolist())
"""


def test_wide_groups_are_eliminated_whatever_the_number_of_threads() -> None:
    """With MKL's LU factors of several matrices at once, two threads never came to an end."""
    one, two = (
        subprocess.run(
            [sys.executable, "-c", HEADS.replace("THREADS", str(threads))],
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        ).stdout.split()
        for threads in (1, 2)
    )
    np.testing.assert_allclose([float(x) for x in two], [float(x) for x in one], rtol=1e-9)
    assert len(one) == 3


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    found = context()

    class Silent(Drawn):
        def inputs(self, param: str) -> torch.Tensor:
            return torch.zeros_like(super().inputs(param))

    silent: Any = Silent(found.axes)
    quiet = replace(asked(found, FFN), calibration=silent)
    assert OptimalBrainSurgeon().score(quiet)[FFN].max() < 1e-20


# --- Taylor --------------------------------------------------------------------------------------


def changes(found: Context, param: str, order: int) -> torch.Tensor:
    windows = found.calibration.windows(param)  # type: ignore[union-attr]
    weight = found.weights(param).double()
    first = sum(g * weight for g in windows) / len(windows)
    if order == 1:
        return first
    return first - sum(g**2 * weight**2 for g in windows) / len(windows) / 2


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("by", ["element", "channel"])
@pytest.mark.parametrize("axis", [FFN, KV, REP, V, "model/rotary", "hidden"])
def test_taylor_is_the_change_of_the_loss_over_all_weights_of_a_channel(
    axis: str, by: Any, order: Any
) -> None:
    found = context()
    scores = Taylor(order, by).score(asked(found, axis))[axis]
    trained = [p.name for p in found.program.params if p.kind == "parameter"]
    carried = [m.param for m in found.axes.get(axis).members if m.param in trained]
    of = {param: changes(found, param, order) for param in dict.fromkeys(carried)}
    for index in every(found, axis)[::7]:
        parts = [c[gone(found, axis, index, param)] for param, c in of.items()]
        whole = torch.cat(parts)
        expected = float(whole.abs().sum() if by == "element" else whole.sum().abs())
        assert scores[index] == pytest.approx(expected, rel=1e-6), index


def test_taylor_of_a_branch_is_that_of_all_it_owns() -> None:
    found = context()
    branch = found.axes.branches[-1]
    scores = Taylor().score(asked(found, branch.name))
    expected = sum(float(changes(found, p, 1).abs().sum()) for p in branch.params)
    assert float(scores[branch.name]) == pytest.approx(expected, rel=1e-6)


# --- block influence -----------------------------------------------------------------------------


def test_block_influence_is_what_the_cosine_lacks() -> None:
    found = context()
    names = tuple(branch.name for branch in found.axes.branches)
    scores = BlockInfluence().score(asked(found, *names))
    similar = found.calibration.similarity(names)  # type: ignore[union-attr]
    assert {n: float(s) for n, s in scores.items()} == {n: 1 - similar[n] for n in names}
    with pytest.raises(SurgeonError, match="can't treat"):
        BlockInfluence().score(asked(found, FFN))


# --- facts of the analysis -----------------------------------------------------------------------


def test_producers_are_the_maps_whose_rows_are_an_axis() -> None:
    axes = context().axes
    made = producers(axes, axes.get(FFN))
    assert [p.param for p in made] == [f"{LAYER}.mlp.{n}_proj.weight" for n in ("gate", "up")]
    assert all(np.array_equal(p.groups, np.arange(80)[:, None]) for p in made)
    (value,) = producers(axes, axes.get(V))
    assert value.dim == 0 and np.array_equal(value.groups, np.arange(24).reshape(3, 8, 1))


def test_a_fused_producer_knows_its_bias_and_which_of_its_outputs_are_the_axis() -> None:
    axes = context("GPT2").axes
    (value,) = producers(axes, axes.of_role("v")[0])
    assert value.dim == 1 and value.bias == "transformer.h.0.attn.c_attn.bias"
    assert np.array_equal(value.groups, 96 + np.arange(48).reshape(6, 8, 1))
    (heads,) = producers(axes, axes.of_role("kv_heads")[0])
    assert heads.groups.shape == (6, 24) and heads.groups[1].tolist()[:8] == list(range(8, 16))


# --- the whole way -------------------------------------------------------------------------------

DATA = Recipe((Piece(models.tokens(100, 1, 300)[0].numpy()),), 6, 16)


@pytest.mark.parametrize(
    ("score", "options", "roles"),
    [
        ("taylor", {"order": 2, "by": "channel"}, ("ffn", "kv_heads", "layers")),
        ("wanda", {}, ("ffn", "q_per_kv")),
        ("flap", {}, ("ffn", "kv_heads")),
        ("fisher", {}, ("ffn", "kv_heads", "layers")),
        ("obs", {"weigh": "loss"}, ("ffn", "kv_heads")),
        ("block_influence", {}, ("layers",)),
    ],
)
def test_each_score_gets_what_it_needs_from_real_calibration_data(
    score: str, options: dict[str, Any], roles: tuple[str, ...]
) -> None:
    pruned = surgeon.prune(
        models.tiny("Llama"),
        roles=dict.fromkeys(roles, 0.4),
        score=score,
        score_options=options,
        calibration=DATA,
        verify=False,
    )
    cut_roles = {pruned.axes.get(c.axis).role for c in pruned.plan.cuts}
    assert cut_roles == {*roles} - {"layers"} and bool(pruned.plan.branches) == ("layers" in roles)


def test_what_fisher_predicts_is_near_what_the_loss_does() -> None:
    """On labels that the model itself draws, where the Fisher matrix is the loss's Hessian."""
    model = open_model(models.tiny("Llama"))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 101, (96, 1), generator=draw)
    module = models.tiny("Llama")
    with torch.no_grad():
        for _ in range(11):
            chances = module(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(chances, 1, generator=draw)], dim=1)
    data: Any = Gathered(model.axes, model.read, Windows(ids.numpy()))
    asked = Context(model.axes, model.read, (FFN,), calibration=data)
    scores = Fisher().score(asked)[FFN]
    order, dense = scores.argsort(), data.loss(Plan())

    def growth_without(gone: Any) -> float:
        """The mean growth of the loss when one of these channels goes."""
        axis = model.axes.get(FFN)
        plans = (Plan((cut(axis, [i for i in range(80) if i != index]),)) for index in gone)
        return float(np.mean([data.loss(plan) - dense for plan in plans]))

    for gone in (order[:10], order[-10:]):
        assert growth_without(gone) == pytest.approx(scores[gone].mean(), rel=0.3)
