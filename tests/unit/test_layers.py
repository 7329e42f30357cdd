"""The shape of each layer as the axes tell it, and the configuration fields that say so."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from surgeon.axes import Axes, analyse
from surgeon.axes.plan import Plan, cut
from surgeon.capture.model import capture_model
from surgeon.emit.hf_config import Biases, Shape, original, per_layer, stock
from surgeon.emit.layers import LayerShape, layer_shapes
from tests import models

pytestmark = pytest.mark.slow


@cache
def axes_of(name: str, **overrides: Any) -> Axes:
    return analyse(capture_model(models.tiny(name, **overrides)).program)


def plan_of(axes: Axes, roles: dict[str, float], only: str = "") -> Plan:
    cuts = [
        cut(axis, np.arange(axis.size - round(share * axis.size)))
        for role, share in roles.items()
        for axis in axes.of_role(role)
        if only in axis.name
    ]
    return Plan(tuple(cuts))


def config_says(config: Any) -> dict[str, int]:
    heads = config.num_attention_heads
    return {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "qk": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "v": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "ffn": next(
            getattr(config, n)
            for n in ("intermediate_size", "ffn_dim", "n_inner")
            if getattr(config, n, None)
        )
        if type(config).__name__ != "GPT2Config"
        else 4 * config.n_embd,
    }


@pytest.mark.parametrize(
    "name",
    ["Llama", *(pytest.param(n, marks=pytest.mark.zoo) for n in models.ARCHITECTURES[1:])],
)
def test_whole_layers_are_what_the_config_says(name: str):
    axes = axes_of(name)
    wanted = config_says(models.config(name))
    shapes = layer_shapes(axes, Plan())
    assert len(shapes) == 2
    for number, shape in enumerate(shapes):
        assert shape.path.endswith(f".{number}")
        assert {n: getattr(shape, n) for n in wanted} == wanted
        assert shape.attention and shape.mlp and shape.scale > 0


def test_widths_after_a_plan():
    axes = axes_of("Llama")
    whole = layer_shapes(axes, Plan())
    roles = {"ffn": 0.25, "kv_heads": 1 / 3, "q_per_kv": 0.5, "v": 0.5, "rotary": 0.25}
    first, second = layer_shapes(axes, plan_of(axes, roles))
    assert (first.heads, first.kv_heads, first.qk, first.v, first.ffn) == (2, 2, 6, 4, 60)
    assert first.widths == second.widths
    # The literal survives: it is that of the full width.
    assert first.scale == whole[0].scale == pytest.approx(8**-0.5)


def test_layers_differ_where_the_plan_does():
    axes = axes_of("Llama")
    first, second = layer_shapes(axes, plan_of(axes, {"ffn": 0.5, "kv_heads": 2 / 3}, "layers.1"))
    assert (first.ffn, first.kv_heads, first.heads) == (80, 3, 6)
    assert (second.ffn, second.kv_heads, second.heads) == (40, 1, 2)
    assert first.widths != second.widths


def test_dropped_branches_leave_nothing():
    axes = axes_of("Llama")
    names = ("model.layers.0/attention", "model.layers.1/attention", "model.layers.1/mlp")
    first, second = layer_shapes(axes, Plan(branches=names))
    assert not first.attention and first.mlp and first.ffn == 80
    assert not second.attention and not second.mlp
    assert second == LayerShape("model.layers.1")


def test_windows_are_those_of_each_layer():
    axes = axes_of("Gemma2", num_hidden_layers=4, sliding_window=5)
    assert [s.window for s in layer_shapes(axes, Plan())] == [5, None, 5, None]
    # The window is no width: a model may be uniform with windows in some layers only.
    assert len({s.widths for s in layer_shapes(axes, Plan())}) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        {"intermediate_size": 1},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        {"head_dim": 2},
    ],
    ids=str,
)
def test_a_width_of_one_is_a_width(overrides: dict[str, int]):
    """An axis of one index is no axis, and must not be taken for a missing branch."""
    axes = axes_of("Llama", **overrides)
    wanted = config_says(models.config("Llama", **overrides))
    for shape in layer_shapes(axes, Plan()):
        assert {n: getattr(shape, n) for n in wanted} == wanted


# --- configuration fields ----------------------------------------------------------------------


SLIDING = {"num_hidden_layers": 4, "use_sliding_window": True}


def shape_of(config: Any, kept: tuple[int, ...], **changes: Any) -> Shape:
    base: dict[str, Any] = {**config_says(config), "scale": 1.0, **changes}
    layers = tuple(LayerShape(f"layers.{i}", **base) for i in kept)
    return Shape(int(config.hidden_size), layers, kept)


def rewritten(name: str, kept: tuple[int, ...], **overrides: Any) -> Any:
    config = models.config(name, **overrides)
    cls = type(models.tiny(name))
    return config, original(config, cls, shape_of(config, kept)).config


@pytest.mark.parametrize(
    ("name", "overrides", "kept"),
    [
        ("Gemma2", {"num_hidden_layers": 6}, (0, 2, 3)),
        ("Gemma3Text", {"num_hidden_layers": 8}, (1, 5, 7)),
        ("Qwen2", {**SLIDING, "max_window_layers": 2}, (1, 3)),
        ("Qwen3", {**SLIDING, "max_window_layers": 1}, (0, 3)),
        ("SmolLM3", {"num_hidden_layers": 8}, (2, 3, 6, 7)),
    ],
)
def test_kept_layers_keep_their_own_kind(
    name: str, overrides: dict[str, Any], kept: tuple[int, ...]
):
    """What a class derives from a layer's number must not be derived anew for the new number."""
    before, after = rewritten(name, kept, **overrides)
    assert after.num_hidden_layers == len(kept)
    assert after.layer_types == [before.layer_types[i] for i in kept]
    found = getattr(before, "no_rope_layers", None)
    if found:
        assert after.no_rope_layers == [found[i] for i in kept]
    again = type(after).from_dict(after.to_dict())  # as a stored file is read
    assert again.layer_types == after.layer_types


