"""Four bits a weight, as compressed-tensors packs them: the form that vLLM reads too.

torchao has four bits for accelerators only: of its types that safetensors can hold, none that packs
two weights in a byte runs on a CPU, and the one that does is not written to safetensors (0.18).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgeon.emit.lowbit.grid import Rounded, levels_of, rounded
from surgeon.emit.lowbit.modules import Chosen

BITS = 4


def packed(
    name: str, weight: torch.Tensor, group: int, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], bool]:
    """Returns a weight's tensors as the checkpoint stores them, and whether it was so rounded.

    Args:
        name: the checkpoint's name of the weight.
        weight: [out, d], fp32.
        group: weights that share a step.
        dtype: the element type in which the model computes, and of the steps.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    found = _stored(weight, rounded(weight, group), dtype)
    stem = name.removesuffix("weight")
    tensors = {
        f"{stem}weight_packed": pack_to_int32(found.levels, BITS).contiguous(),
        f"{stem}weight_scale": found.steps.to(dtype).contiguous(),
        f"{stem}weight_shape": torch.tensor(weight.shape),
    }
    return tensors, found.found


def _stored(weight: torch.Tensor, found: Rounded, dtype: torch.dtype) -> Rounded:
    """Returns the levels that are nearest with steps as they can be stored."""
    steps = found.steps.to(dtype).float()
    if torch.equal(steps, found.steps):
        return found
    group = weight.shape[1] // steps.shape[1]
    levels = levels_of(weight.unflatten(1, (-1, group)), steps).flatten(1).to(torch.int8)
    return Rounded(levels, steps, False)


def read(name: str, stored: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what a stored weight is in fp32, and the step of each weight, [out, d]."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    stem = name.removesuffix("weight")
    shape = torch.Size(stored[f"{stem}weight_shape"].tolist())
    levels = unpack_from_int32(stored[f"{stem}weight_packed"], BITS, shape).float()
    steps = stored[f"{stem}weight_scale"].float()
    steps = steps.repeat_interleave(shape[1] // steps.shape[1], dim=1)
    return levels * steps, steps


def names(name: str) -> set[str]:
    """Returns the names under which a weight's tensors are stored."""
    stem = name.removesuffix("weight")
    return {f"{stem}weight_{part}" for part in ("packed", "scale", "shape")}


def settings(chosen: Chosen) -> dict[str, Any]:
    """Returns the `quantization_config` that `config.json` gets."""
    by_group: dict[int, list[str]] = {}
    for name, group in chosen.groups.items():
        by_group.setdefault(group, []).append(name.removesuffix(".weight"))
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group"}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(chosen.whole),
        "config_groups": {
            f"group_{group}": {
                # Modules are named where they differ, so that none is in two groups.
                "targets": ["Linear"] if len(by_group) == 1 else modules,
                "weights": {**weights, "group_size": group},
            }
            for group, modules in by_group.items()
        },
    }
