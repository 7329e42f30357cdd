"""Exponents that make a back end's plain average give what the masked model's gives."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from surgeon.axes.fold import Fold, Unfoldable, folds
from surgeon.capture.model import capture_model, capture_module
from surgeon.ir import Program
from surgeon.runtime.lower import lower
from tests import models
from tests.exactness import left_padded, weights_of

SHARE = 0.37


def averages(program: Program, module: str = "") -> list[int]:
    return [
        i
        for i, op in enumerate(program.ops)
        if op.target == "aten.mean.dim" and re.search(module, op.module)
    ]


def back_end(
    program: Program,
    weights: Mapping[str, torch.Tensor],
    found: Mapping[str, Fold],
    shares: Mapping[int, float],
    inputs: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """What a back end gives that averages over a share of the channels, after folding.

    An average over kept channels is the average over all of them, the rest zero, divided by the
    share; so the identity can be tested with no channel removed.
    """

    def mean(share: float) -> Callable[..., torch.Tensor]:
        return lambda x, dims, keepdim=False: x.mean(dims, keepdim=keepdim) / share

    def get(name: str) -> torch.Tensor:
        fold = found.get(name)
        if fold is None:
            return weights[name]
        (share,) = set(shares.values())
        factor = math.sqrt(share) ** float(fold.exponent)
        return ((weights[name].double() + fold.offset) * factor - fold.offset).float()

    with torch.no_grad():
        return lower(program, get, change={i: mean(s) for i, s in shares.items()})(*inputs)


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


# --- small programs ----------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, size: int, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)
        return x * (self.weight + self.offset if self.offset else self.weight)


class Block(nn.Module):
    """Embedding, one residual branch, final norm, head: every kind of role a weight can have."""

    def __init__(self, *, tied: bool = False, post: bool = False, offset: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.norm = Norm(8, offset)
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)
        self.post = Norm(8, offset) if post else None
        self.final = Norm(8, offset)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        y = self.down(torch.nn.functional.silu(self.up(self.norm(x))))
        x = x + (y if self.post is None else self.post(y))
        return self.head(self.final(x))


IDS = torch.arange(10).reshape(2, 5)


def captured(module: nn.Module, inputs: tuple[Any, ...] = (IDS,)) -> tuple[Program, dict[str, Any]]:
    found, exported = capture_module(module, inputs)
    return found.program, {**exported.state_dict, **exported.constants, **found.constants}


BASE = {"embed.weight": 1, "down.weight": 1, "down.bias": 1, "norm.weight": -1}
SMALL: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "untied": ({}, {**BASE, "final.weight": -1}),
    "tied": ({"tied": True}, {**BASE, "final.weight": -2}),
    "post-norm": ({"post": True}, {**BASE, "final.weight": -1}),
    "one and more": ({"offset": 1.0}, {**BASE, "final.weight": -1}),
    "all of it": ({"tied": True, "post": True, "offset": 1.0}, {**BASE, "final.weight": -2}),
}


@pytest.mark.parametrize("name", SMALL)
def test_exponents_of_a_block(name: str):
    options, wanted = SMALL[name]
    program, weights = captured(Block(**options))
    found = folds(program, frozenset(averages(program)), {})
    assert {n: int(f.exponent) for n, f in found.items()} == wanted
    offset = options.get("offset", 0.0)
    assert {n: f.offset for n, f in found.items()} == {
        n: offset if "norm" in n or "final" in n else 0.0 for n in wanted
    }
    with torch.no_grad():
        truth = lower(program, weights)(IDS)
    shares = dict.fromkeys(averages(program), SHARE)
    assert relative(back_end(program, weights, found, shares, (IDS,)), truth) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_every_fold_of_a_block_is_needed(name: str):
    program, weights = captured(Block(**SMALL[name][0]))
    shares = dict.fromkeys(averages(program), SHARE)
    found = folds(program, frozenset(shares), {})
    with torch.no_grad():
        truth = lower(program, weights)(IDS)
    for left_out in found:
        rest = {n: f for n, f in found.items() if n != left_out}
        assert relative(back_end(program, weights, rest, shares, (IDS,)), truth) > 1e-3, left_out
    for name_, fold in found.items():
        if fold.offset:
            wrong = {**found, name_: Fold(fold.exponent)}
            assert relative(back_end(program, weights, wrong, shares, (IDS,)), truth) > 1e-3


def test_nothing_is_folded_where_no_average_lost_channels():
    program, _ = captured(Block())
    assert folds(program, frozenset(), {}) == {}


def test_a_part_of_the_averages_of_one_stream_cannot_be_folded():
    program, _ = captured(Block())
    with pytest.raises(Unfoldable):
        folds(program, frozenset(averages(program)[:1]), {})


class Fixed(Block):
    """Like Gemma: the embedding times a constant that the back end computes by itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) * self.scale
        x = x + self.down(torch.nn.functional.silu(self.up(self.norm(x))))
        return self.head(self.final(x))


