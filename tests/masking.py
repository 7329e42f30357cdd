"""A model in full shape under a plan, by the program and by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from surgeon.axes.plan import Plan, Selection
from surgeon.opening import Model
from surgeon.runtime.apply import masked
from surgeon.runtime.lower import lower


def masked_logits(
    origin: Model, change: Mapping[str, torch.Tensor], plan: Plan, ids: torch.Tensor
) -> torch.Tensor:
    """Returns the logits on token ids where tensors are replaced and the plan's channels zero."""
    selection = Selection(origin.axes, plan)

    def read(name: str) -> torch.Tensor:
        return masked(selection, name, change.get(name, origin.read(name)))

    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    with torch.no_grad():
        return lower(origin.program, read)(ids, torch.ones_like(ids), positions)
