"""A text that can be learnt by heart, and plans of tiny models to train on it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from passes.compensate.recover import Recover
from surgeon.calibrate.data import Piece, Places, Windows
from surgeon.calibrate.data import Recipe as Data
from surgeon.opening import Model, open_model
from surgeon.plugin import Plan, cut
from surgeon.recovering import Ground
from surgeon.recovery.settings import Trained
from surgeon.recovery.small import Small
from surgeon.recovery.training import Job, trained
from tests import models

TEXT = [3 + 7 * i % 89 for i in range(400)]
DATA = Data((Piece(TEXT),), samples=8, length=16)
FFN = "model.layers.{}.mlp/ffn"


@cache
def origin(name: str = "Llama", tied: bool = False) -> Model:
    return open_model(models.tiny(name, **({"tie_word_embeddings": True} if tied else {})))


def thinner(model: Model, count: int = 40, layers: tuple[int, ...] = (0, 1)) -> Plan:
    """The same channels of some layers' MLPs stay."""
    axes = [model.axes.get(FFN.format(n)) for n in layers]
    return Plan(tuple(cut(axis, range(count)) for axis in axes))


def windows() -> Places:
    ids = torch.tensor(TEXT[:384]).reshape(24, 16)
    return Places.of(Windows(ids.numpy()))


def options(**given: Any) -> Recover:
    return Recover(**{"steps": 6, "length": 16, "rate": 1e-2, "distill": "none", **given})


def train(
    ground: Ground, settings: Recover, folder: Any = None, teacher: bool = True
) -> tuple[Trained, Small]:
    """Trains what a ground's plan leaves; the original teaches."""
    dense = Ground(ground.origin).small() if teacher and settings.distill != "none" else None
    small = ground.small()
    return trained(Job(small, dense, windows(), settings, folder)), small


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits
