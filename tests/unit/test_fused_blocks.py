"""Experts stored apart, read as blocks of the one tensor that the model has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgeon
from surgeon.capture.blocks import Buffers
from surgeon.capture.fused import FusedWeights
from surgeon.opening import open_model
from tests import mixtures

pytestmark = pytest.mark.slow


def test_blocks_are_rows_of_the_whole(tmp_path: Path) -> None:
    model = mixtures.build("Mixtral")
    model.save_pretrained(tmp_path / "m")
    origin = open_model(tmp_path / "m")
    weights = origin.tensors
    assert isinstance(weights, FusedWeights)
    (name, *_) = [n for n in weights.names() if weights.shape(n)[0] == 4 and "gate_up" in n]
    whole, rows = weights[name], [(0, 2), (3, 4)]
    found = list(weights.blocks(name, rows, Buffers(2, 64)))
    assert [start for start, _ in found] == [0, 3]
    for (start, stop), (_, part) in zip(rows, found, strict=True):
        assert torch.equal(part, whole[start:stop])
    assert weights.place(name)[0].endswith(".safetensors")
    own = next(n for n in weights.names() if "embed" in n)
    assert [weights.place(n) for n in (own, name)]
    small = surgeon.prune(origin, ratio=0.2)  # scored, sliced and compared
    small.save(tmp_path / "out")
    assert surgeon.verify(tmp_path / "out").largest < 1e-4