@pytest.mark.parametrize("tied", [False, True])
def test_a_constant_that_is_off_by_a_power_takes_the_place_of_the_embedding(tied: bool):
    program, weights = captured(Fixed(tied=tied, offset=1.0))
    (scale,) = [p.name for p in program.params if p.kind in ("computed", "constant")]
    shares = dict.fromkeys(averages(program), SHARE)
    found = folds(program, frozenset(shares), {scale: Fraction(1)})
    # The table is left alone, so a tied head needs no second power either.
    assert {n: int(f.exponent) for n, f in found.items()} == {
        **{n: e for n, e in BASE.items() if n != "embed.weight"},
        "final.weight": -1,
    }
    with torch.no_grad():
        truth = lower(program, weights)(IDS)
    theirs = {**weights, scale: weights[scale] * math.sqrt(SHARE)}
    assert relative(back_end(program, theirs, found, shares, (IDS,)), truth) < 1e-5
    plain = folds(program, frozenset(shares), {})
    assert plain["embed.weight"].exponent == 1
    assert plain["final.weight"].exponent == (-2 if tied else -1)


class Barrier(nn.Module):
    """A map that commutes with no factor, between the stream and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = Norm(8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.tanh(self.embed(ids)))


def test_a_nonlinear_producer_cannot_be_scaled():
    program, _ = captured(Barrier())
    with pytest.raises(Unfoldable) as caught:
        folds(program, frozenset(averages(program)), {})
    assert "norm" in str(caught.value) or "the model" in str(caught.value)


class TwiceUsed(nn.Module):
    """A weight used as itself plus one, and as itself: no single factor suits both."""

    def __init__(self, *, cast: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cast = cast
        self.embed = nn.Embedding(11, 8)
        self.weight = nn.Parameter((torch.rand(8) + 0.5).to(torch.float64 if cast else None))
        self.other = nn.Parameter(torch.rand(8) + 0.5)
        self.head = nn.Linear(8, 11)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)
        weight = self.weight.to(torch.float32) if self.cast else self.weight
        return self.head(x * (1.0 + weight)) + (weight * self.other).sum()


@pytest.mark.parametrize("cast", [False, True])
def test_a_sum_with_a_number_is_only_seen_through_where_it_is_the_only_use(cast: bool):
    program, weights = captured(TwiceUsed(cast=cast))
    shares = dict.fromkeys(averages(program), SHARE)
    # The weight keeps its value; a factor goes to the head instead.
    found = folds(program, frozenset(shares), {})
    assert "weight" not in found and found["head.weight"].exponent == -1
    with torch.no_grad():
        truth = lower(program, weights)(IDS)
    assert relative(back_end(program, weights, found, shares, (IDS,)), truth) < 1e-5


def test_powers_and_roots_carry_fractions():
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Parameter(torch.rand(8) + 0.5)
            self.b = nn.Parameter(torch.rand(8) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a * x.abs()
            z = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 0.1)
            return torch.sqrt(z) * self.b / (z * z)

    x = torch.rand(3, 8) + 0.1
    program, weights = captured(Rooted(), (x,))
    shares = dict.fromkeys(averages(program), SHARE)
    found = folds(program, frozenset(shares), {})
    # y¹, z¹, √z^½ · b / z² = 0.
    assert {n: f.exponent for n, f in found.items()} == {"a": 1, "b": Fraction(3, 2)}
    with torch.no_grad():
        truth = lower(program, weights)(x)
    assert relative(back_end(program, weights, found, shares, (x,)), truth) < 1e-5


# --- architectures -----------------------------------------------------------------------------

LLAMA = {
    "embed_tokens.weight": 1,
    "o_proj.weight": 1,
    "down_proj.weight": 1,
    "input_layernorm.weight": -1,
    "post_attention_layernorm.weight": -1,
}
POST = {
    "o_proj.weight": 1,
    "down_proj.weight": 1,
    "input_layernorm.weight": -1,
    "pre_feedforward_layernorm.weight": -1,
}
OLMO = {
    "embed_tokens.weight": 1,
    "q_proj.weight": -1,
    "k_proj.weight": -1,
    "gate_proj.weight": -1,
}
FINAL = "norm.weight"
BY_HAND: dict[str, tuple[Mapping[str, int], int, int]] = {
    # name: exponents, that of the final norm, and with a tied head
    "Llama": (LLAMA, -1, -2),
    "Mistral": (LLAMA, -1, -2),
    "Qwen2": (LLAMA, -1, -2),
    "Qwen3": (LLAMA, -1, -2),
    "Granite": (LLAMA, -1, -2),
    "SmolLM3": (LLAMA, -1, -2),
    "Phi3": (LLAMA, -1, -2),
    "Gemma": ({k: v for k, v in LLAMA.items() if "embed" not in k}, -1, -1),
    "Gemma2": (POST, -1, -1),
    "Gemma3Text": (POST, -1, -1),
    "Olmo2": (OLMO, -1, -2),
}


@cache
def architecture(name: str, tied: bool) -> tuple[Program, dict[str, torch.Tensor]]:
    model = models.tiny(name, tie_word_embeddings=tied)
    found = capture_model(model)
    return found.program, weights_of(model, found)


def over_hidden(name: str, program: Program) -> list[int]:
    return [i for i in averages(program) if not re.search(r"\.(q|k)_norm$", program.ops[i].module)]


def embed_scale(program: Program) -> dict[str, Fraction]:
    return {p.name: Fraction(1) for p in program.params if p.name.endswith("embed_scale")}


def short(names: Mapping[str, Fold]) -> dict[str, int]:
    """Exponents by the last two parts of the name, the same in every layer."""
    out: dict[str, set[int]] = {}
    for name, fold in names.items():
        out.setdefault(".".join(name.split(".")[-2:]), set()).add(int(fold.exponent))
    assert all(len(values) == 1 for values in out.values()), out
    return {name: values.pop() for name, values in out.items()}


@pytest.mark.zoo
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_exponents_of_the_residual_width(name: str, tied: bool):
    program, weights = architecture(name, tied)
    shares = dict.fromkeys(over_hidden(name, program), SHARE)
    fixed = embed_scale(program)
    found = folds(program, frozenset(shares), fixed)
    exponents, final, final_tied = BY_HAND[name]
    assert short(found) == {**exponents, FINAL: final_tied if tied else final}
    assert {f.offset for n, f in found.items() if "norm" in n} == {
        1.0 if name.startswith("Gemma") else 0.0
    }
    inputs = left_padded()
    real = inputs[1].bool()
    with torch.no_grad():
        truth = lower(program, weights)(*inputs)[real]
    theirs = {n: w * math.sqrt(SHARE) if n in fixed else w for n, w in weights.items()}
    assert relative(back_end(program, theirs, found, shares, inputs)[real], truth) < 1e-4
    for what in short(found):
        rest = {n: f for n, f in found.items() if not n.endswith("." + what)}
        wrong = back_end(program, theirs, rest, shares, inputs)[real]
        assert relative(wrong, truth) > 1e-3, f"the fold into {what} does nothing"


@pytest.mark.zoo
def test_exponents_of_heads_where_a_norm_spans_them():
    program, weights = architecture("Olmo2", False)
    spanning = averages(program, r"\.(q|k)_norm$")
    found = folds(program, frozenset(spanning), {})
    assert short(found) == {
        "q_proj.weight": 1,
        "k_proj.weight": 1,
        "q_norm.weight": -1,
        "k_norm.weight": -1,
    }
    inputs = left_padded()
    shares = dict.fromkeys(spanning, SHARE)
    with torch.no_grad():
        truth = lower(program, weights)(*inputs)
    assert relative(back_end(program, weights, found, shares, inputs), truth) < 1e-4


@pytest.mark.zoo
def test_exponents_of_rotary_pairs_under_a_norm_per_head():
    program, weights = architecture("Qwen3", False)
    within = averages(program, r"\.(q|k)_norm$")
    found = folds(program, frozenset(within), {})
    assert set(short(found).values()) == {1, -1} and len(found) == 8
    inputs = left_padded()
    with torch.no_grad():
        truth = lower(program, weights)(*inputs)
    shares = dict.fromkeys(within, SHARE)
    assert relative(back_end(program, weights, found, shares, inputs), truth) < 1e-4


@pytest.mark.zoo
def test_a_bias_is_scaled_with_its_producer_and_only_there():
    model = models.tiny("Llama", attention_bias=True, mlp_bias=True)
    program = capture_model(model).program
    found = folds(program, frozenset(averages(program)), {})
    scaled: Collection[str] = {n.split(".", 3)[3] for n in found if n.endswith(".bias")}
    assert scaled == {"self_attn.o_proj.bias", "mlp.down_proj.bias"}
