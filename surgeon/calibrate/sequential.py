"""Piece after piece: what the pruned model computes, beside what the dense one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from surgeon.axes.consumers import contractions
from surgeon.calibrate.segments import segments
from surgeon.calibrate.statistics import TOKENS, Get, returning
from surgeon.ir import Program
from surgeon.runtime.lower import lower


@dataclass(frozen=True)
class Pair:
    """What one parameter's input is in both models, over the same tokens; its width is d.

    Attributes:
        dim: the parameter's dimension that is summed over.
        count: tokens.
        pruned: [d, d], the mean of p·pᵀ for inputs p in the pruned model (zero where removed).
        cross: [d, d], the mean of x·pᵀ for inputs x in the dense model.
    """

    dim: int
    count: int
    pruned: torch.Tensor
    cross: torch.Tensor


Solve = Callable[[str, Pair], torch.Tensor]
"""From a parameter's name and its inputs to the full-size tensor that replaces it."""


def sequential(
    program: Program,
    get: Get,
    mask: Callable[[str, torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    params: Sequence[str],
    solve: Solve,
    *,
    tokens: int = TOKENS,
) -> dict[str, torch.Tensor]:
    """Returns replacements of parameters, each found on what those before it produce.

    Every piece of the program runs in both models. Its parameters are solved for together; then
    the pruned model goes on with their replacements, so that later pieces see, and can make up
    for, what is left of the error.

    Args:
        program: of the dense model.
        get: its weights.
        mask: from a parameter's name and tensor to the tensor with zeros where it is removed.
        ids: token ids [samples, length].
        params: those to solve for: each is multiplied with an input.
        solve: called once for each, in the order of the program.
        tokens: how many go through a piece at a time, rounded to whole windows.

    Reference: Frantar and Alistarh, SparseGPT, 2023 (layer after layer on the pruned model's
        inputs); He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017 (least
        squares on the consumer, towards the dense model's outputs).
    """
    positions = torch.arange(ids.shape[1])[None]
    batches = ids.split(max(1, tokens // ids.shape[1]))
    dense: list[torch.Tensor | None] = [None] * len(batches)
    small: list[torch.Tensor | None] = [None] * len(batches)
    found: dict[str, torch.Tensor] = {}

    def now(name: str) -> torch.Tensor:
        return mask(name, found[name] if name in found else get(name))

    wanted = set(params)
    for piece in segments(program):
        if wanted <= found.keys():
            break  # nothing after the last one is asked for, and the head is the dearest piece
        tapped = {c.param: c for c in contractions(piece.program) if c.param in wanted}
        values = tuple(dict.fromkeys(c.value for c in tapped.values()))
        program_ = returning(piece.program, values)
        sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        count = 0
        one = lower(program_, get)
        two = lower(program_, now) if values else None
        for i, batch in enumerate(batches):
            inputs = (batch, torch.ones_like(batch), positions.expand(len(batch), -1))
            x, dense[i] = _run(one, inputs, dense[i])
            if two is None:
                continue
            p, _ = _run(two, inputs, small[i])
            count += batch.numel()
            for name, a, b in zip(values, x, p, strict=True):
                a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
                if name not in sums:
                    zero = torch.zeros(a.shape[-1], a.shape[-1], dtype=torch.float64)
                    sums[name] = zero, zero.clone()
                sums[name][0].add_(b.T @ b)
                sums[name][1].add_(a.T @ b)
        for param, c in tapped.items():
            pruned, cross = (total / count for total in sums[c.value])
            found[param] = solve(param, Pair(c.dim, count, pruned, cross))
        two = lower(piece.program, now)
        for i, batch in enumerate(batches):
            inputs = (batch, torch.ones_like(batch), positions.expand(len(batch), -1))
            _, small[i] = _run(two, inputs, small[i])
    return found


def _run(
    module: torch.nn.Module, inputs: Sequence[torch.Tensor], state: torch.Tensor | None
) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
    with torch.no_grad():
        result = module(*inputs, *(() if state is None else (state,)))
    several = result if isinstance(result, tuple) else (result,)
    return several[1:], several[0]
