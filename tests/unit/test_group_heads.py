"""Multi-head attention made grouped-query: fewer key/value heads, all query heads left."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.axes.grouped import grouping, heads_apart
from surgeon.axes.plan import Plan, check
from surgeon.calibrate.data import Piece, Recipe
from surgeon.errors import SurgeonError
from surgeon.saving import read_plan
from tests import models

pytestmark = pytest.mark.slow

HEADS = 6
MULTI = {"num_key_value_heads": HEADS}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    import numpy as np

    file = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(file, models.tokens(90, 8, 64, seed=1).numpy())
    return Recipe((Piece(str(file)),), samples=8, length=64)


def grouped(model: Any, data: Recipe, **options: Any) -> surgeon.Pruned:
    recipe = {"version": 1, "passes": [{"transform": "group_heads", **options}]}
    return surgeon.prune(model, recipe=recipe, calibration=data)


@contextmanager
def refused(code: str, why: str) -> Generator[None]:
    with pytest.raises(SurgeonError) as caught:
        yield
    assert caught.value.code == code and re.search(why, caught.value.why)


def blocks(weight: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    return weight.unflatten(0, (heads, -1))


def attentions(model: Any) -> Iterator[Any]:
    yield from (layer.self_attn for layer in model.model.layers)


def distance(a: Any, b: Any) -> float:
    ids = models.tokens(90)
    with torch.no_grad():
        one, other = a(ids).logits, b(ids).logits
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Llama", MULTI),
        ("Llama", {**MULTI, "attention_bias": True}),
        ("Llama", {}),  # grouped already: two of three become one of six
        ("Qwen2", {}),
        ("Qwen3", {}),  # a norm between keys and their rotation
        ("Phi3", {}),  # one weight for all three
        ("Mistral", {}),
    ],
)
def test_the_smaller_model_computes_what_heads_that_are_alike_do(
    name: str, changes: dict[str, Any], data: Recipe
) -> None:
    made = grouped(models.tiny(name, **changes), data)  # verified by `prune`
    assert made.origin.source is not None
    model: Any = made.model
    before, after = made.origin.source.config, model.config
    assert after.num_attention_heads == before.num_attention_heads
    assert after.num_key_value_heads < before.num_key_value_heads
    assert made.report.verification is not None


def test_the_mean_is_of_neighbours(data: Recipe) -> None:
    model = models.tiny("Llama", **MULTI)
    made = grouped(model, data, by="mean", kv_heads=2).model
    for dense, small in zip(attentions(model), attentions(made), strict=True):
        for which in ("k_proj", "v_proj"):
            own = blocks(getattr(dense, which).weight).unflatten(0, (2, 3)).mean(1)
            assert torch.allclose(blocks(getattr(small, which).weight, 2), own, atol=1e-6)
        assert small.q_proj.weight.equal(dense.q_proj.weight)
        assert small.o_proj.weight.equal(dense.o_proj.weight)


def test_heads_that_differ_by_a_basis_alone_are_merged_without_loss(data: Recipe) -> None:
    """Values by any invertible map, keys by a complex factor for each pair, undone by readers."""
    draw = torch.Generator().manual_seed(3)
    plain = models.build("Llama", **MULTI)
    turned = models.build("Llama", **MULTI)
    with torch.no_grad():
        for one, other in zip(attentions(plain), attentions(turned), strict=True):
            for which in ("k_proj", "v_proj"):
                own = blocks(getattr(one, which).weight)
                own[1::2] = own[::2]  # alike, two by two
                getattr(other, which).weight.copy_(getattr(one, which).weight)
            width = one.head_dim
            for head in range(HEADS):
                change = torch.eye(width) + 0.3 * torch.randn(width, width, generator=draw)
                rows = slice(head * width, (head + 1) * width)
                other.v_proj.weight[rows] = change @ one.v_proj.weight[rows]
                other.o_proj.weight[:, rows] = one.o_proj.weight[:, rows] @ change.inverse()
                half = width // 2
                factor = torch.randn(half, 1, dtype=torch.cfloat, generator=draw) + 2
                for which, f in (("k_proj", factor), ("q_proj", 1 / factor.conj())):
                    weight = getattr(one, which).weight[rows]
                    found = torch.complex(weight[:half], weight[half:]) * f
                    getattr(other, which).weight[rows] = torch.cat([found.real, found.imag])
    assert distance(plain, turned) < 1e-4
    assert distance(plain, grouped(turned, data, kv_heads=3).model) < 1e-3
    assert distance(plain, grouped(turned, data, kv_heads=3, by="mean").model) > 0.1


def test_calibrated_loses_less_than_the_mean(data: Recipe) -> None:
    model = models.tiny("Llama", **MULTI)
    lost = {by: distance(model, grouped(model, data, by=by).model) for by in ("calibrated", "mean")}
    assert lost["calibrated"] < 0.95 * lost["mean"]


def test_with_channels_cut_saved_loaded_and_replayed(data: Recipe, tmp_path: Path) -> None:
    model = models.tiny("Llama", **MULTI)
    made = surgeon.prune(
        model,
        recipe="flap",
        roles={"ffn": 0.25},
        transform=["group_heads", "value_output"],
        calibration=data,
    )
    made.save(tmp_path / "out")
    again = surgeon.verify(tmp_path / "out", source=model)
    assert again.largest < 1e-4
    plan, rewrites = read_plan(tmp_path / "out")
    assert plan.grouped and Plan.from_json(plan.to_json()) == plan
    replayed = surgeon.prune(model, plan=plan, rewrites=rewrites)
    assert distance(made.model, replayed.model) < 1e-6


@pytest.mark.parametrize("target", ["pt2", "onnx"])
def test_graphs_have_fewer_heads_too(target: str, data: Recipe, tmp_path: Path) -> None:
    recipe = {"version": 1, "target": target, "passes": [{"transform": "group_heads"}]}
    made = surgeon.prune(models.tiny("Llama", **MULTI), recipe=recipe, calibration=data)
    made.save(tmp_path / "out")  # compares what it wrote with heads that are alike


def test_training_keeps_heads_alike(data: Recipe) -> None:
    """In the original's sizes, which the masked reference has."""
    recipe = {
        "version": 1,
        "passes": [
            {"transform": "group_heads"},
            {"score": "magnitude"},
            {"select": "uniform"},
            {"compensate": "recover", "steps": 2, "batch": 1, "length": 16, "rate": 1e-2},
        ],
        "budget": {"roles": {"ffn": 0.25}},
    }
    made = surgeon.prune(models.build("Llama", **MULTI), recipe=recipe, calibration=data)
    (name,) = [n for n in made.rewrites if n.endswith("layers.0.self_attn.k_proj.weight")]
    own = blocks(made.rewrites[name]).unflatten(0, (3, 2))
    assert own[:, 0].equal(own[:, 1])


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("Llama", {"kv_heads": 4}, "don't make 4 groups of one size"),
        ("Olmo2", {}, "norm|normalises"),
    ],
)
def test_what_cant_be_grouped_is_refused(
    name: str, options: dict[str, Any], why: str, data: Recipe
) -> None:
    changes = MULTI if name == "Llama" else {}
    with refused("bad-option", why):
        grouped(models.tiny(name, **changes), data, **options)


def test_attention_that_is_spelled_out_tells_no_heads_apart(data: Recipe) -> None:
    import transformers

    config = transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=90)
    with refused("bad-option", "told apart|tells query heads"):
        grouped(transformers.BloomForCausalLM(config), data)


def test_a_plan_may_group_neighbours_only(data: Recipe) -> None:
    axes = heads_apart(surgeon.capture(models.tiny("Llama", **MULTI)))
    (axis, _) = axes.of_role("kv_heads")
    fine = grouping(axis, 3)
    check(axes, Plan((fine,), grouped=(axis.name,)))
    other = type(fine)(fine.axis, fine.size, (0, 1, 2), ())
    with refused("pinned", "first head of each group"):
        check(axes, Plan((other,), grouped=(axis.name,)))
    with refused("pinned", "dealt out"):
        check(axes, Plan((fine,)))
    usual = surgeon.analyse(models.tiny("Llama", **MULTI))
    with refused("pinned", "told apart"):
        check(usual, Plan((fine,), grouped=(axis.name,)))
