"""Transformers configurations of pruned models: which fields and classes say what.

This is the one place that knows configuration field names. What a candidate really means is not
believed from its fields: the model it describes is built without values and compared.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from surgeon.emit.layers import LayerShape

HIDDEN = ("hidden_size", "n_embd", "word_embed_proj_dim")
FFN = ("intermediate_size", "ffn_dim", "n_inner")
EXPERT_FFN = ("moe_intermediate_size",)
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERT_GROUPS = ("n_group",)
SHARED_FFN = ("shared_expert_intermediate_size",)
SHARED = ("n_shared_experts",)
"""How many experts' widths make up that of the MLP beside them."""
HEADS = ("num_attention_heads", "n_head")
KV_HEADS = ("num_key_value_heads",)
HEAD_DIM = ("head_dim",)
ROTATED, NOT_ROTATED = "qk_rope_head_dim", ("qk_nope_head_dim",)
"""Of multi-head latent attention."""
V_HEAD_DIM = ("v_head_dim",)
DEPTH = ("num_hidden_layers", "n_layer")
LISTS = ("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type")
"""Fields with one entry a layer; other lists (several end tokens) may be as long by chance."""

PACKAGED = "surgeon_pruned"
"""Model type of the packaged modelling file."""

VLLM_TYPE = "nemotron-nas"
"""Model type of vLLM's class for layers that differ."""

PER_LAYER_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Families whose decoder layer the packaged modelling file spells out."""


def family(config: Any) -> str:
    """Returns the model type that parameters are named after, also of an earlier result."""
    if config.model_type == PACKAGED:
        return str(config.source_model_type)
    return str(config.model_type)


_COMMON = (
    *("vocab_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    *("rope_parameters", "attention_dropout", "dtype"),
)


@dataclass(frozen=True)
class Shape:
    """What a configuration has to say of a pruned model."""

    hidden: int
    layers: tuple[LayerShape, ...]
    kept_layers: tuple[int, ...]
    """Places, in the source, of the layers that are left."""


@dataclass(frozen=True)
class Candidate:
    """A class and a configuration that may express a pruned model."""

    model_class: type
    config: Any
    note: str = ""
    """What the report says of it; empty for the source's own class."""
    remote: bool = False


def _set(data: dict[str, Any], config: Any, names: Sequence[str], value: int) -> None:
    known = {**data, **dict.fromkeys(getattr(config, "attribute_map", {}))}
    targets = [n for n in names if n in known]
    for name in targets:
        data[getattr(config, "attribute_map", {}).get(name, name)] = value


def _sliced(data: dict[str, Any], depth: int, kept: Sequence[int]) -> None:
    """Takes the entries of kept layers from every list that has one entry a layer."""
    for name in LISTS:
        value = data.get(name)
        if isinstance(value, list) and len(value) == depth:
            data[name] = [value[i] for i in kept]


def _set_heads(data: dict[str, Any], config: Any, shape: Shape) -> None:
    first = shape.layers[0]
    _set(data, config, HEADS, first.heads)
    _set(data, config, KV_HEADS, first.kv_heads)
    if ROTATED in data:  # a head's width is in parts, and head_dim that of the rotated one
        _set(data, config, NOT_ROTATED, first.qk - int(data[ROTATED]))
        _set(data, config, V_HEAD_DIM, first.v)
        return
    _set(data, config, HEAD_DIM, first.qk)
    computed = getattr(type(config), "head_dim", None)
    if isinstance(computed, property) and computed.fset is None:
        data.pop("head_dim", None)  # the class works it out; it may still write it into a file
    elif first.qk * first.heads != shape.hidden:
        # Many classes read this width without declaring it; by itself it would be another.
        data.setdefault("head_dim", first.qk)


