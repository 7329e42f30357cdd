"""Eight bits a weight, as torchao stores them in safetensors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from surgeon.emit.lowbit.modules import Chosen
from surgeon.emit.lowbit.scheme import Scheme


def _config(scheme: Scheme) -> Any:
    """Returns torchao's own description of a scheme."""
    from torchao import quantization as ao

    made = ao.Int8DynamicActivationInt8WeightConfig if scheme.scheme == "int8" else None
    made = made or ao.Int8WeightOnlyConfig
    return made(version=2, set_inductor_config=False)


def packed(
    name: str, weight: torch.Tensor, scheme: Scheme, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns a weight's tensors as the checkpoint stores them, and what its header says of it.

    Args:
        name: the checkpoint's name of the weight.
        weight: [out, d], fp32.
        scheme: with 8 bits.
        dtype: the element type in which the model computes.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_

    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight.clone(), requires_grad=False)
    quantize_(holder, _config(scheme))
    made: Any = holder.weight.data
    rounded = type(made)(
        made.qdata,
        made.scale,
        made.block_size,
        dtype,
        zero_point=made.zero_point,
        act_quant_kwargs=made.act_quant_kwargs,
    )
    tensors, header = flatten_tensor_state_dict({name: rounded})
    return {key: value.contiguous() for key, value in tensors.items()}, {name: header[name]}


def read(name: str, stored: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what a stored weight is in fp32, and the step of each weight, [out, 1]."""
    stem, _, leaf = name.rpartition(".")
    steps = stored[f"{stem}._{leaf}_scale"].float()
    return stored[f"{stem}._{leaf}_qdata"].float() * steps, steps


def names(name: str, stored: Mapping[str, torch.Tensor]) -> set[str]:
    """Returns the names under which a weight's tensors are stored."""
    stem, _, leaf = name.rpartition(".")
    return {key for key in stored if key.startswith(f"{stem}._{leaf}_")}


def header(every: Mapping[str, str], plain: Sequence[str]) -> dict[str, str]:
    """Returns the file's header.

    Args:
        every: what the header says of each weight in fewer bits.
        plain: names of the other tensors.
    """
    others = {name: json.dumps({"_type": "Tensor"}) for name in plain}
    order = json.dumps([*every, *others])
    return {**every, **others, "tensor_names": order, "format": "pt"}


def settings(scheme: Scheme, chosen: Chosen) -> dict[str, Any]:
    """Returns the `quantization_config` that `config.json` gets."""
    from transformers import TorchAoConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: Any = TorchAoConfig(
            _config(scheme),
            modules_to_not_convert=list(chosen.whole) or None,
            include_input_output_embeddings=scheme.embeddings,
        )
    return made.to_dict()
