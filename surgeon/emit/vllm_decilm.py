"""The vLLM target: a checkpoint of its class DeciLMForCausalLM, whose layers may differ.

Reference: vllm/model_executor/models/nemotron_nas.py and llama.py, as of commits 00bd149 and
2ee6ae7: key/value heads are `num_attention_heads // n_heads_in_group` by layer, an MLP's width is
`ffn.intermediate_size` where the block has no `ffn_mult`, and a branch with `no_op` isn't there.
vllm/transformers_utils/model_arch_config_convertor.py reads `block_configs` by attribute where the
model type is nemotron-nas.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan
from surgeon.capture.weights import SafetensorsWeights
from surgeon.emit import hf_writing
from surgeon.emit.decoder import (
    ELSEWHERE,
    Decoder,
    Material,
    heads_stay,
    refusals,
    starts_with_attention,
)
from surgeon.emit.hf_config import VLLM_TYPE
from surgeon.emit.mismatch import differs
from surgeon.emit.target import Refusal, Target

CLASS = "DeciLMForCausalLM"
CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")

_COMMON = (
    *("vocab_size", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "rope_parameters"),
)


def config_json(decoder: Decoder, dtype: torch.dtype) -> dict[str, Any]:
    """Returns what config.json says of a decoder.

    Args:
        decoder: one that the rules let through.
        dtype: of most of its tensors.
    """
    known = decoder.config.to_dict()
    heads = next((s.heads for s in decoder.layers if s.attention), 1)
    blocks: list[dict[str, Any]] = []
    for layer in decoder.layers:
        group = layer.heads // layer.kv_heads if layer.attention else None
        blocks.append(
            {
                "attention": {"no_op": not layer.attention, "n_heads_in_group": group},
                "ffn": {"no_op": not layer.mlp, "intermediate_size": layer.ffn or None},
            }
        )
    biases = decoder.biases
    return {
        "architectures": [CLASS],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "model_type": VLLM_TYPE,
        **{name: known[name] for name in _COMMON if name in known},
        "rope_theta": decoder.rope.get("rope_theta"),
        "hidden_size": decoder.hidden,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": heads,
        "head_dim": decoder.head,
        # One flag is for all four maps, unless there is another for the first three.
        "attention_bias": biases.output,
        "qkv_bias": biases.attention,
        "mlp_bias": biases.mlp,
        "tie_word_embeddings": decoder.tied,
        "dtype": str(dtype).removeprefix("torch."),
        "block_configs": blocks,
    }


def rules(axes: Axes, plan: Plan, origin: Any) -> list[Refusal]:
    """Returns what vLLM's class can't express of a plan."""
    return refusals(TARGET.name, axes, plan, origin, _against)


def _against(decoder: Decoder) -> list[Refusal]:
    found: list[Refusal] = []
    attending = [s for s in decoder.layers if s.attention]
    if not attending or not decoder.layers[0].attention:
        found.append(
            Refusal(
                decoder.layers[0].path,
                "the residual stream begins with the first layer's attention: it has to be there",
                f"--freeze '{decoder.layers[0].path}'",
            )
        )
    if len({s.heads for s in attending}) > 1:
        numbers = ", ".join(str(n) for n in sorted({s.heads for s in attending}))
        found.append(
            Refusal(
                "query heads",
                f"query heads are as many in every layer, and there would be {numbers}",
                "the same share everywhere: --role kv_heads=… with --select uniform, or freeze "
                "kv_heads and q_per_kv",
            )
        )
    if not decoder.pairs:
        why = "it computes the frequencies of all rotary pairs, and some would be missing"
        found.append(Refusal("rotary", why, "--freeze rotary, or " + ELSEWHERE))
    if decoder.biases.qk_norm:
        why = "its attention doesn't normalise queries and keys"
        found.append(Refusal(decoder.family, why, ELSEWHERE))
    return found


def whole(axes: Axes, asked: Mapping[str, float]) -> Mapping[str, str]:
    """Returns what has to stay whole: heads' widths, and the number of query heads if not asked."""
    out = heads_stay(axes, "all heads have the width of the rotary frequencies that vLLM computes")
    if not {"kv_heads", "q_per_kv"} & set(asked):
        why = "vLLM has as many query heads in every layer"
        out |= {a.name: why for r in ("kv_heads", "q_per_kv") for a in axes.of_role(r)}
    if "layers" not in asked:
        out |= starts_with_attention(axes, "vLLM's residual stream begins with it")
    return out


def write(folder: Path, decoder: Decoder, material: Material) -> dict[str, Any]:
    """Writes the checkpoint into an existing folder, one tensor at a time; returns facts."""
    source = material.source
    hf_writing.write_tensors(
        folder, decoder.emission, decoder.selection, material.get, material.dtype_of
    )
    dtype = hf_writing.main_dtype(decoder.emission, decoder.selection, material.dtype_of)
    text = json.dumps(config_json(decoder, dtype), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(CONFIGURATION, folder / CONFIGURATION.name)
    hf_writing.carry(folder, source.tokenizer_files, source.tokenizer)
    if source.generation_config is not None:
        source.generation_config.save_pretrained(folder)
    note = (
        "not run: vLLM is not installed here. It is served by "
        "`vllm serve FOLDER --trust-remote-code`, which reads the short configuration_decilm.py"
    )
    return {
        "architecture": CLASS,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "notes": (note,),
    }


def read(folder: Path, decoder: Decoder, material: Material) -> None:
    """Compares a written checkpoint with what it should be, tensor by tensor and bit by bit.

    Raises:
        SurgeonError: `verify-failed`.
    """
    stored = SafetensorsWeights(folder)
    for old, new in decoder.emission.names.items():
        want = decoder.tensor(material.get, old, material.dtype_of(old))
        same = new in stored and stored.dtype(new) == want.dtype
        if not same or not torch.equal(stored[new], want):
            raise differs(folder, new, "the stored tensor is not the plan's, bit for bit")
    extra = set(stored.names()) - set(decoder.emission.names.values())
    if extra:
        raise differs(folder, min(extra), "the plan's result has no such tensor")
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    want_config = config_json(
        decoder, hf_writing.main_dtype(decoder.emission, decoder.selection, material.dtype_of)
    )
    for key, value in json.loads(json.dumps(want_config)).items():
        if told.get(key) != value:
            raise differs(folder, key, "config.json says something else")


TARGET = Target(
    name="vllm",
    description="a checkpoint of vLLM's DeciLMForCausalLM, whose layers may differ",
    suffix="",
    write=write,
    rules=rules,
    whole=whole,
    kind="checkpoint",
    read=read,
)
