"""Decoder graphs run step by step with plain arrays, and compared with torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch


class Steps:
    """A decoder graph on the CPU, its cache handed on from step to step."""

    def __init__(self, path: Path, batch: int = 2) -> None:
        settings: Any = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self.session: Any = onnxruntime.InferenceSession(path, settings, providers=providers)
        self.names = [value.name for value in self.session.get_outputs()]
        self.cache: dict[str, Any] = {}
        for value in self.session.get_inputs():
            if value.name.startswith("past_key_values."):
                _, heads, _, width = value.shape
                self.cache[value.name] = np.zeros((batch, heads, 0, width), np.float32)

    def step(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns the logits of new tokens; `mask` covers those before them too."""
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), **self.cache}
        logits, *presents = self.session.run(None, feed)
        for name, value in zip(self.names[1:], presents, strict=True):
            self.cache[name.replace("present", "past_key_values")] = value
        return torch.from_numpy(logits)


def stepwise(
    path: Path, ids: torch.Tensor, mask: torch.Tensor, pieces: Sequence[int]
) -> torch.Tensor:
    """Returns the logits of ids [B, S] read in pieces of these lengths, that add up to S."""
    run, out, start = Steps(path, len(ids)), list[torch.Tensor](), 0
    for piece in pieces:
        out.append(run.step(ids[:, start : start + piece], mask[:, : start + piece]))
        start += piece
    assert start == ids.shape[1]
    return torch.cat(out, 1)


def largest(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor) -> float:
    """Returns the largest difference at tokens, as a share of the largest logit."""
    real = mask.bool()
    apart = (found - wanted)[real].abs().max() / wanted[real].abs().max()
    return float(apart)
