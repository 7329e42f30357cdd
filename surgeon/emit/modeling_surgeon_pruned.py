# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# ruff: noqa: D102, RUF012
"""Llama, Mistral, Qwen2 and Qwen3 decoders whose layers differ in width or lack a branch.

This file travels beside a pruned checkpoint and needs torch and transformers (5.14 or later):

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Parameters carry the names of the source family. What pruning changed is in the fields that
`SurgeonPrunedConfig` describes; what differs by layer is in Transformers' ``per_layer_config``.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
BRANCHES = {"attention", "mlp"}
MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}
HEADS = {"num_attention_heads", "num_key_value_heads"}
WIDTHS = {"head_dim", "v_head_dim", "intermediate_size"}
BIASES = {"attention_bias", "attention_output_bias", "mlp_bias"}
PER_LAYER = HEADS | WIDTHS | BIASES | {"attention_scaling"}


class SurgeonPrunedConfig(PretrainedConfig):
    """Describes a pruned decoder; fields without a default are required.

    Any field of ``PER_LAYER`` may differ by layer, and a branch may be missing:
    ``per_layer_config = {"1": {"num_key_value_heads": 2, "intermediate_size": 96},
    "3": {"skip": ["attention"]}}``. Where pruning is not involved, fields mean what they mean
    in the source family's configuration.

    Attributes:
        source_model_type: The family the parameters come from.
        head_dim: Width of one query or key head, two for each kept rotary pair.
        v_head_dim: Width of one value head.
        rotary_dim: Width of a head before pruning; the rotary frequencies are computed for it.
        rotary_pairs: The rotary pairs kept, None for all.
        attention_scaling: What query-key products are multiplied by.
        attention_bias: Whether q, k and v have a bias.
        attention_output_bias: Whether o has a bias.
        mlp_bias: Whether gate, up and down have a bias.
        qk_norm: Whether queries and keys are normalised over a head.
        norm_mean_scale: Factor on the mean of squares over the hidden width: kept / all channels.
        qk_norm_mean_scale: The same for the query and key norms: kept / all channels of a head.
        layer_types: For each layer, "full_attention" or "sliding_attention".
        sliding_window: The window of the sliding layers.
        ranks: By module, such as "model.layers.0.mlp.up_proj", the rank of a map that is two.
    """

    model_type = "surgeon_pruned"
    keys_to_ignore_at_inference = ["past_key_values"]
    has_no_defaults_at_init = True  # Transformers must not build one without arguments

    source_model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    rotary_dim: int
    attention_scaling: float
    rms_norm_eps: float
    rope_parameters: dict | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    layer_types: list[str]
    sliding_window: int | None = None
    rotary_pairs: list[int] | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    norm_mean_scale: float = 1.0
    qk_norm_mean_scale: float = 1.0
    ranks: dict | None = None
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.check()

    @property
    def layers(self) -> list:
        """The configuration of each layer (5.14 has no `per_layer_config` if all are alike)."""
        return list(self.per_layer_config or [self] * self.num_hidden_layers)

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have attention, in the order of their cache slots."""
        return [i for i, layer in enumerate(self.layers) if has("attention", layer)]

    def get_text_config(self, decoder=None, encoder=None):
        """Returns the configuration that caches are built from, if asked for the decoder's.

        It has the attention layers only: Transformers reads the past length from the first
        slot of a cache, so that a layer without keys and values must not own one.
        """
        kept = self.attention_layers
        if not decoder or len(kept) == self.num_hidden_layers:
            return self
        layers, names = self.layers, self.per_layer_attributes or set()
        slots = {i: {n: getattr(layers[k], n) for n in names} for i, k in enumerate(kept)}
        config = copy.copy(self)
        config.per_layer_config = None
        config.num_hidden_layers = len(kept)
        config.layer_types = [self.layer_types[k] for k in kept]
        config.per_layer_config = slots
        return config

    def rotary_config(self) -> "SurgeonPrunedConfig":
        """Returns the configuration that the rotary frequencies of the source come from."""
        config = copy.copy(self)
        config.per_layer_config = None
        config.head_dim = self.rotary_dim
        return config

    def validate(self) -> None:
        """Runs Transformers' own checks, which read fields that differ here by layer."""
        self.check()
        PretrainedConfig.validate(self.rotary_config())

    def check(self) -> None:
        """Raises ValueError if the fields contradict each other."""
        if faults := list(self.faults()):
            raise ValueError(f"{self.model_type} config: {'; '.join(faults)}")

    def faults(self) -> Iterator[str]:
        """Yields what contradicts what."""
        if self.source_model_type not in FAMILIES:
            yield f"source_model_type {self.source_model_type!r} is not one of {FAMILIES}"
        if other := (self.per_layer_attributes or set()) - PER_LAYER:
            yield f"{sorted(other)} cannot differ by layer"
            return
        types = self.layer_types
        if len(types) != self.num_hidden_layers or not set(types) <= set(MASKS):
            yield f"layer_types must hold one of {list(MASKS)} for each layer"
        if self.sliding_window is None and "sliding_attention" in types:
            yield "sliding layers need a sliding_window"
        every = list(range(self.rotary_dim // 2))
        pairs = every if self.rotary_pairs is None else self.rotary_pairs
        if pairs != sorted(set(pairs) & set(every)):
            yield f"rotary_pairs must ascend within the {len(every)} pairs of rotary_dim"
        if any(type(rank) is not int or rank < 1 for rank in (self.ranks or {}).values()):
            yield "ranks must be numbers above 0"
        for index, layer in enumerate(self.layers):
            if unknown := set(getattr(layer, "skip", [])) - BRANCHES:
                yield f"layer {index} skips {sorted(unknown)}, not one of {sorted(BRANCHES)}"
            if not has("attention", layer):
                continue
            if layer.num_attention_heads % layer.num_key_value_heads:
                yield f"query heads of layer {index} are no multiple of its key/value heads"
            if layer.head_dim != 2 * len(pairs):
                yield f"head_dim of layer {index} is not twice the number of rotary pairs"


def has(branch: str, layer: PretrainedConfig) -> bool:
    """Tells whether a layer, given by its own configuration, has a branch."""
    return branch not in getattr(layer, "skip", [])


class SurgeonPrunedProduct(nn.Module):
    """Two linear maps, one after the other, in place of one of higher rank."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.down = nn.Linear(linear.in_features, rank, bias=False)
        self.up = nn.Linear(rank, linear.out_features, bias=linear.bias is not None)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden_states))


def factor(model: nn.Module, config: SurgeonPrunedConfig, prefix: str = "") -> None:
    """Puts products in place of those maps of a model, called `prefix`, that have a rank."""
    for path, rank in (config.ranks or {}).items():
        parent, _, name = path.removeprefix(prefix).rpartition(".")
        if path.startswith(prefix):
            module = model.get_submodule(parent)
            linear = getattr(module, name)
            if isinstance(linear, nn.Linear):  # those within the decoder are products already
                setattr(module, name, SurgeonPrunedProduct(linear, rank))


class SurgeonPrunedRMSNorm(nn.Module):
    """Divides by the root mean square over the kept channels as it was over all of them."""

    def __init__(self, size: int, eps: float, mean_scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.variance_epsilon = eps
        self.mean_scale = mean_scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.to(torch.float32)
        variance = states.pow(2).mean(-1, keepdim=True)
        if self.mean_scale != 1.0:
            variance = variance * self.mean_scale
        states = states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * states.to(hidden_states.dtype)


class SurgeonPrunedRotaryEmbedding(llama.LlamaRotaryEmbedding):
    """Gives the source's cos and sin for the rotary pairs that were kept."""

    def __init__(self, config: SurgeonPrunedConfig):
        super().__init__(config.rotary_config())
        columns, pairs = None, config.rotary_pairs
        if pairs is not None and self.rope_type in ("dynamic", "longrope"):
            # Transformers recomputes these frequencies as the sequence grows, for all pairs.
            columns = torch.tensor([*pairs, *(pair + config.rotary_dim // 2 for pair in pairs)])
        elif pairs is not None:
            self.inv_freq = self.inv_freq[pairs]
            self.original_inv_freq = self.original_inv_freq[pairs]
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor):
        cos, sin = super().forward(x, position_ids)
        if self.columns is not None:
            cos, sin = cos[..., self.columns], sin[..., self.columns]
        return cos, sin


class SurgeonPrunedAttention(nn.Module):
    """Attention whose query/key and value widths may differ; `layer_idx` is its cache slot.

    `layer` is the layer's own configuration. `config` is the model's, because the attention
    implementation, which may change after construction, is read from it.
    """

    def __init__(self, config, layer, layer_idx: int, layer_type: str):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim, self.v_head_dim = layer.head_dim, layer.v_head_dim
        self.scaling = layer.attention_scaling
        self.is_causal = True
        self.sliding_window = config.sliding_window if layer_type == "sliding_attention" else None
        heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
        self.num_key_value_groups = heads // kv_heads
        hidden, bias, o_bias = config.hidden_size, layer.attention_bias, layer.attention_output_bias
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.v_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.v_head_dim, hidden, bias=o_bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            norm = (self.head_dim, config.rms_norm_eps, config.qk_norm_mean_scale)
            self.q_norm, self.k_norm = SurgeonPrunedRMSNorm(*norm), SurgeonPrunedRMSNorm(*norm)

    def forward(
        self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs
    ):
        shape = hidden_states.shape[:-1]
        query = self.q_proj(hidden_states).view(*shape, -1, self.head_dim)
        key = self.k_proj(hidden_states).view(*shape, -1, self.head_dim)
        value = self.v_proj(hidden_states).view(*shape, -1, self.v_head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))
        query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        kwargs["dropout"] = self.config.attention_dropout if self.training else 0.0
        kwargs.update(scaling=self.scaling, sliding_window=self.sliding_window)
        output, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights


class SurgeonPrunedDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer with the branches it still has, each with its norm."""

    def __init__(self, config, layer, layer_idx: int, layer_type: str):
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps, config.norm_mean_scale)
        self.layer_type = layer_type
        self.self_attn = self.mlp = None
        if has("attention", layer):
            self.input_layernorm = SurgeonPrunedRMSNorm(*norm)
            self.self_attn = SurgeonPrunedAttention(config, layer, layer_idx, layer_type)
        if has("mlp", layer):
            self.post_attention_layernorm = SurgeonPrunedRMSNorm(*norm)
            self.mlp = llama.LlamaMLP(layer)

    def forward(self, hidden_states, **kwargs):
        if self.self_attn is not None:
            attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class SurgeonPrunedPreTrainedModel(PreTrainedModel):
    """What Transformers needs to know of these models."""

    config_class = SurgeonPrunedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SurgeonPrunedDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": SurgeonPrunedDecoderLayer,
        "attentions": SurgeonPrunedAttention,
    }

    def __init__(self, config: SurgeonPrunedConfig, *args, **kwargs):
        # Flash attention kernels take one width for queries, keys and values.
        attending = [layer for layer in config.layers if has("attention", layer)]
        self._supports_flash_attn = all(x.v_head_dim == x.head_dim for x in attending)
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, SurgeonPrunedRotaryEmbedding):
            fresh = SurgeonPrunedRotaryEmbedding(self.config)
            init.copy_(module.inv_freq, fresh.inv_freq)
            init.copy_(module.original_inv_freq, fresh.original_inv_freq)
            if module.columns is not None:
                init.copy_(module.columns, fresh.columns)
        else:
            super()._init_weights(module)


class SurgeonPrunedModel(SurgeonPrunedPreTrainedModel):
    """The decoder without its language-model head."""

    def __init__(self, config: SurgeonPrunedConfig):
        super().__init__(config)
        size, types = config.hidden_size, config.layer_types
        slots = {index: slot for slot, index in enumerate(config.attention_layers)}
        self.embed_tokens = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.layers = nn.ModuleList(
            SurgeonPrunedDecoderLayer(config, layer, slots.get(index, -1), types[index])
            for index, layer in enumerate(config.layers)
        )
        self.mask_types = sorted({types[index] for index in slots})
        self.norm = SurgeonPrunedRMSNorm(size, config.rms_norm_eps, config.norm_mean_scale)
        self.rotary_emb = SurgeonPrunedRotaryEmbedding(config)
        factor(self, config, "model.")
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (steps + past).unsqueeze(0)
        context = {"past_key_values": past_key_values, "position_ids": position_ids}
        if not isinstance(masks := attention_mask, dict):  # `generate` may have made them already
            inputs = (self.config, inputs_embeds, attention_mask)
            masks = {name: MASKS[name](*inputs, **context) for name in self.mask_types}
        context["position_embeddings"] = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            mask = None if layer.self_attn is None else masks[layer.layer_type]
            hidden_states = layer(hidden_states, attention_mask=mask, **context, **kwargs)
        return BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)


class SurgeonPrunedForCausalLM(SurgeonPrunedPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SurgeonPrunedConfig):
        super().__init__(config)
        self.model = SurgeonPrunedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        factor(self, config)
        self.post_init()

    def _get_static_cache_init_shape(self):
        return None  # an early start would give keys and values one width: let them come lazily

    forward = llama.LlamaForCausalLM.forward  # logits, loss and `logits_to_keep` as Llama's


# Saving such a model again copies this file and keeps `auto_map`.
SurgeonPrunedConfig.register_for_auto_class()
SurgeonPrunedForCausalLM.register_for_auto_class("AutoModelForCausalLM")
