"""Every architecture as a decoder graph: prefill, chunks and steps give torch's own logits."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgeon.axes.plan import Plan
from surgeon.emit.onnx_decoder import Options, write_decoder
from surgeon.opening import Model, open_model
from tests import models
from tests.decoding import Steps, largest, stepwise
from tests.exactness import Subject, prunable, random_cut, subject_of

pytestmark = pytest.mark.zoo

TOLERANCE = 2e-4
POSITIONS = 256
STYLES = ("ort", "standard")

# Heads that GroupQueryAttention turns by itself, windows that are shorter than the text.
WIDE: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 16},
    "Mistral": {"head_dim": 16, "sliding_window": 5},
    "Qwen3": {"head_dim": 16},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 5},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 5},
    "GPT2": {"n_positions": 256},
    "Granite": {"head_dim": 16},
    "Olmo2": {"head_dim": 16},
}


@cache
def opened(name: str) -> tuple[Any, Model]:
    model = models.tiny(name, **WIDE.get(name, {}))
    return model, open_model(model)


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


def padded(length: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = models.tokens(100, 2, length)
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if left else slice(length - 4, length)] = 0
    return ids, mask


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_prefill_chunks_and_steps(name: str, style: str, tmp_path: Path) -> None:
    model, origin = opened(name)
    path = tmp_path / "model.onnx"
    options = Options(style, positions=POSITIONS)
    write_decoder(origin.program, origin.read, path, options=options, check=False)

    ids, mask = padded(14, left=False)
    found = stepwise(path, ids, mask, [14])
    assert largest(found, logits(model, ids, mask), mask) < TOLERANCE

    if style == "standard":
        ids, mask = padded(14, left=True)
        found = stepwise(path, ids, mask, [6, 3, *[1] * 5])
        assert largest(found, logits(model, ids, mask), mask) < TOLERANCE

    # GroupQueryAttention reads a second chunk for one row at a time only.
    ids = models.tokens(100, 1, 20)
    whole = torch.ones_like(ids)
    found = stepwise(path, ids, whole, [7, 4, 2, *[1] * 7])
    assert largest(found, logits(model, ids, whole), whole) < TOLERANCE


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
def test_a_ragged_batch_goes_on_for_128_steps(name: str, style: str, tmp_path: Path) -> None:
    model, origin = opened(name)
    path = tmp_path / "model.onnx"
    options = Options(style, positions=POSITIONS)
    write_decoder(origin.program, origin.read, path, options=options, check=False)
    lengths, steps = (9, 5), 128
    ids = models.tokens(100, 2, 9 + steps)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    run = Steps(path)
    start = run.step(ids[:, :9], mask)
    rest: list[torch.Tensor] = []
    for i in range(steps):
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
        rest.append(run.step(ids[:, 9 + i : 10 + i], mask))
    for row, length in enumerate(lengths):
        alone = torch.cat([ids[row : row + 1, :length], ids[row : row + 1, 9:]], 1)
        wanted = logits(model, alone, torch.ones_like(alone))[0]
        found = torch.cat([start[row, :length], *(r[row] for r in rest)])
        assert float((found - wanted).abs().max() / wanted.abs().max()) < TOLERANCE


@cache
def subject(name: str) -> Subject:
    return subject_of(models.tiny(name, **WIDE.get(name, {})))


@pytest.mark.parametrize(
    ("name", "style"),
    [("Llama", "ort"), ("Llama", "standard"), ("Gemma2", "ort"), ("Qwen3", "ort"),
     ("Phi3", "standard"), ("GPT2", "ort")],
)  # fmt: skip
@pytest.mark.parametrize("role", ["ffn", "kv_heads", "q_per_kv", "qk", "v", "hidden", "branches"])
def test_what_is_left_of_every_role(role: str, name: str, style: str, tmp_path: Path) -> None:
    """Each layer loses something else, so that no two have the same widths."""
    made = subject(name)
    axes, rng = made.axes, np.random.default_rng(0)
    if role == "branches":
        plan = Plan(branches=(axes.branches[0].name, axes.branches[-1].name))
    else:
        roles = ("qk", "rotary") if role == "qk" else (role,)
        chosen = prunable(axes, lambda a: a.role in roles)
        if not chosen:
            pytest.skip(f"{name} has no {role} to prune")
        some = [max(1, a.size * (i + 1) // (len(chosen) + 1)) for i, a in enumerate(chosen)]
        cuts = [random_cut(axes, a, rng, keep=k) for a, k in zip(chosen, some, strict=True)]
        plan = Plan(cuts=tuple(cuts))
    program, weights = made.small(plan)
    path = tmp_path / "model.onnx"
    options = Options(style, positions=64)
    found = write_decoder(program, weights, path, options=options)
    assert found.largest is not None and found.largest < TOLERANCE
