"""Dense models, what is cut from them, and the same cut as a masked model or a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from surgeon.emit import modeling_surgeon_pruned as pruned_file

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEADS, KV, REP, D, HIDDEN, FFN, VOCAB = 6, 3, 2, 8, 36, 20, 40
BIASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"attention_bias": True},
}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 3.0, 5.0, 9.0],
    },
}


@dataclass(frozen=True)
class Layer:
    """What one layer keeps: per key/value head the query heads and the value channels."""

    heads: dict[int, tuple[int, ...]] = field(
        default_factory=lambda: dict.fromkeys(range(KV), (0, 1))
    )
    v: dict[int, tuple[int, ...]] = field(
        default_factory=lambda: {k: tuple(range(D)) for k in range(KV)}
    )
    ffn: tuple[int, ...] = tuple(range(FFN))
    skip: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """What the model keeps; a layer that is None is removed as a whole."""

    layers: tuple[Layer | None, ...]
    pairs: tuple[int, ...] = tuple(range(D // 2))
    hidden: tuple[int, ...] = tuple(range(HIDDEN))


WHOLE = Layer()
WIDTHS = (
    Layer(heads={0: (1,), 2: (0,)}, v={0: (1, 2, 5), 2: (0, 4, 7)}, ffn=(3, 4, 9, 17)),
    Layer(heads={1: (0, 1)}, v={1: tuple(range(D))}, ffn=tuple(range(0, 20, 2))),
    Layer(v={k: (k, k + 1, 6, 7, 5) for k in range(KV)}),
)


def dense(family: str, tied: bool = False, layers: int = 3, **changes: Any) -> Any:
    """Returns a small dense model on which mistakes are visible: large eps, nothing near zero."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family,
        **{
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": layers,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV,
            "head_dim": D,
            "rms_norm_eps": 0.1,
            "max_position_embeddings": 32,
            "tie_word_embeddings": tied,
            "sliding_window": None,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            **BIASES[family],
            **changes,
        },
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            norm = name.endswith("norm.weight")
            value.copy_(torch.rand(value.shape) + 0.5 if norm else torch.randn(value.shape) * 0.25)
    return model


def indices(name: str, cut: Cut) -> list[list[int] | None]:
    """Returns what each dimension of a parameter keeps, None for all."""
    hidden = list(cut.hidden)
    columns = [*cut.pairs, *(p + D // 2 for p in cut.pairs)]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(\w+)", name)
    if match is None:
        return [hidden] if name == "model.norm.weight" else [None, hidden]
    layer = cut.layers[int(match[1])] or WHOLE
    query = [(kv * REP + r, kv) for kv, reps in layer.heads.items() for r in reps]
    ffn = list(layer.ffn)
    rows_and_columns = {
        "q_proj": ([h * D + c for h, _ in query for c in columns], hidden),
        "k_proj": ([kv * D + c for kv in layer.heads for c in columns], hidden),
        "v_proj": ([kv * D + c for kv in layer.heads for c in layer.v[kv]], hidden),
        "o_proj": (hidden, [h * D + c for h, kv in query for c in layer.v[kv]]),
        "gate_proj": (ffn, hidden),
        "up_proj": (ffn, hidden),
        "down_proj": (hidden, ffn),
        "q_norm": (columns,),
        "k_norm": (columns,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }[match[2]]
    return list(rows_and_columns[:1] if match[3] == "bias" else rows_and_columns)


def masked(model: Any, cut: Cut) -> Any:
    """Zeroes in place everything the cut removes and every branch it skips."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            for dim, kept in enumerate(indices(name, cut)):
                if kept is not None:
                    gone = [i for i in range(value.shape[dim]) if i not in kept]
                    value.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0.0)
        for index, layer in enumerate(cut.layers):
            skip = BRANCH_OUTPUTS if layer is None else {b: BRANCH_OUTPUTS[b] for b in layer.skip}
            for output in skip.values():
                for value in model.get_submodule(f"model.layers.{index}.{output}").parameters():
                    value.zero_()
    return model


BRANCH_OUTPUTS = {"attention": "self_attn.o_proj", "mlp": "mlp.down_proj"}
BRANCH_PARAMETERS = {
    "attention": (".self_attn.", ".input_layernorm."),
    "mlp": (".mlp.", ".post_attention_layernorm."),
}


def sliced(model: Any, cut: Cut) -> dict[str, torch.Tensor]:
    """Returns the state of the pruned model, its layers numbered anew."""
    numbers = {old: new for new, old in enumerate(i for i, x in enumerate(cut.layers) if x)}
    state: dict[str, torch.Tensor] = {}
    for name, value in model.named_parameters():
        new = name
        if match := re.match(r"model\.layers\.(\d+)\.", name):
            layer = cut.layers[int(match[1])]
            gone = [part for b in (layer.skip if layer else ()) for part in BRANCH_PARAMETERS[b]]
            if layer is None or any(part in name for part in gone):
                continue
            new = f"model.layers.{numbers[int(match[1])]}.{name[match.end() :]}"
        for dim, kept in enumerate(indices(name, cut)):
            if kept is not None:
                value = value.index_select(dim, torch.tensor(kept))
        state[new] = value.detach().clone()
    return state


def config_json(model: Any, cut: Cut) -> dict[str, Any]:
    """Returns what a writer puts into config.json."""
    source = model.config
    family = source.model_type
    kept = [(i, layer) for i, layer in enumerate(cut.layers) if layer is not None]
    types = getattr(source, "layer_types", None)
    if types is None:
        window = getattr(source, "sliding_window", None)
        types = ["sliding_attention" if window else "full_attention"] * len(cut.layers)
    per_layer: dict[str, dict[str, Any]] = {}
    for new, (_, layer) in enumerate(kept):
        changes: dict[str, Any] = {"skip": list(layer.skip)} if layer.skip else {}
        if "attention" not in layer.skip:
            changes["num_attention_heads"] = sum(map(len, layer.heads.values()))
            changes["num_key_value_heads"] = len(layer.heads)
            changes["v_head_dim"] = len(layer.v[next(iter(layer.heads))])
        if "mlp" not in layer.skip:
            changes["intermediate_size"] = len(layer.ffn)
        per_layer[str(new)] = changes
    return {
        **source.to_dict(),
        "model_type": "surgeon_pruned",
        "architectures": ["SurgeonPrunedForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_surgeon_pruned.SurgeonPrunedConfig",
            "AutoModelForCausalLM": "modeling_surgeon_pruned.SurgeonPrunedForCausalLM",
        },
        "source_model_type": family,
        "hidden_size": len(cut.hidden),
        "num_hidden_layers": len(kept),
        "head_dim": 2 * len(cut.pairs),
        "v_head_dim": D,
        "rotary_dim": D,
        "rotary_pairs": None if len(cut.pairs) == D // 2 else list(cut.pairs),
        "attention_scaling": D**-0.5,
        "attention_bias": family != "mistral",
        "attention_output_bias": family in ("llama", "qwen3"),
        "mlp_bias": family == "llama",
        "qk_norm": family == "qwen3",
        "norm_mean_scale": len(cut.hidden) / HIDDEN,
        "qk_norm_mean_scale": len(cut.pairs) / (D // 2),
        "layer_types": [types[i] for i, _ in kept],
        "sliding_window": getattr(source, "sliding_window", None),
        "per_layer_config": per_layer,
    }


def write(folder: Path, model: Any, cut: Cut) -> Path:
    """Writes the checkpoint that a cut of a dense model makes."""
    folder.mkdir(parents=True)
    shutil.copy(pruned_file.__file__, folder / "modeling_surgeon_pruned.py")
    (folder / "config.json").write_text(json.dumps(config_json(model, cut)))
    save_file(sliced(model, cut), folder / "model.safetensors", metadata={"format": "pt"})
    return folder