@pytest.mark.parametrize("tokens", [[1, 2], [1, 2, 3]])
def test_lists_that_are_as_long_by_chance_stay(tokens: list[int]):
    depth = len(tokens)
    _, after = rewritten("Llama", (0,), num_hidden_layers=depth, eos_token_id=tokens)
    assert after.eos_token_id == tokens and after.num_hidden_layers == 1


def test_a_width_that_the_class_does_not_declare_is_written_where_it_must_be():
    config = models.config("Granite", head_dim=8)
    del config.head_dim
    cls = type(models.tiny("Granite"))
    plain = original(config, cls, shape_of(config, (0, 1))).config
    assert not hasattr(plain, "head_dim")
    fewer = original(config, cls, shape_of(config, (0, 1), heads=4, kv_heads=2)).config
    assert fewer.head_dim == 8 and fewer.num_attention_heads == 4
    assert type(fewer).from_dict(fewer.to_dict()).head_dim == 8


def test_fields_under_older_names():
    config = models.config("GPT2")
    after = original(
        config, type(models.tiny("GPT2")), Shape(36, (LayerShape("h.0", 6, 6, 6, 6, 100),), (0,))
    ).config
    assert (after.n_embd, after.n_inner, after.n_layer, after.n_head) == (36, 100, 1, 6)
    config = models.config("OPT")
    after = original(
        config, type(models.tiny("OPT")), Shape(36, (LayerShape("h.0", 6, 6, 6, 6, 50),), (0,))
    ).config
    assert (after.hidden_size, after.word_embed_proj_dim, after.ffn_dim) == (36, 36, 50)


def test_quantisation_of_the_source_is_not_carried():
    config = models.config("Llama")
    config.quantization_config = {"quant_method": "fp8"}
    after = original(config, type(models.tiny("Llama")), shape_of(config, (0, 1))).config
    assert not hasattr(after, "quantization_config")


def test_only_llama_is_written_as_another_class():
    def labels(name: str) -> list[str]:
        config = models.config(name)
        made = stock(config, type(models.tiny(name)), shape_of(config, (0, 1)))
        return [label for label, _ in made]

    assert labels("Llama") == ["LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM"]
    assert labels("Mistral") == ["MistralForCausalLM"]
    assert labels("Qwen3") == ["Qwen3ForCausalLM"]


def packaged(config: Any, shape: Shape, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "rotary_dim": 8,
        "rotary_pairs": None,
        "norm_mean_scale": 1.0,
        "qk_norm_mean_scale": 1.0,
        **changes,
    }
    return per_layer(config, shape, Biases(False, False, False, False), **given)


def test_per_layer_fields_hold_what_differs_and_nothing_else():
    config = models.config("Llama", num_hidden_layers=4)
    full: dict[str, Any] = {**config_says(config), "scale": 0.25}
    layers = (
        LayerShape("layers.0", **full),
        LayerShape("layers.2", **{**full, "ffn": 30, "kv_heads": 1, "heads": 2}),
        LayerShape("layers.3", ffn=80),
    )
    data = packaged(config, Shape(48, layers, (0, 2, 3)))
    assert data["per_layer_config"] == {
        "1": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 30},
        "2": {"skip": ["attention"]},
    }
    assert data["num_hidden_layers"] == 3 and data["layer_types"] == ["full_attention"] * 3
    assert data["attention_scaling"] == 0.25 and data["head_dim"] == data["v_head_dim"] == 8
    assert data["rope_parameters"] == config.to_dict()["rope_parameters"]
    assert data["source_model_type"] == "llama"


def test_layers_alike_have_no_per_layer_fields():
    config = models.config("Llama")
    data = packaged(config, shape_of(config, (0, 1)), rotary_pairs=[0, 2])
    assert "per_layer_config" not in data and data["rotary_pairs"] == [0, 2]


def test_sliding_layers_keep_their_window():
    config = models.config("Mistral", sliding_window=7)
    full: dict[str, Any] = {**config_says(config), "scale": 1.0}
    layers = (LayerShape("layers.0", **full, window=7), LayerShape("layers.1", **full))
    data = packaged(config, Shape(48, layers, (0, 1)))
    assert data["layer_types"] == ["sliding_attention", "full_attention"]
    assert data["sliding_window"] == 7
    without = packaged(config, Shape(48, layers[1:], (1,)))
    assert without["layer_types"] == ["full_attention"] and without["sliding_window"] is None
