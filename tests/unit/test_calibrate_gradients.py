"""Gradients piece by piece: those of autograd through the whole program at once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from surgeon.axes.contractions import contractions
from surgeon.calibrate import gradients
from surgeon.calibrate.data import Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.calibrate.loss import ROWS, slope_of_summed, summed
from surgeon.calibrate.running import Machine
from surgeon.calibrate.segments import segments
from surgeon.errors import SurgeonError
from surgeon.opening import Model, open_model
from surgeon.runtime.lower import lower
from tests import models

pytestmark = pytest.mark.slow

WINDOWS, LENGTH = 5, 9
NAMES = ("Llama", "GPT2", "Gemma2")
TIED = {"tie_word_embeddings": True}


@cache
def origin(name: str) -> Model:
    # A tied embedding is one parameter of two pieces: the first and the last.
    return open_model(models.tiny(name, **({} if name == "Llama" else TIED)))


def ids() -> torch.Tensor:
    return models.tokens(100, WINDOWS, LENGTH)


@cache
def plain(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """By parameter, each window's gradient; by map, each token's: through the whole program."""
    found = origin(name)
    maps = {c.param: c for c in contractions(found.program)}
    outs = tuple(c.out for c in maps.values())
    module = lower(replace(found.program, outputs=(*found.program.outputs, *outs)), found.read)
    weights = {
        p.name: module.get_parameter(p.name) for p in found.program.params if p.kind == "parameter"
    }
    for weight in weights.values():
        weight.requires_grad_()
    by_window: dict[str, list[torch.Tensor]] = {name: [] for name in weights}
    by_token: dict[str, list[torch.Tensor]] = {name: [] for name in maps}
    for window in ids():
        row = window[None]
        logits, *made = module(row, torch.ones_like(row), torch.arange(LENGTH)[None])
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[1:], reduction="sum")
        slopes = torch.autograd.grad(loss, [*weights.values(), *made])
        for key, slope in zip(weights, slopes, strict=False):
            by_window[key].append(slope / (LENGTH - 1))
        for key, slope in zip(maps, slopes[len(weights) :], strict=True):
            by_token[key].append(slope.reshape(-1, slope.shape[-1]))
    return (
        {key: torch.stack(g) for key, g in by_window.items()},
        {key: torch.cat(g) for key, g in by_token.items()},
    )


def gathered(name: str, **options: Any) -> Gathered:
    found = origin(name)
    return Gathered(found.axes, found.read, Windows(ids().numpy()), **options)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected.float(), rtol=2e-4, atol=2e-5 * size)


@pytest.mark.parametrize("name", NAMES)
def test_first_order_and_diagonal_fisher(name: str) -> None:
    """The tied embeddings of GPT-2 and Gemma 2 get the sum of both uses, squared as a sum."""
    pieces = segments(origin(name).program)
    tables = ("embed_tokens.weight", "wte.weight")
    uses = [p for piece in pieces for p in piece.params if p.endswith(tables)]
    assert len(uses) == (1 if name == "Llama" else 2)
    expected, _ = plain(name)
    found = gathered(name).gradients(tuple(expected))
    assert set(found) == set(expected)
    for key, windows in expected.items():
        assert found[key].count == WINDOWS
        near(found[key].mean, windows.mean(0))
        near(found[key].square, windows.square().mean(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_kronecker_factor_of_outputs(name: str) -> None:
    _, expected = plain(name)
    found = gathered(name).fisher(tuple(expected))
    for key, tokens in expected.items():
        assert found[key].count == WINDOWS * LENGTH
        assert found[key].second.dtype == torch.float32
        near(found[key].second, tokens.T @ tokens / len(tokens))


def test_blocks_and_batches_change_nothing() -> None:
    expected, tokens = plain("Llama")
    found = origin("Llama")
    params = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")
    out = {c.param: c.out for c in contractions(found.program)}
    slopes, fisher = gradients.there_and_back(
        found.program,
        found.read,
        ids(),
        params=params,
        outputs=[out[params[1]]],
        machine=Machine(tokens=LENGTH),
        kept=2 * LENGTH,
    )
    for key in params:
        assert slopes[key].count == WINDOWS
        near(slopes[key].mean, expected[key].mean(0))
        near(slopes[key].square, expected[key].square().mean(0))
    rows = tokens[params[1]]
    near(fisher[out[params[1]]].second, rows.T @ rows / len(rows))


def test_only_what_is_asked_for_is_held_and_only_pieces_after_it_are_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[tuple[str, ...]] = []
    real = gradients._Back.slope

    def slope(self: Any, running: Any, *args: Any, **options: Any) -> Any:
        taken.append(running.piece.params)
        return real(self, running, *args, **options)

    monkeypatch.setattr(gradients._Back, "slope", slope)
    name = "model.layers.1.mlp.up_proj.weight"
    found = gathered("Llama").gradients([name])
    assert set(found) == {name}
    assert taken and not any("layers.0." in p or "self_attn" in p for t in taken for p in t)


def test_the_summed_loss_is_that_of_the_next_token() -> None:
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    row = torch.tensor([[1, 2, 3, 4], [0, 6, 5, 1]])
    by_hand = -sum(
        float(logits[w, t].log_softmax(-1)[row[w, t + 1]]) for w in range(2) for t in range(3)
    )
    assert float(summed(logits, row)) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("length", [4, ROWS + 1, ROWS + 5])
def test_the_slope_of_the_loss_is_its_gradient(length: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, length, 7, generator=draw).requires_grad_()
    rows = torch.randint(7, (2, length), generator=draw)
    (wanted,) = torch.autograd.grad(summed(logits, rows), logits)
    torch.testing.assert_close(slope_of_summed(logits.detach(), rows), wanted)


def test_what_has_no_gradient_is_refused() -> None:
    for name, why in (
        ("nothing.weight", "no such parameter"),
        ("model.rotary_emb.inv_freq", "is a"),
    ):
        with pytest.raises(SurgeonError) as caught:
            gathered("Llama").gradients([name])
        assert caught.value.at == name and why in caught.value.why


def test_a_gradient_that_is_no_number_is_refused_with_its_place() -> None:
    found = origin("Llama")
    broken = "model.layers.1.mlp.down_proj.weight"

    def get(name: str) -> torch.Tensor:
        tensor = found.read(name)
        return tensor * float("inf") if name == broken else tensor

    data = Gathered(found.axes, get, Windows(ids().numpy()))
    with pytest.raises(SurgeonError) as caught:
        data.gradients(["model.layers.0.mlp.up_proj.weight"])
    assert "model.layers.1.mlp.down_proj" in caught.value.at
