"""Mixtures of experts, and how Transformers' models are traced with them spelled out."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from surgeon.capture.attention import NAME


@cache
def operations() -> torch.library.Library:
    """Defines `surgeon::dispatch` once a process, and returns the library.

    `dispatch(index [N, K], weights [N, K], experts)` gives `[N, experts]`: each token's weight for
    each expert, 0 for those that it isn't sent to.
    """
    library = torch.library.Library("surgeon", "FRAGMENT")
    library.define("dispatch(Tensor index, Tensor weights, int experts) -> Tensor")

    def dispatch(index: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
        return weights.new_empty(index.shape[0], experts)

    library.impl("dispatch", dispatch, "Meta")
    torch.library.register_fake("surgeon::dispatch", dispatch, lib=library)
    return library


def _mix(
    module: Any, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Returns the weighted sum of what every expert makes of every token, [N, H] to [N, H].

    An expert that a token isn't sent to has weight 0. So the experts stay a dimension of every
    value, and products with their weights are plain ones. Inner values are weighted, not what they
    are mapped to: an expert's statistics are then of the tokens that reach it.

    Every attribute is one that Transformers' interface for experts promises of a module that uses
    it (transformers.integrations.moe); no architecture is known here.
    """
    share = torch.ops.surgeon.dispatch(index, weights, module.num_experts)
    share = share.transpose(0, 1).unsqueeze(-1)
    made = _map(module, tokens.unsqueeze(0), "gate_up_proj" if module.has_gate else "up_proj")
    made = module._apply_gate(made) if module.has_gate else module.act_fn(made)
    if module.has_post_expert_norm:  # it sees what the whole expert gives, unweighted
        out = module.post_expert_norm(_map(module, made, "down_proj")) * share
    else:
        out = _map(module, made * share, "down_proj", share)
    return out.sum(dim=0).to(tokens.dtype)


def _map(
    module: Any, x: torch.Tensor, name: str, share: torch.Tensor | None = None
) -> torch.Tensor:
    weight: torch.Tensor = getattr(module, name)
    out = torch.matmul(x, weight if module.is_transposed else weight.transpose(-1, -2))
    if not module.has_bias:
        return out
    bias: torch.Tensor = getattr(module, f"{name}_bias").unsqueeze(1)
    return out + (bias if share is None else bias * share)


@cache
def register_experts() -> str:
    """Registers the mixture with Transformers' interface for experts, and returns its name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    operations()
    ALL_EXPERTS_FUNCTIONS.register(NAME, _mix)
    return NAME
