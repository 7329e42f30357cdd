"""Every mistake of the user: four parts on standard error, exit code 1, nothing written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.command import Outcome, surgeon

RATIO = ("--ratio", "0.2")


def refused(outcome: Outcome, code: str, *texts: str) -> Outcome:
    """Asserts the four parts, each with something in it, and these texts among them."""
    assert outcome.code == 1, outcome.err
    assert outcome.out == ""
    assert re.fullmatch(
        r"\[[a-z-]+\] \S[^\n]*\n  at  \S[^\n]*\n  why \S[^\n]*\n  try \S[^\n]*\n", outcome.err
    ), outcome.err
    assert outcome.err.startswith(f"[{code}] "), outcome.err
    for text in texts:
        assert text in outcome.err
    return outcome


def prune(model: object, out: Path, *args: object) -> Outcome:
    """Prunes, and sees to it that a refusal leaves nothing beside `out` either."""
    before = sorted(out.parent.rglob("*"))
    outcome = surgeon("prune", model, "-o", out, *args)
    if outcome.code:
        assert sorted(out.parent.rglob("*")) == before
    return outcome


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})