def _set_mlps(data: dict[str, Any], config: Any, shape: Shape) -> None:
    """Sets the widths of dense layers, and count, groups and width of experts in the others."""
    dense = next((s.ffn for s in shape.layers if not s.expert_ffn and s.ffn), 0)
    if dense:
        _set(data, config, FFN, dense)
    mixed = next((s for s in shape.layers if s.expert_ffn), None)
    if mixed is None:
        return
    own = any(name in data for name in EXPERT_FFN)
    _set(data, config, EXPERT_FFN if own else FFN, mixed.expert_ffn)
    _set(data, config, EXPERTS, prod(mixed.experts))
    if len(mixed.experts) > 1:
        _set(data, config, EXPERT_GROUPS, mixed.experts[0])
    if mixed.ffn:
        _set(data, config, SHARED_FFN, mixed.ffn)
    if mixed.ffn and mixed.ffn % mixed.expert_ffn == 0:
        _set(data, config, SHARED, mixed.ffn // mixed.expert_ffn)


def original(config: Any, model_class: type, shape: Shape) -> Candidate:
    """Returns the source's own class with the new sizes.

    Raises:
        Exception: whatever the class raises for sizes it refuses.
    """
    data: dict[str, Any] = copy.deepcopy(config.to_dict())
    depth = int(config.num_hidden_layers)
    _sliced(data, depth, shape.kept_layers)
    first = shape.layers[0]
    _set(data, config, HIDDEN, shape.hidden)
    _set(data, config, DEPTH, len(shape.kept_layers))
    _set_mlps(data, config, shape)
    if first.heads:
        _set_heads(data, config, shape)
    data.pop("quantization_config", None)
    data.pop("per_layer_config", None)
    if all(c.__module__.startswith("transformers.") for c in (model_class, type(config))):
        data.pop("auto_map", None)  # it names code that the result neither needs nor brings
    return Candidate(model_class, type(config).from_dict(data))


def _common(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _COMMON if hasattr(config, name)}


def _sizes(shape: Shape) -> dict[str, Any]:
    first = shape.layers[0]
    return {
        "hidden_size": shape.hidden,
        "intermediate_size": first.ffn,
        "num_hidden_layers": len(shape.kept_layers),
        "num_attention_heads": first.heads,
        "num_key_value_heads": first.kv_heads,
    }


def mistral(config: Any, shape: Shape) -> Candidate:
    """Returns Llama as Mistral without a window: the same names and sums, fewer conditions."""
    from transformers import MistralConfig, MistralForCausalLM

    data: dict[str, Any] = {**_common(config), **_sizes(shape), "head_dim": shape.layers[0].qk}
    out = MistralConfig(**data, sliding_window=None)
    return Candidate(
        MistralForCausalLM,
        out,
        "written as MistralForCausalLM without a window, because LlamaConfig wants hidden_size "
        "divisible by the number of heads; names and results are the same",
    )


def granite(config: Any, shape: Shape) -> Candidate:
    """Returns Llama with biases as Granite with multipliers 1 and the attention's own scale."""
    from transformers import GraniteConfig, GraniteForCausalLM

    data: dict[str, Any] = {**_common(config), **_sizes(shape)}
    out = GraniteConfig(
        **data,
        attention_bias=bool(getattr(config, "attention_bias", False)),
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        attention_multiplier=shape.layers[0].scale,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
    )
    out.head_dim = shape.layers[0].qk
    return Candidate(
        GraniteForCausalLM,
        out,
        "written as GraniteForCausalLM with multipliers 1, because LlamaConfig wants hidden_size "
        "divisible by the number of heads; names and results are the same",
    )


def stock(config: Any, model_class: type, shape: Shape) -> Iterator[tuple[str, Any]]:
    """Yields makers of stock candidates by name, best first."""
    if config.model_type == PACKAGED:
        return
    yield model_class.__name__, lambda: original(config, model_class, shape)
    if config.model_type == "llama":
        yield "MistralForCausalLM", lambda: mistral(config, shape)
        yield "GraniteForCausalLM", lambda: granite(config, shape)


@dataclass(frozen=True)
class Biases:
    """Which projections of a family have a bias, as the captured parameters show."""

    attention: bool
    output: bool
    mlp: bool
    qk_norm: bool


def per_layer(
    config: Any,
    shape: Shape,
    biases: Biases,
    *,
    rotary_dim: int,
    rotary_pairs: list[int] | None,
    norm_mean_scale: float,
    qk_norm_mean_scale: float,
) -> dict[str, Any]:
    """Returns the JSON of the packaged modelling file's configuration.

    Attributes that all layers share are written once; `per_layer_config` holds what differs, in
    the form that Transformers 5.14 and later read.
    """
    kept = shape.layers
    base = next((s for s in kept if s.attention and s.mlp), None)
    heads = next((s for s in kept if s.attention), base)
    mlp = next((s for s in kept if s.mlp), base)
    common: dict[str, Any] = {
        "num_attention_heads": heads.heads if heads else 1,
        "num_key_value_heads": heads.kv_heads if heads else 1,
        "head_dim": heads.qk if heads else rotary_dim,
        "v_head_dim": heads.v if heads else rotary_dim,
        "intermediate_size": mlp.ffn if mlp else 1,
        "attention_scaling": heads.scale if heads else 1.0,
    }
    layers: dict[str, dict[str, Any]] = {}
    for place, layer in enumerate(kept):
        own: dict[str, Any] = {}
        if layer.attention:
            own |= {
                "num_attention_heads": layer.heads,
                "num_key_value_heads": layer.kv_heads,
                "head_dim": layer.qk,
                "v_head_dim": layer.v,
                "attention_scaling": layer.scale,
            }
        if layer.mlp:
            own["intermediate_size"] = layer.ffn
        own = {name: value for name, value in own.items() if common[name] != value}
        skip = [n for n, on in (("attention", layer.attention), ("mlp", layer.mlp)) if not on]
        if skip:
            own["skip"] = skip
        if own:
            layers[str(place)] = own
    windows = {s.window for s in kept if s.window is not None}
    known = config.to_dict()
    plain = ("hidden_act", "attention_dropout", "initializer_range", "use_cache", "pad_token_id")
    plain += ("bos_token_id", "eos_token_id", "vocab_size", "rms_norm_eps", "rope_parameters")
    plain += ("max_position_embeddings", "tie_word_embeddings", "dtype")
    out: dict[str, Any] = {name: known[name] for name in plain if name in known}
    out |= {
        "source_model_type": family(config),
        "hidden_size": shape.hidden,
        "num_hidden_layers": len(kept),
        **common,
        "rotary_dim": rotary_dim,
        "rotary_pairs": rotary_pairs,
        "attention_bias": biases.attention,
        "attention_output_bias": biases.output,
        "mlp_bias": biases.mlp,
        "qk_norm": biases.qk_norm,
        "norm_mean_scale": norm_mean_scale,
        "qk_norm_mean_scale": qk_norm_mean_scale,
        "layer_types": [
            "full_attention" if s.window is None else "sliding_attention" for s in kept
        ],
        "sliding_window": windows.pop() if len(windows) == 1 else None,
    }
    if layers:
        out["per_layer_config"] = layers
    return out


def carried(config: Any) -> Mapping[str, Any]:
    """Returns a configuration's fields as data."""
    return config.to_dict()
