"""One walk through a program, forward: what values are like, and what each piece was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from surgeon.axes.contractions import contractions
from surgeon.calibrate.moments import Moments
from surgeon.calibrate.running import TOKENS, Get, Machine, Running
from surgeon.calibrate.segments import Segment, segments
from surgeon.calibrate.states import States, scratch
from surgeon.calibrate.taps import Asked, Seen, Taps, taps
from surgeon.ir import Program


@dataclass(frozen=True)
class Observed:
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
) -> Iterator[Observed]:
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
        SurgeonError: `bad-text-input` where activations are not finite, with the first such place.
    """
    wanted = [c for c in contractions(program) if params is None or c.param in params]
    values = frozenset(c.value for c in wanted)
    asked = Asked(second=values) if full else Asked(norms=values)
    moments: dict[str, Moments] = {}
    for piece, seen in walk(program, get, ids, asked, Machine(tokens=tokens)):
        moments |= seen.moments
        own = [c for c in contractions(piece.program) if c in wanted]
        yield Observed(piece, {c.param: moments[c.value] for c in own})


def walk(
    program: Program, get: Get, ids: torch.Tensor, asked: Asked, machine: Machine
) -> Iterator[tuple[Segment, Seen]]:
    """Yields each piece with what was read off it; see `observe`."""
    pieces = segments(program)
    with scratch(machine.offload) as folder:
        states = States(len(machine.batches(ids)), folder)
        for piece, tap in zip(pieces, taps(pieces, asked), strict=True):
            forward(piece, get, ids, states, states, tap, machine)
            yield piece, tap.done(machine.world)


def forward(
    piece: Segment,
    get: Get,
    ids: torch.Tensor,
    given: States,
    passed: States,
    tap: Taps,
    machine: Machine,
) -> None:
    """Runs a piece over all batches: `passed` holds then what it hands on, `tap` what it read.

    What the last piece returns (logits) is not computed unless something is read off it.

    Raises:
        SurgeonError: `bad-text-input` where a value is not finite.
    """
    passing = piece.passed is not None
    if not passing and not tap.values:
        return
    running = Running(piece, get, machine.world.device, values=tap.values, passing=passing)
    for i, batch in enumerate(machine.batches(ids)):
        with torch.no_grad():
            found = running(batch, given[i])
        running.check(batch, given[i], found)
        tap.add(i, found[1:] if passing else found)
        if passing:
            passed[i] = found[0]
    tap.rest()
