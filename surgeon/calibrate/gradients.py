"""The loss's gradients, backwards piece by piece: one piece's weights and graph at a time.

Reference: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016 (pieces computed again
on the way back); Martens and Grosse, Optimizing Neural Networks with Kronecker-factored Approximate
Curvature, 2015 (the second moment of gradients at a map's outputs, here of the true labels: the
empirical Fisher matrix).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.calibrate.loss import HEAD_TOKENS, slope_of_summed
from surgeon.calibrate.moments import gram
from surgeon.calibrate.parallel import World
from surgeon.calibrate.running import Get, Machine, Running, not_finite
from surgeon.calibrate.segments import segments
from surgeon.calibrate.states import States, scratch
from surgeon.calibrate.statistics import forward
from surgeon.calibrate.taps import Asked, taps
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program

KEPT_BYTES = 2**29
"""What the states that wait for the way back may take in memory; on a disk there is no limit."""


@dataclass(frozen=True)
class Gradients:
    """The loss's gradients with respect to one parameter.

    Attributes:
        count: windows.
        mean: of the parameter's shape, fp32: the gradient of the mean loss of a predicted token.
        square: of the same shape, fp32: the mean over windows of the squared gradient of the
            window's mean loss, which is the diagonal of the empirical Fisher matrix.
    """

    count: int
    mean: torch.Tensor
    square: torch.Tensor


@dataclass(frozen=True)
class Fisher:
    """The loss's gradients at what one map makes; it has n outputs.

    Attributes:
        count: tokens.
        second: [n, n], fp32: the mean over tokens of g·gᵀ, where g is the gradient of the loss,
            summed over its window's predicted tokens, with respect to the outputs at one token.
    """

    count: int
    second: torch.Tensor


class _Slopes:
    """Gradients in the making."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.count = 0
        self.total = torch.zeros(*shape)
        self.squares = torch.zeros(*shape)

    def add(self, gradient: torch.Tensor) -> None:
        """Takes one window's."""
        gradient = gradient.detach().to("cpu", torch.float32)
        self.count += 1
        self.total += gradient
        self.squares.addcmul_(gradient, gradient)

    def done(self, world: World) -> Gradients:
        count = world.count(self.count)
        world.add(self.total, self.squares)
        return Gradients(count, self.total.div_(count), self.squares.div_(count))


class _Products:
    """A Fisher matrix in the making."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.total = torch.zeros(width, width, dtype=torch.float64)

    def add(self, gradient: torch.Tensor) -> None:
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
        self.count += len(rows)
        self.total += gram(rows).cpu()

    def done(self, world: World) -> Fisher:
        count = world.count(self.count)
        world.add(self.total)
        return Fisher(count, self.total.div_(count).float())


def there_and_back(
    program: Program,
    get: Get,
    ids: torch.Tensor,
    *,
    params: Sequence[str] = (),
    outputs: Sequence[str] = (),
    machine: Machine | None = None,
    kept: int | None = None,
) -> tuple[dict[str, Gradients], dict[str, Fisher]]:
    """Returns gradients of the loss by parameter, and their second moments by value.

    Windows go through the program in blocks. Forward, what each piece is given is kept; back, each
    piece is computed again, with a graph, and gives the gradient of what it was given.

    Args:
        program: a language model's.
        get: its weights.
        ids: this process's token ids [samples, length].
        params: parameters to differentiate by. One used in several pieces gets the sum.
        outputs: values, made by maps, whose gradients' second moments are asked for.
        machine: how pieces are run.
        kept: tokens of a block; by default as many as `KEPT_BYTES` hold, or all on a disk.

    Raises:
        SurgeonError: `bad-text-input` where a value or a gradient is not finite, `bad-option` for
            a parameter that has no gradient.
    """
    machine = machine or Machine()
    _check(program, params)
    back = _Back(program, get, params, outputs, machine)
    for block in machine.batches(ids, kept or back.room(ids.shape[1])):
        back.block(block)
    return back.done()


class _Back:
    """The way back, block after block."""

    def __init__(
        self,
        program: Program,
        get: Get,
        params: Sequence[str],
        outputs: Sequence[str],
        machine: Machine,
    ) -> None:
        self.get, self.machine = get, machine
        self.pieces = segments(program)
        places = {
            name: [i for i, piece in enumerate(self.pieces) if name in piece.params]
            for name in params
        }
        self.shared = {name: found for name, found in places.items() if len(found) > 1}
        self.params = [
            [name for name in params if places[name] == [i]] for i in range(len(self.pieces))
        ]
        self.outputs: list[list[str]] = []
        left = dict.fromkeys(outputs)
        for piece in self.pieces:
            self.outputs.append([name for name in left if name in piece.program.producer])
            for name in self.outputs[-1]:
                del left[name]
        # A value that nothing is made of but the inputs has no gradient to speak of.
        assert not left, f"no piece makes {', '.join(left)}"
        self.slopes = {name: _Slopes(_shape(program, name)) for name in params}
        self.products = {name: _Products(int(program.types[name].shape[-1])) for name in outputs}
        at = [i for i in range(len(self.pieces)) if self.params[i] or self.outputs[i]]
        at += [i for found in self.shared.values() for i in found]
        self.first = min(at, default=len(self.pieces))

    def room(self, length: int) -> int:
        """Returns how many tokens of a block's states have room."""
        if self.machine.offload is not None:
            return 2**62
        widths = [p.program.types[p.passed].shape[-1] for p in self.pieces if p.passed]
        a_token = 4 * sum(int(width) for width in widths)
        return max(length, KEPT_BYTES // max(1, a_token))

    def block(self, ids: torch.Tensor) -> None:
        """Takes a block of windows there and back."""
        # A squared gradient is of one window; a Fisher matrix takes several at once.
        tokens = ids.shape[1] if self.slopes else min(self.machine.tokens, HEAD_TOKENS)
        machine = Machine(self.machine.world, self.machine.offload, tokens)
        batches = machine.batches(ids)
        with scratch(machine.offload) as folder:
            given = [States(len(batches), folder) for _ in range(len(self.pieces) + 1)]
            for i, (piece, nothing) in enumerate(
                zip(self.pieces, taps(self.pieces, Asked()), strict=True)
            ):
                forward(piece, self.get, ids, given[i], given[i + 1], nothing, machine)
            slopes = States(len(batches), folder)
            kept: dict[int, States] = {}
            for i in range(len(self.pieces) - 1, self.first - 1, -1):
                if any(i in found for found in self.shared.values()):
                    kept[i] = States(len(batches), folder)
                    for k in range(len(batches)):
                        slopes_k = slopes[k]
                        kept[i][k] = None if slopes_k is None else slopes_k.clone()
                self.piece(i, batches, given[i], slopes)
            self.several(batches, given, kept)

    def piece(self, i: int, batches: Sequence[torch.Tensor], given: States, slopes: States) -> None:
        """Takes one piece back: `slopes` holds the gradients of what it gave, then of its input."""
        through = i > self.first
        names, values = self.params[i], self.outputs[i]
        if not (through or names or values):
            return
        running = Running(self.pieces[i], self.get, self.machine.world.device, values=values)
        for k, batch in enumerate(batches):
            found = self.slope(running, batch, given[k], slopes[k], names, through=through)
            own = found[1:] if through else found
            for name, gradient in zip(names, own, strict=False):
                self.slopes[name].add(gradient / (batch.shape[1] - 1))
            for name, gradient in zip(values, own[len(names) :], strict=True):
                self.products[name].add(gradient)
            if through:
                # Only now: a value's gradient may be the very tensor that came in, mapped.
                slopes[k] = found[0]

    def slope(
        self,
        running: Running,
        batch: torch.Tensor,
        given: torch.Tensor | None,
        slope: torch.Tensor | None,
        names: Sequence[str],
        *,
        through: bool,
    ) -> list[torch.Tensor]:
        """Returns the gradients of the summed loss: of what is given, of parameters, of values."""
        module = running.module
        weights = [module.get_parameter(name) for name in names]
        # What lies before the first piece's values are parameters: without a gradient of theirs,
        # the values would have none.
        for parameter in module.parameters() if given is None else weights:
            parameter.requires_grad_(parameter.is_floating_point())
        device = self.machine.world.device
        start = None if given is None else given.to(device, copy=True).requires_grad_()
        with torch.enable_grad():
            passed, *values = running(batch, start)
        running.check(batch, given, (passed,))
        wanted = [*([start] if through and start is not None else []), *weights, *values]
        last = running.piece.passed is None
        whole = slope_of_summed(passed.detach(), batch) if last else slope
        assert whole is not None, "a piece that hands something on had a gradient come back"
        found: Any = torch.autograd.grad(passed, wanted, whole.to(device), allow_unused=True)
        pairs = zip(found, wanted, strict=True)
        return [torch.zeros_like(w) if g is None else g for g, w in pairs]

    def several(
        self,
        batches: Sequence[torch.Tensor],
        given: Sequence[States],
        kept: Mapping[int, States],
    ) -> None:
        """Takes parameters that several pieces use: a window's gradient is the sum over them.

        A square is of that sum, so that the pieces are taken once more, window by window.
        """
        if not self.shared:
            return
        device = self.machine.world.device
        running = {i: Running(self.pieces[i], self.get, device) for i in kept}
        for k, batch in enumerate(batches):
            total: dict[str, torch.Tensor] = {}
            for i, piece in running.items():
                names = [name for name, found in self.shared.items() if i in found]
                slope = kept[i][k]
                found = self.slope(piece, batch, given[i][k], slope, names, through=False)
                for name, gradient in zip(names, found, strict=True):
                    total[name] = total[name] + gradient if name in total else gradient
            for name, gradient in total.items():
                self.slopes[name].add(gradient / (batch.shape[1] - 1))

    def done(self) -> tuple[dict[str, Gradients], dict[str, Fisher]]:
        """Returns all that was gathered, checked.

        Raises:
            SurgeonError: `bad-text-input` where a gradient is not finite.
        """
        world = self.machine.world
        gradients = {name: sums.done(world) for name, sums in self.slopes.items()}
        fisher = {name: sums.done(world) for name, sums in self.products.items()}
        for name, tensor in (
            *((name, g.square) for name, g in gradients.items()),
            *((f"value %{name}", f.second) for name, f in fisher.items()),
        ):
            if not bool(torch.isfinite(tensor).all()):
                raise not_finite(f"{name}, its gradient")
        return gradients, fisher


def _shape(program: Program, name: str) -> tuple[int, ...]:
    return tuple(int(size) for size in program.param[name].type.shape)


def _check(program: Program, params: Sequence[str]) -> None:
    """Refuses what has no gradient."""
    for name in params:
        found = program.param.get(name)
        if found is not None and found.kind == "parameter":
            continue
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{name} has no gradient",
            at=name,
            why="the model has no such parameter" if found is None else f"it is a {found.kind}",
            try_="one of the model's parameters",
        )
