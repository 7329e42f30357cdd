"""What may be pruned, and what the ratio is a share of."""

from __future__ import annotations

from functools import cache
from math import nan

import pytest
import torch
from torch import nn

from surgeon.axes import Axes, analyse
from surgeon.axes.budget import allowed, check_ratio, count, decoder_params
from surgeon.capture.model import capture_model, capture_module
from surgeon.errors import Code, SurgeonError
from tests import models

pytestmark = pytest.mark.slow


@cache
def llama(tied: bool = False) -> Axes:
    return analyse(capture_model(models.tiny("Llama", tie_word_embeddings=tied)).program)


@pytest.mark.parametrize("tied", [False, True])
def test_the_ratio_counts_what_lies_in_decoder_layers(tied: bool):
    axes = llama(tied)
    model = models.tiny("Llama", tie_word_embeddings=tied)
    inside = decoder_params(axes)
    assert set(inside) == {n for n, _ in model.named_parameters() if ".layers." in n}
    assert count(axes.program, inside) == sum(p.numel() for p in model.model.layers.parameters())


def test_everything_counts_where_there_are_no_layers():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(self.up(x).relu())

    axes = analyse(capture_module(Plain(), (torch.rand(2, 4),))[0].program)
    assert set(decoder_params(axes)) == {"up.weight", "up.bias", "down.weight", "down.bias"}
    assert count(axes.program, decoder_params(axes)) == 30 + 21


def test_layers_whose_numbers_begin_alike_are_told_apart():
    model = models.tiny("Llama", num_hidden_layers=11)
    axes = analyse(capture_model(model).program)
    found = allowed(axes, ["model.layers.1"], [])[0]
    assert "model.layers.10.mlp/ffn" in found and "model.layers.1.mlp/ffn" not in found


def test_names_that_parameters_lack_count_as_nothing():
    assert count(llama().program, ["model.norm.weight", "absent"]) == 48


def test_everything_prunable_is_allowed_at_first():
    axes = llama()
    found, branches = allowed(axes, [], [])
    assert found == {a.name for a in axes.axes if a.prunable}
    assert all(axes.by_name[n].role != "vocab" for n in found)
    assert branches == {b.name for b in axes.branches}


def test_an_axis_of_one_index_is_never_allowed():
    axes = analyse(capture_model(models.tiny("Llama", intermediate_size=1)).program)
    assert all(axes.by_name[n].size > 1 for n in allowed(axes, [], [])[0])


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("ffn", ["model.layers.0.mlp/ffn", "model.layers.1.mlp/ffn"]),
        ("model.layers.0.mlp/ffn", ["model.layers.0.mlp/ffn"]),
        ("*.0.mlp/*", ["model.layers.0.mlp/ffn"]),
        ("*.0.mlp.up_proj.weight", ["model.layers.0.mlp/ffn", "model/hidden"]),
        # Freezing a module freezes every axis that runs through it.
        ("model.layers.0.mlp", ["model.layers.0.mlp/ffn", "model/hidden"]),
        ("lm_head.*", ["model/hidden"]),
    ],
)
def test_freezing_leaves_alone_whatever_a_pattern_touches(pattern: str, gone: list[str]):
    axes = llama()
    every = allowed(axes, [], [])[0]
    hidden = axes.of_role("hidden")[0].name
    wanted = {hidden if name == "model/hidden" else name for name in gone}
    assert every - allowed(axes, [pattern], [])[0] == wanted


def test_freezing_a_layer_keeps_its_branches():
    axes = llama()
    every = allowed(axes, [], [])[1]
    gone = every - allowed(axes, ["model.layers.0"], [])[1]
    assert gone == {"model.layers.0/attention", "model.layers.0/mlp"}
    assert every - allowed(axes, ["layers"], [])[1] == every
    assert every - allowed(axes, ["model.layers.0.mlp.*"], [])[1] == {"model.layers.0/mlp"}


@pytest.mark.parametrize("pattern", ["model.layers.0", "model.layers.0.*", "*.layers.0*"])
def test_only_a_layer_leaves_the_residual_width_whole(pattern: str):
    """The width runs through that layer too; pruning it would change every other layer."""
    axes = llama()
    found, branches = allowed(axes, [], [pattern])
    assert {axes.by_name[n].role for n in found} == {"kv_heads", "q_per_kv", "v", "ffn"}
    assert all(n.startswith("model.layers.0.") for n in found)
    assert branches == {"model.layers.0/attention", "model.layers.0/mlp"}


def test_only_a_role_or_an_axis_by_name():
    axes = llama()
    assert {axes.by_name[n].role for n in allowed(axes, [], ["hidden"])[0]} == {"hidden"}
    assert allowed(axes, [], ["layers"]) == (frozenset(), {b.name for b in axes.branches})
    found, branches = allowed(axes, ["*.1.*"], ["ffn", "kv_heads"])
    assert {n.split("/")[0] for n in found} == {"model.layers.0.mlp", "model.layers.0.self_attn"}
    assert not branches


def test_a_pattern_that_matches_nothing_is_an_error():
    for freeze, only in ((["ffm"], []), ([], ["ffm"])):
        with pytest.raises(SurgeonError) as caught:
            allowed(llama(), freeze, only)
        assert caught.value.code == Code.NO_SUCH_AXIS and "ffm" in caught.value.what


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, nan, float("inf")])
def test_a_ratio_lies_strictly_between_nothing_and_all(value: float):
    with pytest.raises(SurgeonError) as caught:
        check_ratio(value, "--ratio")
    assert caught.value.code == Code.BAD_RATIO and caught.value.at == "--ratio"


def test_a_good_ratio_is_returned():
    assert check_ratio(1 / 3, "--ratio") == 1 / 3
