"""Tiny GGUF files, written as the format's converters write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch

from surgeon.capture.gguf_file import GGUFHeader, GGUFWeights
from surgeon.capture.model import all_params

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in the order of llama.cpp's rotary, which pairs neighbours and not halves."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def write_llama(path: Path, model: Any, *, leave_out: str = "") -> Path:
    """Writes a Llama in fp32, with a vocabulary of made-up tokens."""
    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(0x100 + i) for i in range(c.vocab_size - 1)), "Āā"])
    writer.add_token_merges(["Ā ā"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    tied = c.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stem, _, kind = name.rpartition(".")
        layer, _, part = stem.removeprefix("model.layers.").partition(".")
        new = f"blk.{layer}.{NAMES[part]}" if layer.isdigit() else NAMES[stem]
        if part.endswith(("q_proj", "k_proj")):
            heads = c.num_attention_heads if part.endswith("q_proj") else c.num_key_value_heads
            tensor = _interleaved(tensor, heads)
        if f"{new}.{kind}" != leave_out:
            writer.add_tensor(f"{new}.{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_weights(path: Path, model: Any) -> GGUFWeights:
    ties = {alias: p.name for p in all_params(model).values() for alias in p.aliases}
    return GGUFWeights(GGUFHeader(path), model, ties)
