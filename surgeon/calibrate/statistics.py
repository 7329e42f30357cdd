"""What linear maps see: moments of their inputs over calibration windows, piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from surgeon.axes.consumers import contractions
from surgeon.calibrate.segments import Segment, segments
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program
from surgeon.runtime.lower import lower

Get = Callable[[str], torch.Tensor]
"""From a parameter's name to its tensor in fp32."""

TOKENS = 4096
"""Tokens that go through a piece at a time: what activations take is bounded by this."""


@dataclass(frozen=True)
class Moments:
    """The distribution of a value's last dimension, of width d, over tokens.

    Attributes:
        count: tokens.
        mean: [d], fp32.
        second: [d, d], the mean of x·xᵀ (not centred), fp32; None where only norms were asked for.
        square: [d], its diagonal.
    """

    count: int
    mean: torch.Tensor
    square: torch.Tensor
    second: torch.Tensor | None = None


class _Sums:
    """Moments in the making. Sums are fp64: thousands of tokens would eat fp32's digits."""

    def __init__(self, width: int, full: bool) -> None:
        self.count = 0
        self.first = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.second = torch.zeros(width, width, dtype=torch.float64) if full else None

    def add(self, x: torch.Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        self.count += len(rows)
        self.first += rows.sum(0, dtype=torch.float64)
        self.squares += rows.square().sum(0, dtype=torch.float64)
        if self.second is not None:
            self.second += rows.T @ rows

    def done(self) -> Moments:
        second = None if self.second is None else (self.second / self.count).float()
        mean, square = self.first / self.count, self.squares / self.count
        return Moments(self.count, mean.float(), square.float(), second)


@dataclass(frozen=True)
class Seen:
    """What one piece of the program saw.

    Attributes:
        segment: the piece.
        moments: by parameter, of the input that it is multiplied with. Parameters that read the
            same value have the same object.
    """

    segment: Segment
    moments: Mapping[str, Moments]


def observe(
    program: Program,
    get: Get,
    ids: torch.Tensor,
    *,
    params: Sequence[str] | None = None,
    full: bool = True,
    tokens: int = TOKENS,
) -> Iterator[Seen]:
    """Yields, piece after piece, the moments of what linear maps see on calibration windows.

    A piece's weights are read when it is its turn and let go after it. What is kept of the windows
    is one value a token: the residual stream.

    Args:
        program: a language model's, with the inputs `input_ids`, `attention_mask`, `position_ids`.
        get: its weights.
        ids: token ids [samples, length]; every one counts, there is no padding.
        params: the parameters whose inputs are asked for; every one without it.
        full: gather the whole second moment, not its diagonal alone.
        tokens: how many go through a piece at a time, rounded to whole windows.

    Raises:
        SurgeonError: `bad-calibration` where activations are not finite, with the first such place.
    """
    positions = torch.arange(ids.shape[1])[None]
    batches = ids.split(max(1, tokens // ids.shape[1]))
    states: list[torch.Tensor | None] = [None] * len(batches)
    wanted = None if params is None else set(params)
    for piece in segments(program):
        tapped = {
            c.param: c.value
            for c in contractions(piece.program)
            if wanted is None or c.param in wanted
        }
        values = tuple(dict.fromkeys(tapped.values()))
        module = lower(returning(piece.program, values), get)
        sums: dict[str, _Sums] = {}
        for i, batch in enumerate(batches):
            state = states[i]
            inputs = (batch, torch.ones_like(batch), positions.expand(len(batch), -1))
            with torch.no_grad():
                found = module(*inputs, *(() if state is None else (state,)))
            results = found if isinstance(found, tuple) else (found,)
            for name, x in zip(values, results[1:], strict=True):
                if name not in sums:
                    sums[name] = _Sums(x.shape[-1], full)
                sums[name].add(x)
            states[i] = results[0]
            _check(piece, results[0])
        done = {name: s.done() for name, s in sums.items()}
        yield Seen(piece, {param: done[value] for param, value in tapped.items()})


def returning(program: Program, values: Sequence[str]) -> Program:
    """Returns the program with some of its values as further outputs."""
    return replace(program, outputs=(*program.outputs, *values))


def _check(piece: Segment, x: torch.Tensor) -> None:
    if bool(torch.isfinite(x).all()):
        return
    last = piece.program.ops[-1]
    raise SurgeonError(
        Code.BAD_TEXT_INPUT,
        "the model gives values that are no numbers on the calibration data",
        at=last.where,
        why="an activation is infinite or NaN, and every statistic would be",
        try_="check the checkpoint's weights, or load it in a wider element type",
    )
