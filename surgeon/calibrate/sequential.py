"""Piece after piece: what the pruned model computes, beside what the dense one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from surgeon.axes.consumers import contractions
from surgeon.calibrate.running import TOKENS, Change, Get, Machine, Running
from surgeon.calibrate.segments import segments
from surgeon.calibrate.states import States, scratch
from surgeon.ir import Program


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


class _Products:
    """The sums of one value's products in both models."""

    def __init__(self, width: int, device: str) -> None:
        self.pruned = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.pruned)

    def add(self, x: torch.Tensor, p: torch.Tensor) -> None:
        x, p = x.reshape(-1, x.shape[-1]).float(), p.reshape(-1, p.shape[-1]).float()
        self.pruned += p.T @ p
        self.cross += x.T @ p


def sequential(
    program: Program,
    get: Get,
    now: Get,
    mask: Callable[[str, torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    params: Sequence[str],
    solve: Solve,
    machine: Machine | None = None,
    *,
    tokens: int = TOKENS,
    change: Change | None = None,
) -> dict[str, torch.Tensor]:
    """Returns replacements of parameters, each found on what those before it produce.

    Every piece of the program runs in both models. Its parameters are solved for together; then
    the pruned model goes on with their replacements, so that later pieces see, and can make up
    for, what is left of the error.

    Args:
        program: of the dense model.
        get: its weights.
        now: the pruned model's weights before any is solved for: the dense model's, or what
            earlier passes replaced them by.
        mask: from a parameter's name and tensor to the tensor with zeros where it is removed.
        ids: this process's token ids [samples, length].
        params: those to solve for: each is multiplied with an input.
        solve: called once for each, in the order of the program.
        machine: how pieces are run.
        tokens: how many go through a piece at a time, where there is no machine.
        change: what takes some operations' places in the pruned model.

    Raises:
        SurgeonError: `bad-text-input` where a value is not finite.

    Reference: Frantar and Alistarh, SparseGPT, 2023 (layer after layer on the pruned model's
        inputs); He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017 (least
        squares on the consumer, towards the dense model's outputs).
    """
    machine = machine or Machine(tokens=tokens)
    world, batches = machine.world, machine.batches(ids)
    found: dict[str, torch.Tensor] = {}
    wanted = set(params)

    def changed(name: str) -> torch.Tensor:
        return mask(name, found[name] if name in found else now(name))

    with scratch(machine.offload) as folder:
        dense, small = States(len(batches), folder), States(len(batches), folder)
        for piece in segments(program):
            if wanted <= found.keys():
                break  # nothing after the last one is asked for, and the head is the dearest
            tapped = {
                c.param: c
                for c in contractions(piece.program)
                if c.param in wanted and c.param not in found
            }
            values = tuple(dict.fromkeys(c.value for c in tapped.values()))
            passing = piece.passed is not None
            sums = {name: _Products(_width(piece.program, name), world.device) for name in values}
            one = Running(piece, get, world.device, values=values, passing=passing)
            two = (
                Running(piece, changed, world.device, values=values, passing=False, change=change)
                if values
                else None
            )
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    x = one(batch, dense[i])
                    p = two(batch, small[i]) if two else ()
                one.check(batch, dense[i], x)
                if two:
                    two.check(batch, small[i], p)
                for name, a, b in zip(values, x[1:] if passing else x, p, strict=True):
                    sums[name].add(a, b)
                if passing:
                    dense[i] = x[0]
            count = world.count(batches_tokens(batches))
            totals = {name: (s.pruned.cpu(), s.cross.cpu()) for name, s in sums.items()}
            for total in totals.values():
                world.add(*total)
            del one, two
            for param, c in tapped.items():
                pruned, cross = (total / count for total in totals[c.value])
                found[param] = solve(param, Pair(c.dim, count, pruned, cross))
            if not passing or wanted <= found.keys():
                continue
            three = Running(piece, changed, world.device, change=change)
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    result = three(batch, small[i])
                three.check(batch, small[i], result)
                small[i] = result[0]
    return found


def batches_tokens(batches: Sequence[torch.Tensor]) -> int:
    """Returns how many tokens there are in some batches."""
    return sum(batch.numel() for batch in batches)


def _width(program: Program, value: str) -> int:
    width = program.types[value].shape[-1]
    assert isinstance(width, int), "the last dimension of what a map reads is fixed"
    return width
