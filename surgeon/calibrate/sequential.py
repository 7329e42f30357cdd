"""Piece after piece: what the pruned model computes, beside what the dense one does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from surgeon.axes.contractions import Contraction, contractions
from surgeon.calibrate.running import TOKENS, Change, Get, Machine, Running
from surgeon.calibrate.segments import Segment, segments
from surgeon.calibrate.states import States, by_window, scratch
from surgeon.ir import Program


@dataclass(frozen=True)
class Pair:
    """What one parameter's input is in both models, over the same tokens; its width is d.

    Attributes:
        dim: the parameter's dimension that is summed over.
        count: tokens.
        pruned: [d, d], the mean of p·pᵀ for inputs p in the pruned model (zero where removed).
        cross: [d, d], the mean of x·pᵀ for inputs x in the dense model; None where `wanted` takes
            its place.
        wanted: [out, d], the mean of t·pᵀ, where t is what the map would have to make for the
            pruned model to go on with the dense one's residual stream; None where what it makes
            is not simply added to what its piece is given.
    """

    dim: int
    count: int
    pruned: torch.Tensor
    cross: torch.Tensor | None
    wanted: torch.Tensor | None = None


Solve = Callable[[str, Pair], torch.Tensor]
"""From a parameter's name and its inputs to the full-size tensor that replaces it."""


class _Products:
    """The sums of one value's products in both models, and with the gap between their streams.

    Args:
        width: of the value.
        gap: the stream's width, where the gap is what the value's map makes up for.
        cross: whether the products with the dense model's value are asked for.
        device: where they are added up.
    """

    def __init__(self, width: int, gap: int | None, device: str, *, cross: bool) -> None:
        self.pruned = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros_like(self.pruned) if cross else None
        self.wanted = None if gap is None else self.pruned.new_zeros(gap, width)

    def add(self, x: torch.Tensor, p: torch.Tensor, gap: torch.Tensor | None) -> None:
        x, p = _rows(x), _rows(p)
        self.pruned += p.T @ p
        if self.cross is not None:
            self.cross += x.T @ p
        if self.wanted is not None and gap is not None:
            self.wanted += _rows(gap).T @ p

    def to_cpu(self) -> None:
        """Takes the sums off the device."""
        self.pruned = self.pruned.cpu()
        self.cross = None if self.cross is None else self.cross.cpu()
        self.wanted = None if self.wanted is None else self.wanted.cpu()

    @property
    def every(self) -> tuple[torch.Tensor, ...]:
        """All sums."""
        return tuple(t for t in (self.pruned, self.cross, self.wanted) if t is not None)

    def pair(self, dim: int, count: int, *, added: bool) -> Pair:
        """Returns the means over `count` tokens; `added` where the map makes up for the gap."""
        wanted = self.wanted / count if added and self.wanted is not None else None
        cross = None if self.cross is None else self.cross / count
        return Pair(dim, count, self.pruned / count, cross, wanted)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def closing(piece: Segment) -> Contraction | None:
    """Returns the map whose outputs a piece adds to what it is given, to make what it passes on.

    There is none where something comes in between, such as a norm behind the branch or a
    multiplier of the residual: nothing is scaled or normalised on the way to the sum.
    """
    added = piece.added
    return next((c for c in contractions(piece.program) if c.out == added), None)


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
    cross: bool = True,
    streams: list[torch.Tensor] | None = None,
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
        cross: give the products with the dense model's inputs even where a map makes up for the
            gap between the streams, and their products with that gap are known.
        streams: gets what the dense model's last piece (the head) is given, by window.

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
            passes_on = piece.passed is not None
            if piece.given is not None and not passes_on and streams is not None:
                streams.extend(by_window(dense))
            # After the last one there is the dense stream at most to be followed to the head, which
            # itself is the dearest piece.
            followed = streams is not None and passes_on
            if wanted <= found.keys() and not followed:
                break
            tapped = {
                c.param: c
                for c in contractions(piece.program)
                if c.param in wanted and c.param not in found
            }
            values = tuple(dict.fromkeys(c.value for c in tapped.values()))
            end = closing(piece)
            end = end if end is not None and end.param in tapped else None
            # What else reads the last map's input is solved for with the dense model's inputs.
            readers = [c.value for c in tapped.values()]
            alone = end.value if end is not None and readers.count(end.value) == 1 else None
            sums = {
                name: _Products(
                    _width(piece.program, name),
                    _width(piece.program, end.out) if end and end.value == name else None,
                    world.device,
                    cross=cross or name != alone,
                )
                for name in values
            }
            # The last map's input is all that is left of the piece to go on from.
            carried = values == (alone,)
            held = States(len(batches) if carried else 0, folder)
            one = Running(piece, get, world.device, values=values, passing=passes_on)
            two = (
                Running(piece, changed, world.device, values=values, passing=False, change=change)
                if values
                else None
            )
            bias = changed(end.bias) if end and end.bias else torch.zeros(1)
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    x = one(batch, dense[i])
                    p = two(batch, small[i]) if two else tuple[torch.Tensor, ...]()
                one.check(batch, dense[i], x)
                if two:
                    two.check(batch, small[i], p)
                before = small[i]
                gap = None
                if end and before is not None:
                    gap = x[0] - before.to(world.device) - bias.to(world.device)
                if carried:
                    held[i] = p[0]
                for name, a, b in zip(values, x[1:] if passes_on else x, p, strict=True):
                    sums[name].add(a, b, gap)
                if passes_on:
                    dense[i] = x[0]
            count = world.count(batches_tokens(batches))
            for total in sums.values():
                total.to_cpu()
                world.add(*total.every)
            del one, two
            for param, c in tapped.items():
                pair = sums[c.value].pair(
                    c.dim, count, added=end is not None and param == end.param
                )
                found[param] = solve(param, pair)
            if not passes_on or wanted <= found.keys():
                continue
            if carried:
                assert end is not None
                _go_on(small, held, changed(end.param), end.dim, bias, world.device)
                continue
            three = Running(piece, changed, world.device, change=change)
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    result = three(batch, small[i])
                three.check(batch, small[i], result)
                small[i] = result[0]
    return found


def _go_on(
    states: States,
    inputs: States,
    weight: torch.Tensor,
    dim: int,
    bias: torch.Tensor,
    device: str,
) -> None:
    """Adds to each state what a map makes of its inputs, which are let go."""
    weight = (weight if dim == 1 else weight.T).to(device)
    for i in range(len(states)):
        before, x = states[i], inputs[i]
        assert before is not None and x is not None, "a map that closes a piece has both"
        made = torch.nn.functional.linear(x.to(device), weight) + bias.to(device)
        states[i] = before.to(device) + made
    inputs.clear()


def batches_tokens(batches: Sequence[torch.Tensor]) -> int:
    """Returns how many tokens there are in some batches."""
    return sum(batch.numel() for batch in batches)


def _width(program: Program, value: str) -> int:
    width = program.types[value].shape[-1]
    assert isinstance(width, int), "the last dimension of what a map reads is fixed"
    return width
