"""What the analysis says a model takes, against what a real one does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import surgeon
from surgeon.axes import Axes, analyse
from surgeon.axes.costs import Cost, Costs
from surgeon.axes.plan import Plan, counts, cut
from surgeon.ir import parse
from tests import models

pytestmark = pytest.mark.slow

FAMILIES = ("Llama", "GPT2", "Phi3", "Gemma2")


def axes_of(name: str) -> Axes:
    return surgeon.open_model(models.tiny(name)).axes


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_those_of_the_model(name: str) -> None:
    model = models.tiny(name)
    found = Costs(axes_of(name)).whole
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.bytes == 4 * found.parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_are_those_torch_counts(name: str) -> None:
    """Torch counts every key for every query, as if none were masked."""
    model, found = models.build(name), Costs(axes_of(name))
    model.set_attn_implementation("eager")
    seq = 6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, seq, dtype=torch.int64), use_cache=False)
    table = seq * sum(p.numel() for n, p in model.named_buffers() if n.endswith("inv_freq"))
    counted = counter.get_total_flops()
    expected = seq * found.whole.flops + seq * seq * found.whole.flops_context
    # Eager models multiply positions by frequencies as a matrix; the capture has no product there.
    assert expected <= counted <= expected + 2 * table
    assert found.per == "token"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_is_that_of_the_model(name: str) -> None:
    model, seq = models.tiny(name), 6
    with torch.no_grad():
        cache: Any = model(torch.zeros(1, seq, dtype=torch.int64), use_cache=True).past_key_values
    held = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    assert Costs(axes_of(name)).whole.cache_bytes == held // seq


def test_spelled_out_attention_has_the_same_cache() -> None:
    """Repeated heads are not cached: the smallest form of keys and values is."""
    from surgeon.capture.model import capture_model

    model = models.tiny("Llama")
    spelled = analyse(capture_model(model, attention=False).program)
    assert not any(op.target == "surgeon.attention" for op in spelled.program.ops)
    ours, theirs = Costs(axes_of("Llama")).whole, Costs(spelled).whole
    assert (ours.cache_bytes, ours.flops_context) == (theirs.cache_bytes, theirs.flops_context)
    assert ours.flops == theirs.flops


@pytest.mark.parametrize("name", FAMILIES)
def test_a_channel_is_what_a_plan_saves(name: str) -> None:
    axes = axes_of(name)
    costs = Costs(axes)
    trained = [p.name for p in axes.program.params if p.kind == "parameter"]
    for axis in axes.axes:
        plan = Plan((cut(axis, range(1, axis.size)),))
        before, after = counts(axes, plan, trained)
        one = costs.channel(axis)
        assert one.parameters == before - after > 0
        assert one == costs.whole - costs.under(plan)


def test_layers_and_the_rest_are_the_whole() -> None:
    axes = axes_of("Llama")
    costs = Costs(axes)
    layers = costs.layers()
    assert list(layers) == ["model.layers.0", "model.layers.1"]
    outside = [p for p in axes.program.params if not p.name.startswith("model.layers.")]
    rest = sum(
        torch.Size([s for s in p.type.shape if isinstance(s, int)]).numel()
        for p in outside
        if p.kind == "parameter"
    )
    assert costs.whole.parameters == sum(c.parameters for c in layers.values()) + rest
    assert costs.whole.cache_bytes == sum(c.cache_bytes for c in layers.values())


def test_a_dropped_branch_takes_its_costs_with_it() -> None:
    axes = axes_of("Llama")
    costs = Costs(axes)
    plan = Plan(branches=("model.layers.1/attention",))
    after = costs.layers(plan)
    assert after["model.layers.0"] == costs.layers()["model.layers.0"]
    assert after["model.layers.1"].cache_bytes == after["model.layers.1"].flops_context == 0
    mlp = replace(plan, branches=("model.layers.1/attention", "model.layers.1/mlp"))
    assert costs.layers(mlp)["model.layers.1"] == Cost()


@pytest.mark.parametrize(("shape", "per"), [("5", "call"), ("batch", "row")])
def test_flops_are_for_what_the_input_has_many_of(shape: str, per: str) -> None:
    lines = (
        "surgeon.program 1",
        *(() if shape.isdigit() else (f"symbol {shape}",)),
        f"input %x: f32[{shape}, 8]",
        "parameter $a: f32[6, 8]",
        f"%1: f32[{shape}, 6] = aten.linear.default(%x, $a)",
        "return %1\n",
    )
    costs = Costs(analyse(parse("\n".join(lines))))
    assert costs.per == per
    assert costs.whole.flops == 2 * 6 * 8 * (5 if per == "call" else 1)
