"""Pieces of a program, and the moments that they gather."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgeon.axes.contractions import contractions
from surgeon.calibrate import moments
from surgeon.calibrate.segments import segments
from surgeon.calibrate.statistics import observe
from surgeon.errors import SurgeonError
from surgeon.opening import open_model
from surgeon.runtime.lower import lower
from tests import models

pytestmark = pytest.mark.slow


def inputs(length: int = 9) -> tuple[torch.Tensor, ...]:
    ids = models.tokens(100, 4, length)
    return ids, torch.ones_like(ids), torch.arange(length).expand(4, -1)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPTNeoX", "OPT"])
def test_pieces_one_after_the_other_are_the_program(name: str) -> None:
    origin = open_model(models.tiny(name))
    pieces = segments(origin.program)
    assert pieces[0].given is None and pieces[-1].passed is None
    assert all(a.passed == b.given for a, b in pairwise(pieces))
    state: Any = None
    with torch.no_grad():
        for piece in pieces:
            module = lower(piece.program, origin.read)
            state = module(*inputs(), *(() if state is None else (state,)))
        assert torch.equal(state, lower(origin.program, origin.read)(*inputs()))


def test_a_piece_is_one_branch_of_one_layer_and_reads_its_weights_alone() -> None:
    origin = open_model(models.tiny("Llama"))
    heavy = [p for p in segments(origin.program) if len(p.params) > 2]
    assert len(heavy) == 2 * models.tiny("Llama").config.num_hidden_layers
    for i, piece in enumerate(heavy):
        layers = {n.split(".")[2] for n in piece.params if n.startswith("model.layers")}
        assert layers == {str(i // 2)}


def test_moments_are_those_of_what_the_modules_saw() -> None:
    model = models.tiny("Llama")
    origin = open_model(model)
    ids = inputs()[0]
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        return lambda module, args: seen.__setitem__(name + ".weight", args[0])

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    found = {
        param: moments
        for part in observe(origin.program, origin.read, ids, tokens=9)
        for param, moments in part.moments.items()
    }
    assert set(found) == set(seen) == {c.param for c in contractions(origin.program)}
    for name, x in seen.items():
        rows = x.reshape(-1, x.shape[-1]).double()
        moments = found[name]
        assert moments.count == 36 and moments.second is not None
        torch.testing.assert_close(moments.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
        second = rows.T @ rows / len(rows)
        torch.testing.assert_close(moments.second.double(), second, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.square, moments.second.diagonal(), rtol=1e-4, atol=1e-4)


def test_a_transposed_weight_is_summed_over_its_first_dimension() -> None:
    origin = open_model(models.tiny("GPT2"))
    found = {c.param: c.dim for c in contractions(origin.program)}
    assert found["transformer.h.0.attn.c_attn.weight"] == 0
    assert found["lm_head.weight"] == 1


def test_only_norms_and_only_some() -> None:
    origin = open_model(models.tiny("Llama"))
    name = "model.layers.1.mlp.down_proj.weight"
    (found,) = [
        part.moments
        for part in observe(origin.program, origin.read, inputs()[0], params=[name], full=False)
        if part.moments
    ]
    assert set(found) == {name} and found[name].second is None


def test_weights_are_read_when_it_is_their_turn() -> None:
    origin = open_model(models.tiny("Llama"))
    read: list[str] = []

    def get(name: str) -> torch.Tensor:
        read.append(name)
        return origin.read(name)

    walk = observe(origin.program, get, inputs()[0])
    for _ in range(2):
        next(walk)
    assert any("layers.0" in n for n in read) and not any("layers.1" in n for n in read)


def test_values_that_are_no_numbers_are_noticed_where_they_arise() -> None:
    origin = open_model(models.tiny("Llama"))
    broken = "model.layers.1.mlp.up_proj.weight"

    def get(name: str) -> torch.Tensor:
        tensor = origin.read(name)
        return tensor * float("nan") if name == broken else tensor

    with pytest.raises(SurgeonError) as caught:
        list(observe(origin.program, get, inputs()[0]))
    assert "model.layers.1" in caught.value.at


@given(rows=st.integers(0, 9), width=st.integers(1, 40))
def test_a_mirrored_product_is_the_whole_one(rows: int, width: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moments, "_NARROW", 3)
        found = moments.gram(x)
    torch.testing.assert_close(found, x.T @ x)
    assert torch.equal(found, found.T)
