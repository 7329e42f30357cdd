"""Pieces of a program on a device, and what may not come out of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from surgeon.calibrate.parallel import World
from surgeon.calibrate.segments import Segment
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program
from surgeon.runtime.lower import lower

Get = Callable[[str], torch.Tensor]
"""From a parameter's name to its tensor in fp32."""

Change = Callable[[Mapping[str, int]], Mapping[int, Callable[..., Any]]]
"""From the index of the operation that makes each value to what takes some operations' places."""

TOKENS = 4096
"""Tokens that go through a piece at a time: what activations take is bounded by this."""

INPUTS = 3
"""A language model's program takes token ids, which of them count, and positions."""


@dataclass(frozen=True)
class Machine:
    """How pieces are run.

    Attributes:
        world: the processes that share the windows, and the device of this one.
        offload: a folder where states between pieces are kept; they stay in memory without it.
        tokens: how many go through a piece at a time, rounded to whole windows.
    """

    world: World = field(default_factory=World)
    offload: Path | None = None
    tokens: int = TOKENS

    def batches(self, ids: torch.Tensor, tokens: int | None = None) -> tuple[torch.Tensor, ...]:
        """Returns windows [samples, length] in runs of so many tokens; none for no windows."""
        size = max(1, (tokens or self.tokens) // ids.shape[1])
        return ids.split(size) if len(ids) else ()


class Running:
    """A piece with its weights on a device.

    Args:
        piece: what runs.
        get: its weights.
        device: where.
        values: further values that are asked for.
        passing: return what the piece hands on, or the logits, before those values. Without it,
            what only serves that is left out, such as the head.
        change: what takes some operations' places.
    """

    def __init__(
        self,
        piece: Segment,
        get: Get,
        device: str = "cpu",
        *,
        values: Sequence[str] = (),
        passing: bool = True,
        change: Change | None = None,
    ) -> None:
        self.piece, self.get, self.device, self.change = piece, get, device, change
        outputs = (*(piece.program.outputs[:1] if passing else ()), *values)
        program = replace(piece.program, outputs=outputs)
        self.program = program if passing else program.without_dead_code()
        changed = change(self.program.producer) if change else None
        module = lower(self.program, get, change=changed)
        self.module = module if device == "cpu" else placed(module, device)

    def __call__(self, batch: torch.Tensor, state: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """Returns what was asked for, of token ids [windows, length] and what the piece is given.

        Raises:
            SurgeonError: `bad-option` where the model takes something else than tokens.
        """
        if len(self.program.inputs) != INPUTS + (self.piece.given is not None):
            raise _no_language_model(self.program)
        ids = batch.to(self.device)
        positions = torch.arange(ids.shape[1], device=self.device).expand(len(ids), -1)
        given = () if state is None else (state.to(self.device),)
        found = self.module(ids, torch.ones_like(ids), positions, *given)
        return found if isinstance(found, tuple) else (found,)

    def check(
        self, batch: torch.Tensor, state: torch.Tensor | None, found: Sequence[torch.Tensor]
    ) -> None:
        """Refuses results that are no numbers, with the first operation that made such a thing.

        Raises:
            SurgeonError: `bad-text-input`.
        """
        if all(_finite(x) for x in found):
            return
        # Every value of the piece would take much room, and one window has the fault.
        each = ((i, self._one(batch, state, i)) for i in range(len(batch)))
        wrong = next((i for i, one in each if not all(_finite(x) for x in one)), 0)
        raise not_finite(self._fault(batch[wrong : wrong + 1], _row(state, wrong)))

    def _one(
        self, batch: torch.Tensor, state: torch.Tensor | None, i: int
    ) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return self(batch[i : i + 1], _row(state, i))

    def _fault(self, batch: torch.Tensor, state: torch.Tensor | None) -> str:
        """Returns the place of the first operation that makes something infinite or no number."""
        ops = [op for op in self.program.ops if op.types[0].dtype.startswith(("f", "bf"))]
        piece = replace(self.piece, program=self.program)
        values = [op.outputs[0] for op in ops]
        every = Running(piece, self.get, self.device, values=values, change=self.change)
        with torch.no_grad():
            found = every(batch, state)[1:]
        # Masks are the lowest number, or minus infinity on purpose.
        for bad in (lambda x: x.isnan() | x.isposinf(), lambda x: ~x.isfinite()):
            for op, x in zip(ops, found, strict=True):
                if bool(bad(x).any()):
                    return op.where
        return self.program.ops[-1].where


def _row(state: torch.Tensor | None, i: int) -> torch.Tensor | None:
    return None if state is None else state[i : i + 1]


def _finite(x: torch.Tensor) -> bool:
    # A sum is finite only if all of it is, and tells so in a tenth of the time; it may overflow.
    return bool(x.sum().isfinite()) or bool(torch.isfinite(x).all())


def not_finite(at: str) -> SurgeonError:
    """Returns the refusal of a model whose activations are infinite or no numbers."""
    return SurgeonError(
        Code.BAD_TEXT_INPUT,
        "the model gives values that are no numbers on the calibration data",
        at=at,
        why="an activation is infinite or NaN, and every statistic would be",
        try_="check the checkpoint's weights, or load it in a wider element type",
    )


def _no_language_model(program: Program) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        "the model can't be calibrated on tokens",
        at="--calibration",
        why=f"it takes {', '.join(i.name for i in program.inputs) or 'nothing'}, not token ids",
        try_="passes that look at weights alone",
    )


def placed(module: fx.GraphModule, device: str) -> fx.GraphModule:
    """Returns a module on a device, with the tensors that its operations make from nothing."""
    for node in module.graph.nodes:
        schema: Any = getattr(node.target, "_schema", None)
        if schema is None:
            continue
        makes = any(a.name == "device" for a in schema.arguments)
        reads = any("Tensor" in str(a.type) for a in schema.arguments)
        if makes and not reads:
            node.kwargs = {**node.kwargs, "device": torch.device(device)}
    module.recompile()
    return module.to(device)
