"""Buffers that no checkpoint stores, computed from the config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from surgeon.errors import Code, SurgeonError

MOST = 4 * 2**30
"""Bytes that buffers may take in all. Masks of older models take the most: 4 MB a layer."""


def computed_buffers(model_class: type[nn.Module], config: Any) -> dict[str, torch.Tensor]:
    """Returns what a model of this class and config derives for itself, on the CPU, by name.

    These are rotary frequencies, Gemma's embedding scale and the like. The model's parameters
    are never allocated: its buffers are set by `initialize_weights`, which is how Transformers
    sets them after it has loaded a checkpoint.

    Raises:
        SurgeonError: `capture-failed` where the class leaves a buffer unset that way.
    """
    first, second = (_initialised(model_class, config, fill) for fill in (0, 1))
    unset = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    if unset:
        raise SurgeonError(
            Code.CAPTURE_FAILED,
            f"{model_class.__name__} doesn't say what {', '.join(unset[:3])} should hold",
            at=f"{model_class.__name__}._init_weights",
            why=f"it leaves {len(unset)} buffers unset that no checkpoint stores",
            try_="make them persistent, or set them in the class's _init_weights",
            data={"buffers": unset},
        )
    return first


def _initialised(model_class: type[nn.Module], config: Any, fill: int) -> dict[str, torch.Tensor]:
    """Buffers of a model whose parameters stay on the meta device, unset ones holding `fill`."""
    with torch.device("meta"):
        model: Any = model_class(copy.deepcopy(config))
    stored = model.state_dict().keys()
    names = [n for n, _ in model.named_buffers(remove_duplicate=False) if n not in stored]
    _check_room(model_class, {name: model.get_buffer(name) for name in names})
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        buffer = getattr(module, key)
        if buffer.device.type == "meta":
            setattr(module, key, torch.full_like(buffer, fill, device="cpu"))
    model.initialize_weights()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: buffers[name] for name in names}


def _check_room(model_class: type[nn.Module], buffers: Mapping[str, torch.Tensor]) -> None:
    """Refuses buffers that no model has; parameters need no room here."""
    sizes = {name: buffer.nbytes for name, buffer in buffers.items()}
    if sum(sizes.values()) <= MOST:
        return
    largest = max(sizes, key=lambda name: sizes[name])
    raise SurgeonError(
        Code.CAPTURE_FAILED,
        "the config describes a model larger than any",
        at=f"{model_class.__name__}: {largest}",
        why=f"what it computes for itself takes {sum(sizes.values()):,} bytes, {MOST:,} at most",
        try_="correct the config",
    )
