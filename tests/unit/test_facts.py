"""What models are, counted again in another way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from surgeon import exporting
from surgeon.opening import open_model
from surgeon.report import facts
from surgeon.runtime.model import open_session
from surgeon.viewing import costs_of
from tests import models
from tests.command import checkpoint


def holed(name: str, share: float = 0.3):
    """A model with zeros in all its parameters."""
    model = models.build(name)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand(parameter.shape, generator=draw) < share] = 0
    return model


def of(model) -> facts.Facts:
    opened = open_model(model)
    return facts.of_program("model", "", opened.axes, costs_of(opened), opened.read)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma"])
def test_zeros_are_those_of_linear_maps(name: str):
    """A tied embedding is one, an untied one and the norms' weights aren't; nor are biases."""
    model = holed(name)
    maps = [m.weight for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D")]
    weights = {id(w): w for w in maps}.values()
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert of(model).sparsity == pytest.approx(zeros / sum(w.numel() for w in weights))


def test_parameters_are_the_model_s_own():
    model = models.tiny("Llama")
    found = of(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.decoder_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert facts.module_bytes(model.float()) >= 4 * found.parameters


def test_tied_weights_are_in_memory_once():
    model = models.build("Llama", tie_word_embeddings=True)
    own = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert facts.module_bytes(model) == 4 * own + buffers


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("style", ["ort", "standard"])
def test_a_graph_has_the_parameters_and_zeros_of_its_checkpoint(
    tmp_path: Path, style: str, tied: bool
):
    model = models.build("Llama", tie_word_embeddings=tied)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:7] = 0
    source = checkpoint(tmp_path / "m", model)
    out = tmp_path / "onnx"
    exporting.export(str(source), "onnx", out, style=style, check=False)
    session = open_session(out, device="cpu")
    found, wanted = facts.of_graph(session.path, session), of(model)
    assert found.parameters == wanted.parameters
    assert found.sparsity == pytest.approx(wanted.sparsity) and found.sparsity > 0
    assert found.cache_bytes == wanted.cache_bytes
    assert found.disk_bytes == sum(f.stat().st_size for f in out.glob("model.onnx*"))
    assert 4 * found.parameters <= found.memory_bytes < 4 * found.parameters + 20_000
    assert found.flops is None and "captured" in found.unknown["flops"]


def test_a_quantised_graph_says_so(tmp_path: Path):
    source = checkpoint(tmp_path / "m", models.tiny("Llama"), models.tokenizer())
    out = tmp_path / "onnx"
    exporting.export(str(source), "onnx", out, quantize="w8", check=False)
    session = open_session(out, device="cpu")
    found = facts.of_graph(session.path, session)
    assert found.sparsity is None and found.parameters is None
    assert "quantised" in found.unknown["sparsity"] and found.disk_bytes > 0


def test_no_tensor_has_no_zeros():
    assert facts.zeros([]) is None
    assert facts.zeros([torch.tensor([0.0, 1.0]), torch.tensor([[np.nan, -0.0]])]) == 2 / 4
