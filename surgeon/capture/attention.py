"""Surgeon's attention operation, and how Transformers' models are traced with it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

NAME = "surgeon"
"""The name under which Transformers knows this attention implementation."""


@cache
def operations() -> torch.library.Library:
    """Defines `surgeon::attention` and the layer marks once a process, and returns the library.

    `attention(q [B, Hq, S, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], padding [B, T]?)` gives
    `[B, Hq, S, Dv]`. `padding` is false (or 0) where a key is no token. The last query sees the
    last key; with `causal`, query i sees keys up to its own, with `window`, only the last
    `window` of those; `softcap` bounds scores by c·tanh(score / c).
    """
    library = torch.library.Library("surgeon", "DEF")
    library.define(
        "attention(Tensor q, Tensor k, Tensor v, Tensor? padding, *, float scale, bool causal, "
        "int? window=None, float? softcap=None, Tensor? sinks=None) -> Tensor"
    )
    library.define("layer_in(Tensor x, str name) -> Tensor")
    library.define("layer_out(Tensor x, str name) -> Tensor")
    library.define("layer_skip(Tensor x, str name) -> Tensor")

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: object, **_: object
    ) -> torch.Tensor:
        return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])

    def mark(x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.empty_like(x)

    for name, fake in (
        ("attention", attention),
        ("layer_in", mark),
        ("layer_out", mark),
        ("layer_skip", mark),
    ):
        library.impl(name, fake, "Meta")
        torch.library.register_fake(f"surgeon::{name}", fake, lib=library)
    return library


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = torch.ops.surgeon.attention(
        query,
        key,
        value,
        attention_mask,
        scale=float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        causal=bool(causal),
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def _mask(*_: Any, attention_mask: torch.Tensor | None = None, **__: Any) -> torch.Tensor | None:
    """Leaves the padding as it is: causality and windows are the operation's own."""
    return attention_mask


@cache
def register() -> str:
    """Registers the operation with Transformers' attention and mask interfaces, by its name."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    operations()
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME
