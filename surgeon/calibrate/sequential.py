"""Piece after piece: what the pruned model computes, beside what the dense one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from surgeon.axes.contractions import Contraction, contractions
from surgeon.calibrate.moments import gram
from surgeon.calibrate.parallel import World
from surgeon.calibrate.running import Change, Get, Machine, Running
from surgeon.calibrate.segments import Segment, segments
from surgeon.calibrate.states import States, by_window, scratch
from surgeon.ir import Program


@dataclass(frozen=True)
class Pair:
    """What one parameter's input is in both models, over the same tokens; its width is d.

    Attributes:
        dim: the parameter's dimension that is summed over.
        count: tokens.
        pruned: [d, d], the mean of p·pᵀ for inputs p in the pruned model, zero where the map's
            weights on them are removed.
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

Mask = Callable[[str, torch.Tensor], torch.Tensor]
"""From a parameter's name and tensor to the tensor with zeros where it is removed."""


class _Products:
    """The sums of one value's products in both models, and with the gap between their streams.

    Args:
        width: of the value.
        kept: its channels that are read in the pruned model, alone of which there are products.
        gap: the stream's width, where the gap is what the value's map makes up for.
        cross: whether the products with the dense model's value are asked for.
        device: where they are added up.
    """

    def __init__(
        self, width: int, kept: torch.Tensor, gap: int | None, device: str, *, cross: bool
    ) -> None:
        count = len(kept)
        self._width, self._kept = width, kept.to(device)
        self.pruned = torch.zeros(count, count, dtype=torch.float64, device=device)
        self.cross = self.pruned.new_zeros(width, count) if cross else None
        self.wanted = None if gap is None else self.pruned.new_zeros(gap, count)

    def add(self, x: torch.Tensor, p: torch.Tensor, gap: torch.Tensor | None) -> None:
        x, p = _rows(x), _rows(p)
        p = p if len(self._kept) == self._width else p[:, self._kept]
        self.pruned += gram(p)
        if self.cross is not None:
            self.cross += x.T @ p
        if self.wanted is not None and gap is not None:
            self.wanted += _rows(gap).T @ p

    def to_cpu(self) -> None:
        """Takes the sums off the device."""
        self._kept, self.pruned = self._kept.cpu(), self.pruned.cpu()
        self.cross = None if self.cross is None else self.cross.cpu()
        self.wanted = None if self.wanted is None else self.wanted.cpu()

    @property
    def every(self) -> tuple[torch.Tensor, ...]:
        """All sums."""
        return tuple(t for t in (self.pruned, self.cross, self.wanted) if t is not None)

    def pair(self, dim: int, count: int, *, added: bool) -> Pair:
        """Returns the means over `count` tokens; `added` where the map makes up for the gap."""
        wanted = self._whole(self.wanted, count) if added and self.wanted is not None else None
        cross = None if self.cross is None else self._whole(self.cross, count)
        square = self.pruned.new_zeros(self._width, len(self._kept))
        square[self._kept] = self.pruned
        return Pair(dim, count, self._whole(square, count), cross, wanted)

    def _whole(self, sums: torch.Tensor, count: int) -> torch.Tensor:
        """Returns means [n, width] of sums [n, kept]."""
        means = sums.new_zeros(len(sums), self._width)
        means[:, self._kept] = sums / count
        return means


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1]).float()


def closing(piece: Segment) -> Contraction | None:
    """Returns the map whose outputs a piece adds to what it is given, to make what it passes on.

    There is none where something comes in between, such as a norm behind the branch or a
    multiplier of the residual: nothing is scaled or normalised on the way to the sum.
    """
    added = piece.added
    return next((c for c in contractions(piece.program) if c.out == added), None)


@dataclass(frozen=True)
class _Maps:
    """What is solved for in one piece: maps, by their parameters; and what masks them."""

    piece: Segment
    by_param: Mapping[str, Contraction]
    mask: Mask

    @cached_property
    def values(self) -> tuple[str, ...]:
        """What they read."""
        return tuple(dict.fromkeys(c.value for c in self.by_param.values()))

    @cached_property
    def end(self) -> Contraction | None:
        """The one among them that closes the piece."""
        found = closing(self.piece)
        return found if found is not None and found.param in self.by_param else None

    @cached_property
    def alone(self) -> str | None:
        """What the map that closes the piece reads, and no other that is solved for.

        What else reads it would be solved for with the dense model's inputs.
        """
        readers = [c.value for c in self.by_param.values()]
        value = self.end.value if self.end is not None else None
        return value if value is not None and readers.count(value) == 1 else None

    @property
    def carried(self) -> bool:
        """Whether the last map's input is all that is left of the piece to go on from."""
        return self.values == (self.alone,)

    @cached_property
    def read(self) -> Mapping[str, torch.Tensor]:
        """The channels of each value that weights are left on."""
        program = self.piece.program
        left = {v: torch.zeros(_width(program, v), dtype=torch.bool) for v in self.values}
        for name, c in self.by_param.items():
            shape = [int(size) for size in program.param[name].type.shape]
            left[c.value] |= (self.mask(name, torch.ones(shape)) != 0).any(1 - c.dim)
        return {value: found.nonzero().flatten() for value, found in left.items()}

    def products(self, device: str, *, cross: bool) -> dict[str, _Products]:
        """Returns empty sums by value."""
        width, end = partial(_width, self.piece.program), self.end
        return {
            name: _Products(
                width(name),
                self.read[name],
                width(end.out) if end and end.value == name else None,
                device,
                cross=cross or name != self.alone,
            )
            for name in self.values
        }


class _Smaller:
    """The pruned model of one part of the windows, and what is solved for on them.

    Args:
        own: which batches those are.
        states: for what it hands from piece to piece.
        weights: its weights before any is solved for; zero where they are removed.
        mask: see `sequential`.
        world: the processes and the device.
        change: see `sequential`.
    """

    def __init__(
        self,
        own: Sequence[int],
        states: States,
        weights: Get,
        mask: Mask,
        world: World,
        change: Change | None,
    ) -> None:
        self.own, self.states = frozenset(own), states
        self.found: dict[str, torch.Tensor] = {}
        self._before, self._mask = weights, mask
        self._world, self._change = world, change

    def weight(self, name: str) -> torch.Tensor:
        """Returns a parameter as it is by now."""
        found = self.found.get(name)
        return self._before(name) if found is None else self._mask(name, found)

    def enter(self, maps: _Maps, folder: Path | None, *, cross: bool) -> None:
        """Comes to the next piece."""
        self._maps, device, change = maps, self._world.device, self._change
        self._sums = maps.products(device, cross=cross)
        self._held = States(len(self.states) if maps.carried else 0, folder)
        end = maps.end
        bias = self.weight(end.bias) if end and end.bias else torch.zeros(1)
        self._bias = bias.to(device)
        self._running = (
            Running(
                maps.piece, self.weight, device, values=maps.values, passing=False, change=change
            )
            if maps.values
            else None
        )

    def add(self, i: int, batch: torch.Tensor, dense: Sequence[torch.Tensor]) -> None:
        """Runs a batch, if it is one of its own.

        Args:
            i: its number.
            batch: token ids.
            dense: what the dense model hands on, if it does, and the values that are read.
        """
        if self._running is None or i not in self.own:
            return
        maps, before = self._maps, self.states[i]
        with torch.no_grad():
            found = self._running(batch, before)
        self._running.check(batch, before, found)
        gap = None
        if maps.end and before is not None:
            gap = dense[0] - before.to(self._world.device) - self._bias
        if maps.carried:
            self._held[i] = found[0]
        read = dense[1:] if maps.piece.passed is not None else dense
        for name, x, p in zip(maps.values, read, found, strict=True):
            self._sums[name].add(x, p, gap)

    def solve(self, tokens: int, solve: Solve) -> None:
        """Solves for the piece's maps, on the products over so many tokens of all processes."""
        self._running = None
        for total in self._sums.values():
            total.to_cpu()
            self._world.add(*total.every)
        end = self._maps.end
        for param, c in self._maps.by_param.items():
            added = end is not None and param == end.param
            self.found[param] = solve(param, self._sums[c.value].pair(c.dim, tokens, added=added))

    def go_on(self, batches: Sequence[torch.Tensor]) -> None:
        """Hands on what the piece makes of its batches with what was solved for."""
        maps, device = self._maps, self._world.device
        if maps.carried:
            assert maps.end is not None
            end = maps.end
            _go_on(self.states, self._held, self.weight(end.param), end.dim, self._bias, device)
            return
        running = Running(maps.piece, self.weight, device, change=self._change)
        for i in sorted(self.own):
            before = self.states[i]
            with torch.no_grad():
                result = running(batches[i], before)
            running.check(batches[i], before, result)
            self.states[i] = result[0]


