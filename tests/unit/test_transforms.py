"""Changes of basis: nothing changes while nothing is cut, and what is cut then was worth least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from passes.transform._basis import open_to_change
from passes.transform.rotate_hidden import RotateHidden
from passes.transform.value_output import ValueOutput, _nearest
from surgeon.axes.budget import Budget
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.axes.scales import limit, scales
from surgeon.errors import SurgeonError
from surgeon.opening import Model, open_model
from surgeon.ops.rule import Gauge
from surgeon.plugin import Context
from surgeon.runtime.apply import masked
from surgeon.runtime.lower import lower
from tests import models
from tests.fakes import Drawn

pytestmark = pytest.mark.slow  # tests/zoo/test_exactness.py has the exactness of every architecture


@cache
def opened(name: str, **overrides: Any) -> Model:
    return open_model(models.tiny(name, **overrides))


def context(name: str, **overrides: Any) -> Context:
    model = opened(name, **overrides)
    data: Any = Drawn(model.axes, 400)
    return Context(model.axes, model.read, calibration=data)


def logits(model: Model, found: Mapping[str, torch.Tensor], plan: Plan | None = None) -> Any:
    """The logits in fp64 with some tensors replaced, and then some zero."""
    selection = Selection(model.axes, plan or Plan())

    def read(name: str) -> torch.Tensor:
        tensor = found[name] if name in found else model.read(name)
        tensor = masked(selection, name, tensor)
        return tensor.double() if tensor.is_floating_point() else tensor

    ids = models.tokens(100)
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return lower(model.program, read)(ids, torch.ones_like(ids), positions)


def same(model: Model, found: Mapping[str, torch.Tensor]) -> None:
    """Asserts that the model computes what it did, to the rounding of its weights to fp32."""
    before, after = logits(model, {}), logits(model, found)
    assert float((after - before).abs().max() / before.abs().max()) < 2e-5


# --- values and outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_another_basis_of_values_changes_nothing_while_nothing_is_cut(name: str) -> None:
    asked = context(name)
    found = ValueOutput().transform(asked)
    same(opened(name), found)
    # Both sides of the values of both layers, and what is added to them.
    values = asked.axes.of_role("v")
    assert found.keys() == {m.param for axis in values for m in axis.members}
    assert len(values) == 2 and asked.notes == []
    for param, tensor in found.items():
        assert not torch.allclose(tensor, asked.weights(param), rtol=0.1), param


def blocks(asked: Context, found: Mapping[str, torch.Tensor], layer: str, kv: int) -> Any:
    """Of one key/value head: the map [8, 8] that the pass put on values, found from the weights."""
    name = f"{layer}.v_proj.weight"
    rows = slice(8 * kv, 8 * kv + 8)
    return found[name][rows].double() @ torch.linalg.pinv(asked.weights(name)[rows].double())


def errors(asked: Context, layer: str, kv: int, forth: torch.Tensor) -> list[float]:
    """Mean squared error of the output when only the first channels of a basis are kept."""
    weight = asked.weights(f"{layer}.o_proj.weight").double()
    x = asked.calibration.inputs(f"{layer}.o_proj.weight")  # type: ignore[union-attr]
    out: list[float] = []
    for kept in range(9):
        keep = torch.diag((torch.arange(8) < kept).double())
        change = torch.eye(8) - torch.linalg.inv(forth) @ keep @ forth
        y = torch.zeros(len(x), len(weight), dtype=torch.float64)
        for head in range(2 * kv, 2 * kv + 2):
            columns = slice(8 * head, 8 * head + 8)
            y += x[:, columns] @ change.T @ weight[:, columns].T
        out.append(float(y.square().sum(1).mean()))
    return out


def test_the_first_channels_are_the_best_approximation_of_their_rank() -> None:
    """With one query head to a value head: the singular values tell the least possible error."""
    asked = context("OPT")
    found = ValueOutput(damping=1e-9).transform(asked)
    layer = "model.decoder.layers.1.self_attn"
    name = f"{layer}.out_proj.weight"
    x = asked.calibration.inputs(name)  # type: ignore[union-attr]
    weight = asked.weights(name).double()
    for head in range(6):
        columns = slice(8 * head, 8 * head + 8)
        second = x[:, columns].T @ x[:, columns] / len(x)
        root = torch.linalg.cholesky(second)
        tail = torch.linalg.svdvals(weight[:, columns] @ root).square()
        forth = blocks(asked, found, layer, head)
        after = found[name].double()
        for kept in range(1, 8):
            y = x[:, columns] @ weight[:, columns].T
            keep = after[:, columns][:, :kept] @ forth[:kept]
            error = float((y - x[:, columns] @ keep.T).square().sum(1).mean())
            assert error == pytest.approx(float(tail[kept:].sum()), rel=1e-3)


def test_query_heads_that_share_values_share_a_good_basis() -> None:
    asked = context("Llama")
    found = ValueOutput().transform(asked)
    layer = "model.layers.0.self_attn"
    draw = torch.Generator().manual_seed(0)
    for kv in range(3):
        ours = errors(asked, layer, kv, blocks(asked, found, layer, kv))
        assert ours == sorted(ours, reverse=True) and ours[8] < 1e-9 * ours[0]
        others = [torch.eye(8, dtype=torch.float64)]
        others += [torch.randn(8, 8, generator=draw, dtype=torch.float64) for _ in range(50)]
        for forth in others:
            theirs = errors(asked, layer, kv, forth)
            assert all(ours[k] < theirs[k] for k in range(1, 8))


def test_sums_of_products_are_replaced_by_the_nearest_single_one() -> None:
    draw = torch.Generator().manual_seed(0)
    halves = torch.randn(2, 3, 5, 4, 4, generator=draw, dtype=torch.float64)
    weights, inputs = halves @ halves.mT
    first, second = _nearest(weights, inputs, 200)
    for n in range(3):
        pairs = zip(weights[n], inputs[n], strict=True)
        whole = sum(a.reshape(-1, 1) @ h.reshape(1, -1) for a, h in pairs)
        left, sizes, right = torch.linalg.svd(whole)
        best = sizes[0] * left[:, :1] @ right[:1]
        ours = first[n].reshape(-1, 1) @ second[n].reshape(1, -1)
        torch.testing.assert_close(ours, best, rtol=1e-6, atol=1e-6)


def test_what_is_cut_afterwards_is_removed_exactly_and_costs_less() -> None:
    model = opened("Llama")
    asked = context("Llama")
    found = ValueOutput().transform(asked)
    plan = Plan(tuple(cut(axis, range(5)) for axis in model.axes.of_role("v")))
    dense = logits(model, {})
    with_, without = (logits(model, f, plan) - dense for f in (found, {}))
    assert float(with_.square().mean()) < 0.8 * float(without.square().mean())


def test_frozen_axes_keep_their_basis() -> None:
    asked = context("Llama")
    second = asked.axes.of_role("v")[1].name
    budget = Budget(axes=frozenset({second, "hidden"}))
    found = ValueOutput().transform(replace(asked, budget=budget))
    assert {name.split(".")[2] for name in found} == {"1"}
    assert [a.name for a in open_to_change(replace(asked, budget=budget))] == ["hidden", second]


def test_what_is_used_twice_is_left_as_it_is_with_a_note() -> None:
    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(6, 4), torch.nn.Linear(4, 6)
            self.other = torch.nn.Linear(6, 4, bias=False)
            self.last = torch.nn.Linear(4, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.down(self.up(x))
            x = x + self.down(self.up(x))
            return x + self.last(self.other(x))

    torch.manual_seed(0)
    module = Shared()
    model = open_model(module, example_inputs=(torch.randn(3, 6),))
    data: Any = Drawn(model.axes)
    asked = Context(model.axes, model.read, calibration=data)
    found = ValueOutput().transform(asked)
    assert found.keys() == {"other.weight", "last.weight"}
    (note,) = asked.notes
    assert "up.weight is used in several places" in note or "down.weight" in note
    x = torch.randn(3, 6)
    with torch.no_grad():
        after = lower(model.program, lambda n: found[n] if n in found else model.read(n))(x)
        torch.testing.assert_close(after, module(x), rtol=1e-4, atol=1e-5)


# --- the residual width --------------------------------------------------------------------------


def test_a_rotation_of_the_residual_width_changes_nothing_while_nothing_is_cut() -> None:
    asked = context("Llama")
    found = RotateHidden().transform(asked)
    same(opened("Llama"), found)
    axis = asked.axes.of_role("hidden")[0]
    assert found.keys() == {m.param for m in axis.members}
    for scale in scales(asked.axes, axis):
        assert bool((found[scale.param] == 1).all())


def test_it_is_the_rotation_into_principal_components() -> None:
    """One norm and one map: its input afterwards is uncorrelated, the largest variance first."""
    asked = context("Llama")
    found = RotateHidden().transform(asked)
    table = "model.embed_tokens.weight"
    turn = torch.linalg.lstsq(asked.weights(table).double(), found[table].double()).solution.T
    torch.testing.assert_close(turn @ turn.T, torch.eye(48).double(), rtol=0, atol=1e-5)
    total = torch.zeros(48, 48, dtype=torch.float64)
    read = {"input_layernorm": "self_attn.q_proj", "post_attention_layernorm": "mlp.gate_proj"}
    seen = [
        (f"model.layers.{n}.{norm}.weight", f"model.layers.{n}.{weight}.weight")
        for n in (0, 1)
        for norm, weight in read.items()
    ]
    for norm, weight in (*seen, ("model.norm.weight", "lm_head.weight")):
        x = asked.calibration.inputs(weight) / asked.weights(norm)  # type: ignore[union-attr]
        total += x.T @ x / float(x.square().sum())
    after = turn @ total @ turn.T
    assert float((after - torch.diag(after.diagonal())).abs().max()) < 1e-4 * float(after.max())
    assert bool((after.diagonal().diff() < 1e-5).all())


def test_cutting_the_last_components_costs_less_than_cutting_as_many_channels() -> None:
    model = opened("Llama")
    # Real statistics: what a fake says of the residual stream isn't true of it.
    from surgeon.calibrate.data import Windows
    from surgeon.calibrate.gathered import Gathered

    data: Any = Gathered(model.axes, model.read, Windows(models.tokens(100, 8, 16).numpy()))
    found = RotateHidden().transform(Context(model.axes, model.read, calibration=data))
    same(model, found)
    plan = Plan((cut(model.axes.get("hidden"), range(42)),))
    dense = logits(model, {})
    draws = [np.random.default_rng(seed).permutation(48)[:42] for seed in range(5)]
    plans = [Plan((cut(model.axes.get("hidden"), kept),)) for kept in draws]
    theirs = [float((logits(model, {}, p) - dense).square().mean()) for p in plans]
    assert float((logits(model, found, plan) - dense).square().mean()) < min(theirs)


@pytest.mark.parametrize(
    ("name", "overrides", "where"),
    [
        ("Llama", {"tie_word_embeddings": True}, "model.norm"),
        ("GPT2", {}, "ln_1"),
    ],
)
def test_where_something_allows_no_rotation_it_is_refused_by_name(
    name: str, overrides: dict[str, Any], where: str
) -> None:
    asked = context(name, **overrides)
    with pytest.raises(SurgeonError) as caught:
        RotateHidden().transform(asked)
    (axis,) = asked.axes.of_role("hidden")
    assert caught.value.at == axis.name and where in caught.value.why
    reason = limit(asked.axes, axis, Gauge.ROTATION)
    assert reason is not None and reason.where in caught.value.why


def test_a_frozen_width_is_not_rotated() -> None:
    asked = replace(context("Llama"), budget=Budget(axes=frozenset({"something else"})))
    with pytest.raises(SurgeonError, match="can't treat hidden"):
        RotateHidden().transform(asked)
