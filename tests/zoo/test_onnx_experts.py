"""Mixtures of experts as decoder graphs: each expert computes what it is sent, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from surgeon.axes.plan import Plan
from surgeon.emit.onnx_decoder import Options, write_decoder
from surgeon.emit.ort.decoder import lower_decoder
from surgeon.opening import Model, open_model
from tests import mixtures
from tests.decoding import largest, stepwise
from tests.exactness import Subject, prunable, random_cut, subject_of
from tests.models import tokens

pytestmark = pytest.mark.zoo
every = pytest.mark.parametrize("name", mixtures.MIXTURES)
styles = pytest.mark.parametrize("style", ["ort", "standard"])

TOLERANCE = 2e-4


@cache
def opened(name: str) -> Model:
    return open_model(mixtures.tiny(name))


@cache
def subject(name: str) -> Subject:
    return subject_of(mixtures.tiny(name))


def loops(graph: onnx_ir.Graph) -> Iterator[onnx_ir.Node]:
    return (node for node in graph if node.op_type == "Loop")


@styles
@every
def test_prefill_and_steps_give_the_models_logits(name: str, style: str, tmp_path: Path):
    path = tmp_path / "model.onnx"
    options = Options(style, positions=64)
    origin = opened(name)
    write_decoder(origin.program, origin.read, path, options=options, check=False)
    ids = tokens(100, 2, 11)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        wanted = mixtures.tiny(name)(input_ids=ids).logits
    assert largest(stepwise(path, ids, mask, [11]), wanted, mask) < TOLERANCE
    # One token at a time: fewer experts are used than there are.
    assert largest(stepwise(path, ids, mask, [1] * 11), wanted, mask) < TOLERANCE
    assert sum(n.op_type == "Loop" for n in onnx.load(path).graph.node) == _sparse(name)


def _sparse(name: str) -> int:
    return sum(
        any(hasattr(m, "_apply_gate") for m in layer.modules())
        for layer in mixtures.tiny(name).model.layers
    )


@every
def test_half_precision(name: str, tmp_path: Path):
    origin = opened(name)
    options = Options("ort", "fp16", positions=64)
    found = write_decoder(origin.program, origin.read, tmp_path / "model.onnx", options=options)
    assert found.largest is not None and found.largest < 2e-2


@every
def test_fewer_and_narrower_experts(name: str, tmp_path: Path):
    made, rng = subject(name), np.random.default_rng(0)
    experts = [a for a in prunable(made.axes) if a.role == "experts"]
    widths = [a for a in prunable(made.axes) if a.role == "ffn" and a.outer]
    assert experts and widths
    cuts = [random_cut(made.axes, a, rng, keep=a.size - 1) for a in experts]
    cuts += [random_cut(made.axes, a, rng, keep=a.size // 2) for a in widths]
    program, weights = made.small(Plan(cuts=tuple(cuts)))
    found = write_decoder(program, weights, tmp_path / "m.onnx", options=Options(positions=64))
    assert found.largest is not None and found.largest < TOLERANCE


def test_an_expert_that_is_sent_nothing_is_not_computed():
    """Weights that aren't numbers stand where no token is sent: they are never read."""
    model = mixtures.build("Mixtral", num_hidden_layers=1)
    ids = tokens(100, 1, 1)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        block = model.model.layers[0].mlp
        seen: list[torch.Tensor] = []
        hook = block.experts.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
        model(input_ids=ids)
        hook.remove()
        idle = sorted(set(range(4)) - set(seen[0].flatten().tolist()))
        assert idle
        block.experts.gate_up_proj[idle] = float("nan")
    origin = open_model(model)
    made = lower_decoder(origin.program, origin.read, style="ort", dtype="fp32", positions=8)
    assert [n.op_type for n in loops(made.model.graph)] == ["Loop"]
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(made.model).SerializeToString())
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, 1), np.int64)}
    for value in session.get_inputs()[2:]:
        feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    found = torch.from_numpy(session.run(None, feed)[0])
    assert float((found - wanted).abs().max() / wanted.abs().max()) < TOLERANCE