def sequential(
    program: Program,
    get: Get,
    now: Get,
    mask: Mask,
    parts: Sequence[torch.Tensor],
    params: Sequence[str],
    solve: Solve,
    machine: Machine | None = None,
    *,
    change: Change | None = None,
    cross: bool = True,
    streams: list[torch.Tensor] | None = None,
) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
    """Yields replacements of parameters, each found on what those before it produce.

    Every piece of the program runs in both models. Its parameters are solved for together; then
    the pruned model goes on with their replacements, so that later pieces see, and can make up
    for, what is left of the error. Each part of the windows has a pruned model of its own.

    Args:
        program: of the dense model.
        get: its weights.
        now: the pruned model's weights before any is solved for: the dense model's, or what
            earlier passes replaced them by.
        mask: from a parameter's name and tensor to the tensor with zeros where it is removed.
        parts: this process's token ids, [samples, length] each.
        params: those to solve for: each is multiplied with an input.
        solve: called once for each, in the order of the program.
        machine: how pieces are run.
        change: what takes some operations' places in the pruned model.
        cross: give the products with the dense model's inputs even where a map makes up for the
            gap between the streams, and their products with that gap are known.
        streams: gets what the dense model's last piece (the head) is given, by window.

    Yields:
        A parameter, and by part what was solved for on its windows. What no later piece reads is
        held by nobody else.

    Raises:
        SurgeonError: `bad-text-input` where a value is not finite.

    Reference: Frantar and Alistarh, SparseGPT, 2023 (layer after layer on the pruned model's
        inputs); He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017 (least
        squares on the consumer, towards the dense model's outputs).
    """
    machine = machine or Machine()
    world, by_part = machine.world, [machine.batches(part) for part in parts]
    batches = [batch for found in by_part for batch in found]
    owner = [number for number, found in enumerate(by_part) for _ in found]
    wanted, done = set(params), set[str]()
    with scratch(machine.offload) as folder:
        dense = States(len(batches), folder)
        smaller = [
            _Smaller(
                [i for i, found in enumerate(owner) if found == part],
                States(len(batches), folder),
                lambda name: mask(name, now(name)),
                mask,
                world,
                change,
            )
            for part in range(len(parts))
        ]
        tokens = [world.count(sum(batches[i].numel() for i in s.own)) for s in smaller]
        pieces = segments(program)
        last = {name: number for number, piece in enumerate(pieces) for name in piece.params}
        for number, piece in enumerate(pieces):
            passes_on = piece.passed is not None
            if piece.given is not None and not passes_on and streams is not None:
                streams.extend(by_window(dense))
            # After the last one there is the dense stream at most to be followed to the head, which
            # itself is the dearest piece.
            if wanted <= done and not (streams is not None and passes_on):
                break
            found = contractions(piece.program)
            own = {c.param: c for c in found if c.param in wanted and c.param not in done}
            maps = _Maps(piece, own, mask)
            running = Running(piece, get, world.device, values=maps.values, passing=passes_on)
            for s in smaller:
                s.enter(maps, folder, cross=cross)
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    x = running(batch, dense[i])
                running.check(batch, dense[i], x)
                for s in smaller:
                    s.add(i, batch, x)
                if passes_on:
                    dense[i] = x[0]
            del running
            for s, count in zip(smaller, tokens, strict=True):
                s.solve(count, solve)
            done.update(own)
            if passes_on and not wanted <= done:
                for s in smaller:
                    s.go_on(batches)
            for name in own:
                yield name, tuple(s.found[name] for s in smaller)
                if last[name] == number:
                    for s in smaller:
                        del s.found[name]


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
        if before is None or x is None:
            continue  # a batch of others
        made = torch.nn.functional.linear(x.to(device), weight) + bias.to(device)
        states[i] = before.to(device) + made
    inputs.clear()


def _width(program: Program, value: str) -> int:
    width = program.types[value].shape[-1]
    assert isinstance(width, int), "the last dimension of what a map reads is fixed"
    return width
