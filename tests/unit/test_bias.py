"""What removed channels contribute on average, in the biases of the maps that read them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import surgeon
from passes.compensate.bias import Bias
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.calibrate.data import Piece, Recipe, Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.opening import Model, open_model
from surgeon.plugin import Context
from surgeon.runtime.apply import masked
from surgeon.runtime.lower import lower
from tests import models
from tests.fakes import Drawn

pytestmark = pytest.mark.slow


@cache
def opened(name: str) -> Model:
    return open_model(models.tiny(name))


def context(name: str) -> Context:
    model = opened(name)
    data: Any = Drawn(model.axes)
    return Context(model.axes, model.read, calibration=data)


@pytest.mark.parametrize(
    ("name", "weight", "bias"),
    [
        ("GPT2", "transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"),
        ("OPT", "model.decoder.layers.1.fc2.weight", "model.decoder.layers.1.fc2.bias"),
    ],
)
def test_the_bias_gains_what_each_removed_input_gives_on_average(
    name: str, weight: str, bias: str
) -> None:
    asked = context(name)
    axis = asked.axes.of_role("ffn")[1]
    kept = range(0, axis.size, 3)
    found = Bias().compensate(asked, Plan((cut(axis, kept),)))
    assert found.keys() == {bias} and asked.notes == []
    x, w = asked.calibration.inputs(weight), asked.weights(weight)  # type: ignore[union-attr]
    w = w.T if name == "GPT2" else w
    expected = asked.weights(bias).double()
    for j in range(axis.size):
        if j not in kept:
            expected = expected + w[:, j].double() * float(x[:, j].sum()) / len(x)
    torch.testing.assert_close(found[bias].double(), expected, rtol=1e-5, atol=1e-6)


def test_heads_and_channels_that_go_from_one_map_are_counted_once() -> None:
    asked = context("OPT")
    heads = asked.axes.of_role("kv_heads")[0]
    values = asked.axes.of_role("v")[0]
    plan = Plan((cut(heads, [1, 2, 3, 4, 5]), cut(values, range(7))))
    name = "model.decoder.layers.0.self_attn.out_proj"
    change = Bias().compensate(asked, plan)[f"{name}.bias"] - asked.weights(f"{name}.bias")
    mean = asked.calibration.inputs(f"{name}.weight").mean(0)  # type: ignore[union-attr]
    gone = [*range(8), *range(15, 48, 8)]
    expected = asked.weights(f"{name}.weight").double()[:, gone] @ mean[gone]
    torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_map_without_a_bias_is_left_as_it_is_and_named() -> None:
    asked = context("Llama")
    plan = Plan(tuple(cut(axis, range(60)) for axis in asked.axes.of_role("ffn")))
    assert Bias().compensate(asked, plan) == {}
    (note,) = asked.notes
    assert "model.layers.0.mlp.down_proj.weight has no bias, and 1 more" in note


def test_on_its_own_data_the_residual_stream_keeps_its_mean() -> None:
    model = opened("GPT2")
    ids = models.tokens(100, 6, 16)
    data: Any = Gathered(model.axes, model.read, Windows(ids.numpy()))
    asked = Context(model.axes, model.read, calibration=data)
    plan = Plan((cut(model.axes.of_role("ffn")[1], range(0, 192, 2)),))
    found = Bias().compensate(asked, plan)
    selection = Selection(model.axes, plan)
    # The sum that the last branch goes into, before the last norm.
    stream = model.axes.program.ops[model.axes.branches[-1].add].outputs[0]
    from dataclasses import replace

    program = replace(model.axes.program, outputs=(stream,))

    def mean(rewrites: Any, cuts: bool) -> torch.Tensor:
        def read(name: str) -> torch.Tensor:
            tensor = rewrites.get(name, model.read(name))
            return masked(selection, name, tensor) if cuts else tensor

        places = torch.arange(16).expand(6, -1)
        with torch.no_grad():
            return lower(program, read)(ids, torch.ones_like(ids), places).mean((0, 1))

    dense = mean({}, False)
    torch.testing.assert_close(mean(found, True), dense, rtol=1e-4, atol=1e-4)
    assert float((mean({}, True) - dense).abs().max()) > 0.1


def test_it_composes_with_a_prune_by_fluctuation() -> None:
    data = Recipe((Piece(models.tokens(100, 1, 300)[0].numpy()),), 4, 16)
    pruned = surgeon.prune(
        models.tiny("GPT2"), roles={"ffn": 0.3}, score="flap", compensate=["bias"], calibration=data
    )
    assert {n.rsplit(".", 1)[-1] for n in pruned.rewrites} == {"bias"}
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-4
