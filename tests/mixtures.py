"""Tiny mixtures of experts, one for each way that Transformers routes."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers

from tests.models import randomise

SHARED: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mixtral": (
        "MixtralForCausalLM",
        {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    ),
    "Qwen3Moe": (
        "Qwen3MoeForCausalLM",
        {
            "intermediate_size": 20,
            "moe_intermediate_size": 12,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "Olmoe": (
        "OlmoeForCausalLM",
        {"intermediate_size": 12, "num_experts": 6, "num_experts_per_tok": 2},
    ),
    "GptOss": (
        "GptOssForCausalLM",
        {
            "intermediate_size": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "DeepseekV3": (
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "intermediate_size": 20,
            "moe_intermediate_size": 12,
            "n_routed_experts": 12,
            "n_group": 3,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
}


def build(name: str, **overrides: Any) -> Any:
    """Returns a new tiny mixture in fp32 and eval mode."""
    cls, own = MIXTURES[name]
    made = getattr(transformers, cls)
    model = made(made.config_class(**{**SHARED, **own, **overrides}))
    randomise(model)
    draw = torch.Generator().manual_seed(1)
    for key, buffer in model.named_buffers():
        if "correction" in key:
            buffer.copy_(torch.rand(buffer.shape, generator=draw) * 0.2)
    return model.eval()


@cache
def tiny(name: str) -> Any:
    """Returns the session's one mixture of this name."""
    return build(name)
