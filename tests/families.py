"""Tiny models of further architectures, beside those whose axes are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers

from tests import models

_PLAIN: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 101,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_TOKENS = {key: _PLAIN[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
_N = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64, **_TOKENS}
_FALCON = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "bias": False,
    "ffn_hidden_size": 80,
    **_TOKENS,
}


def _plain(**overrides: Any) -> dict[str, Any]:
    return {**_PLAIN, **overrides}


DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    # Rotary embeddings of neighbouring channels.
    "Cohere": ("CohereForCausalLM", _plain()),
    "Cohere2": ("Cohere2ForCausalLM", _plain(sliding_window=5, layer_types=None)),
    "Glm": ("GlmForCausalLM", _plain()),
    "Glm4": ("Glm4ForCausalLM", _plain()),
    "GPTJ": ("GPTJForCausalLM", {**_N, "n_inner": 80, "rotary_dim": 4}),
    "CodeGen": ("CodeGenForCausalLM", {**_N, "n_head": 4, "n_inner": 80, "n_ctx": 64,
                                       "rotary_dim": 4}),
    "Helium": ("HeliumForCausalLM", _plain()),
    "Ernie4_5": ("Ernie4_5ForCausalLM", _plain()),
    "Llama4Text": ("Llama4ForCausalLM", _plain(intermediate_size_mlp=80, moe_layers=[],
                                               num_local_experts=1, attention_chunk_size=16)),
    # Fused projections, one key/value head for all, biases that grow with distance.
    "Bloom": ("BloomForCausalLM", {"hidden_size": 48, "n_layer": 2, "n_head": 6, **_TOKENS}),
    "Falcon": ("FalconForCausalLM", {**_FALCON, "multi_query": True, "alibi": False}),
    "FalconNew": ("FalconForCausalLM", {**_FALCON, "new_decoder_architecture": True,
                                        "num_kv_heads": 3, "alibi": False}),
    "FalconAlibi": ("FalconForCausalLM", {**_FALCON, "multi_query": False, "alibi": True,
                                          "parallel_attn": False}),
    "Mpt": ("MptForCausalLM", {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 64,
                               **_TOKENS}),
    "GPTBigCode": ("GPTBigCodeForCausalLM", {**_N, "n_inner": 80}),
    "Persimmon": ("PersimmonForCausalLM", _plain(hidden_size=96, num_key_value_heads=6,
                                                 head_dim=16)),
    # Learned or sinusoidal positions.
    "XGLM": ("XGLMForCausalLM", {"d_model": 48, "num_layers": 2, "attention_heads": 6,
                                 "ffn_dim": 80, "max_position_embeddings": 64,
                                 "pad_token_id": 0, **_TOKENS}),
    "BioGpt": ("BioGptForCausalLM", _plain()),
    # Windows, norms and multipliers of their own.
    "Exaone4": ("Exaone4ForCausalLM", _plain(sliding_window=5)),
    "Ministral": ("MinistralForCausalLM", _plain(sliding_window=5)),
    "Nemotron": ("NemotronForCausalLM", _plain()),
    "Olmo": ("OlmoForCausalLM", _plain()),
    "Olmo3": ("Olmo3ForCausalLM", _plain(sliding_window=5)),
    "SeedOss": ("SeedOssForCausalLM", _plain()),
    "Arcee": ("ArceeForCausalLM", _plain()),
    "Apertus": ("ApertusForCausalLM", _plain()),
    "HunYuanDense": ("HunYuanDenseV1ForCausalLM", _plain()),
}  # fmt: skip
"""Class and config of each further decoder, by the name that the conformance table uses."""

_ENCODER = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("BertForSequenceClassification", _ENCODER),
    "Roberta": ("RobertaForSequenceClassification", _ENCODER),
    "DistilBert": ("DistilBertForSequenceClassification", {
        "dim": 48, "hidden_dim": 80, "n_layers": 2, "n_heads": 6, "vocab_size": 101,
        "max_position_embeddings": 64}),
    "ViT": ("ViTForImageClassification", {"hidden_size": 48, "intermediate_size": 80,
                                          "num_hidden_layers": 2, "num_attention_heads": 6,
                                          "image_size": 16, "patch_size": 8, "num_labels": 5}),
    "ResNet": ("ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [8, 16],
                                                "depths": [2, 1], "layer_type": "basic",
                                                "num_labels": 5}),
    "ResNetBottleneck": ("ResNetForImageClassification", {"embedding_size": 8, "depths": [1, 1],
                                                          "hidden_sizes": [16, 32],
                                                          "layer_type": "bottleneck",
                                                          "num_labels": 5}),
}  # fmt: skip
"""Class and config of each encoder or convolutional network."""


class Outputs(torch.nn.Module):
    """A Transformers model from its first input to the tensor that counts."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.model(x)
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def _made(entry: tuple[str, Mapping[str, Any]], seed: int) -> Any:
    cls: Any = getattr(transformers, entry[0])
    fields = cls.config_class(**entry[1]).to_dict()
    eps = {key: 0.1 for key, value in fields.items() if "eps" in key and isinstance(value, float)}
    model = cls(cls.config_class(**{**entry[1], **eps}))
    models.randomise(model, seed=seed)
    return model.eval()


def decoder(name: str, *, seed: int = 0) -> Any:
    """Returns a decoder of the table, recorded or not, drawn by `seed`."""
    if name in models.RECORDED:
        return models.build(name, seed=seed)
    return _made(DECODERS[name], seed)


def module(name: str, *, seed: int = 0) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Returns an encoder or convolutional network with inputs to trace it with."""
    entry = MODULES[name]
    model = _made(entry, seed)
    draw = torch.Generator().manual_seed(seed)
    for key, buffer in model.named_buffers():  # a batch norm that has seen something
        if key.endswith("running_mean"):
            buffer.copy_(torch.randn(buffer.shape, generator=draw) * 0.3)
        elif key.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=draw) + 0.5)
    if "vocab_size" in entry[1]:
        return Outputs(model), (torch.randint(3, 100, (2, 12), generator=draw),)
    size = entry[1].get("image_size", 32)
    return Outputs(model), (torch.randn(2, 3, size, size, generator=draw),)
