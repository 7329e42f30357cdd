"""How far predictions move when a little of a model changes: many changes on one walk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from surgeon.calibrate.loss import HEAD_TOKENS, ROWS
from surgeon.calibrate.running import Change, Get, Machine, Running
from surgeon.calibrate.segments import Segment, segments
from surgeon.calibrate.states import States, scratch
from surgeon.ir import Program


@dataclass(frozen=True)
class Trial:
    """A change of a model that is looked at by itself.

    Attributes:
        get: the changed model's weights in fp32.
        params: names of those that differ; a piece that reads none of them is the dense model's.
        change: what takes some operations' places.
    """

    get: Get
    params: frozenset[str]
    change: Change | None = None

    def touches(self, piece: Segment) -> bool:
        """Tells whether a piece differs."""
        if not self.params.isdisjoint(piece.params):
            return True
        return self.change is not None and bool(self.change(piece.program.producer))


@dataclass(frozen=True)
class Divergence:
    """How far predictions are from the dense model's, over tokens, in nats.

    Attributes:
        mean: of the Kullback-Leibler divergence from the dense model's distribution.
        deviation: its standard deviation from token to token.
    """

    mean: float
    deviation: float


@dataclass
class _Sums:
    """Of a trial: where it is, and the sums over tokens so far."""

    states: States
    begun: bool = False
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, dense: torch.Tensor, logits: torch.Tensor) -> None:
        """Takes the predictions for a batch; `dense` are logarithms of probabilities."""
        runs = zip(dense.flatten(0, -2).split(ROWS), logits.flatten(0, -2).split(ROWS), strict=True)
        for wanted, found in runs:
            apart = wanted - found.float().log_softmax(-1)
            each = (wanted.exp() * apart).sum(-1).double().clamp(min=0)
            self.total += torch.stack([each.sum(), each.square().sum()]).cpu()


def divergences(
    program: Program, get: Get, trials: Sequence[Trial], ids: torch.Tensor, machine: Machine
) -> tuple[Divergence, ...]:
    """Returns how far each of several changes moves the predictions.

    All of them go through the program side by side, one piece in memory at a time; before the
    first piece that a change touches it costs nothing.

    Args:
        program: a language model's.
        get: the dense model's weights.
        trials: the changes, each by itself.
        ids: this process's token ids [samples, length].
        machine: how pieces are run.

    Raises:
        SurgeonError: `bad-text-input` where a value is not finite.
    """
    # The head's batches are those of every piece, so that a state belongs to one batch.
    batches = machine.batches(ids, min(machine.tokens, HEAD_TOKENS))
    device = machine.world.device
    with scratch(machine.offload) as folder:
        states = States(len(batches), folder)
        sums = [_Sums(States(len(batches), folder)) for _ in trials]
        for piece in segments(program):
            last = piece.passed is None
            common = Running(piece, get, device)
            # Each of them is at its beginning until it is touched, where the dense model is.
            dense = [_run(common, batch, states[i]) for i, batch in enumerate(batches)]
            if last:
                dense = [x.float().log_softmax(-1) for x in dense]
            for trial, own in zip(trials, sums, strict=True):
                touched = trial.touches(piece)
                if not touched and not own.begun:
                    continue
                running = common
                if touched:
                    running = Running(piece, trial.get, device, change=trial.change)
                for i, batch in enumerate(batches):
                    found = _run(running, batch, own.states[i] if own.begun else states[i])
                    if last:
                        own.add(dense[i], found)
                    else:
                        own.states[i] = found
                own.begun = True
            if not last:
                for i, x in enumerate(dense):
                    states[i] = x
    totals = [own.total for own in sums]
    machine.world.add(*totals)
    count = machine.world.count(ids.numel())
    return tuple(_divergence(total, count) for total in totals)


def _run(running: Running, batch: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        found = running(batch, state)
    running.check(batch, state, found)
    return found[0]


def _divergence(total: torch.Tensor, count: int) -> Divergence:
    mean, square = (float(x) / max(1, count) for x in total)
    return Divergence(mean, math.sqrt(max(0.0, square - mean**2)))
