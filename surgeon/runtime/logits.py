"""Every kind of model as one function, from token ids to logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.decoder import Decoder
from surgeon.runtime.session import INPUTS, OrtSession

Logits = Callable[[NDArray[np.int64]], Any]
"""Takes int64 token ids [batch, sequence]; gives logits as a NumPy array or a torch tensor."""


def logits_of(model: Any) -> Logits:
    """Returns the model as a function of token ids alone: no padding, no cache, no gradients.

    Args:
        model: an `OrtSession`, a `Decoder`, a Transformers model, a graph module whose inputs are
            `input_ids`, `attention_mask` and `position_ids`, an exported program of these, or any
            callable that is such a function already.

    Raises:
        SurgeonError: it is none of these.
    """
    if isinstance(model, OrtSession | Decoder):
        return model.run
    if is_transformers(model):
        return _from_transformers(model)
    if hasattr(model, "graph_signature") and hasattr(model, "module"):  # an exported program
        return _from_module(model.module())
    if hasattr(model, "named_parameters"):  # a torch module, told without importing torch
        return _from_module(model)
    if callable(model):
        return model
    raise SurgeonError(
        Code.NOT_A_MODEL,
        f"a {type(model).__name__} can't be run",
        at=repr(model)[:80],
        why="it is no ONNX session, no Transformers model, no graph module and no function",
        try_="load it first, or open an ONNX file with OrtSession",
    )


def is_transformers(model: Any) -> bool:
    """Whether this is a Transformers model, told without importing Transformers."""
    return hasattr(model, "generate") and hasattr(model, "config")


def positions_of(model: Any) -> int | None:
    """Returns how many positions the model says it was made for, or None if it doesn't say."""
    if isinstance(model, OrtSession | Decoder):
        return model.positions
    size = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return size if isinstance(size, int) else None


def vocabulary_of(model: Any) -> int | None:
    """Returns how many tokens the model says it knows, or None if it doesn't say."""
    own = getattr(model, "vocab", None)
    size = getattr(getattr(model, "config", None), "vocab_size", None) if own is None else own
    return size if isinstance(size, int) else None


def _from_transformers(model: Any) -> Logits:
    import torch

    def run(ids: NDArray[np.int64]) -> Any:
        if model.training:
            raise SurgeonError(
                Code.NOT_A_MODEL,
                "the model is in training mode",
                at=type(model).__name__,
                why="dropout would make its logits random",
                try_="model.eval()",
            )
        with torch.inference_mode():
            return model(torch.from_numpy(ids).to(model.device), use_cache=False).logits

    return run


def _from_module(module: Any) -> Logits:
    import torch

    # An exported module insists on the way, positional or by name, that it was exported with.
    spec = getattr(module, "_in_spec", None)
    by_name = spec is not None and spec.child(1).num_leaves > 0

    def run(ids: NDArray[np.int64]) -> Any:
        first = next(module.parameters(), None)
        device = torch.device("cpu") if first is None else first.device
        input_ids = torch.from_numpy(ids).to(device)
        mask = torch.ones_like(input_ids)
        positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)
        inputs = dict(zip(INPUTS, (input_ids, mask, positions), strict=True))
        with torch.inference_mode():
            out = module(**inputs) if by_name else module(*inputs.values())
        return out[0] if isinstance(out, (tuple, list)) else out

    return run
