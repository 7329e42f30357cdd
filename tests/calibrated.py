"""Tiny models on five windows of tokens: what is gathered, and the whole program at once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from surgeon.calibrate.data import Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.opening import Model, open_model
from surgeon.runtime.lower import lower
from tests import models


@cache
def origin(name: str = "Llama") -> Model:
    return open_model(models.tiny(name))


def ids() -> torch.Tensor:
    return models.tokens(100, 5, 11)


def data(name: str = "Llama", **options: Any) -> Gathered:
    found = origin(name)
    return Gathered(found.axes, found.read, Windows(ids().numpy()), **options)


def run(found: Model, values: tuple[str, ...] = (), get: Any = None, change: Any = None) -> Any:
    """Values of the program run at once; the logits without any."""
    program = replace(found.program, outputs=values) if values else found.program
    row = ids()
    positions = torch.arange(row.shape[1]).expand(len(row), -1)
    with torch.no_grad():
        out = lower(program, get or found.read, change=change)(row, torch.ones_like(row), positions)
    return out if isinstance(out, tuple) else (out,)
