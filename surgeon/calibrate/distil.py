"""Gains in front of and behind every map, learnt from the dense model's predictions.

A gain multiplies one channel of what a map reads or makes; afterwards it is a factor of a row or a
column of the map's weight, so that the model gains no parameter and no operation. Weights
themselves are not trained: there are a few thousand gains a layer, which a few ten thousand tokens
determine.

Reference: Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (the loss); Liu et al.,
Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022 (IA³:
learnt gains on activations); Kingma and Ba, Adam, 2015.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from surgeon.axes.axes import Axes
from surgeon.axes.contractions import Contraction, contractions
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.surgery import operate
from surgeon.calibrate.loss import ROWS
from surgeon.calibrate.running import Get, Machine, Running
from surgeon.calibrate.segments import segments
from surgeon.calibrate.states import States, by_window, scratch
from surgeon.calibrate.statistics import forward
from surgeon.calibrate.taps import Asked, taps
from surgeon.ir import ParamRef, Program
from surgeon.ir.program import op_refs
from surgeon.memory import give_back
from surgeon.runtime.apply import removed
from surgeon.runtime.lower import lower

Gains = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""By parameter: the gains of its inputs and of its outputs."""


@dataclass(frozen=True)
class Schedule:
    """How gains are learnt.

    Attributes:
        rate: Adam's step size at its highest; it rises over the first steps and falls by a cosine.
        epochs: times that every window is seen.
        windows: in a step, of all processes together.
    """

    rate: float
    epochs: float
    windows: int


def trained(program: Program) -> tuple[Contraction, ...]:
    """Returns the products whose parameter has no other use: those that get gains.

    A tied table is read by the embedding too, where a gain of the head has no business.
    """
    refs = (ref for op in program.ops for ref in op_refs(op))
    uses = Counter(ref.name for ref in refs if isinstance(ref, ParamRef))
    return tuple(
        c for c in contractions(program) if uses[c.param] == 1 and c.out not in program.outputs
    )


@dataclass(frozen=True)
class Part:
    """Some of the windows, and the model that learns on them.

    Attributes:
        ids: this process's token ids [samples, length], as `World.share` gives them; maybe none.
        streams: what the dense model's last piece (the head) is given: [length, width] by window.
        shift: what is added to some of its weights while it learns on these windows, in its own
            size; the same parameters in every part.
    """

    ids: torch.Tensor
    streams: Sequence[torch.Tensor]
    shift: Mapping[str, torch.Tensor]


def distilled(
    axes: Axes,
    plan: Plan,
    dense: Get,
    now: Get,
    parts: Sequence[Part],
    schedule: Schedule,
    machine: Machine,
) -> tuple[dict[str, torch.Tensor], tuple[float, ...]]:
    """Returns parameters in full size, with gains in their rows and columns; and how it went.

    The smaller model runs as one program, a window at a time, with gradients at the gains alone.
    Parts take turns: the gains are those of one model, whatever stands in it on a part's windows.

    Args:
        axes: of the dense model.
        plan: what is removed.
        dense: the dense model's weights.
        now: the weights, in full size, that the gains are put into, and that learn with what a
            part adds to them.
        parts: the windows.
        schedule: steps, their size and number.
        machine: the processes and the device.

    Returns:
        The tensors, and the divergence from the dense model at every step, in nats.
    """
    program, selection = operate(axes, plan), Selection(axes, plan)
    world = machine.world
    head = Running(segments(axes.program)[-1], dense, world.device)
    gains, change = _gains(program, selection, world.device)

    def small(name: str) -> torch.Tensor:
        return removed(selection, name, now(name))

    module = lower(program, small, change=change).to(world.device)
    every = [g for pair in gains.values() for g in pair]
    adam = torch.optim.Adam(every, lr=schedule.rate, betas=(0.9, 0.98))
    order = _turns([world.count(len(part.ids)) for part in parts])
    each = max(1, schedule.windows)
    steps = max(1, round(schedule.epochs * len(order) / each))
    divergences: list[float] = []
    for step in range(steps):
        adam.param_groups[0]["lr"] = schedule.rate * _share(step, steps)
        total = torch.zeros(1)
        for g in every:
            g.grad = torch.zeros_like(g)  # there is one to add up where a step has no window here
        # A step has the same windows, however many processes share them.
        for number in range(step * each, (step + 1) * each):
            which, row = order[number % len(order)]
            if row % world.size != world.rank:
                continue
            part, own = parts[which], row // world.size
            for name, shift in part.shift.items():
                module.get_parameter(name).data = (small(name) + shift).to(world.device)
            batch = part.ids[own : own + 1].to(world.device)
            with torch.no_grad():
                (wanted,) = head(batch, part.streams[own][None])
            positions = torch.arange(batch.shape[1], device=batch.device).expand(len(batch), -1)
            found = module(batch, torch.ones_like(batch), positions)
            divergence, slope = _divergence(found.detach(), wanted)
            found.backward(slope / each)
            total += divergence / each
        world.add(total, *(g.grad for g in every if g.grad is not None))
        adam.step()
        divergences.append(float(total))
        give_back()  # a step's graph: the next one would lie around what is left of it
    return _folded(program, selection, now, gains), tuple(divergences)


def _turns(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Returns every window, by its part and its place there, so that parts take turns."""
    every = [(part, row) for part, count in enumerate(counts) for row in range(count)]
    return sorted(every, key=lambda found: ((found[1] + 0.5) / counts[found[0]], found[0]))


def streams_of(
    program: Program, get: Get, ids: torch.Tensor, machine: Machine
) -> list[torch.Tensor]:
    """Returns what a program's last piece is given, [length, width] by window."""
    pieces = segments(program)
    assert pieces[-1].given is not None, "a language model's head reads what its layers made"
    with scratch(machine.offload) as folder:
        states = States(len(machine.batches(ids)), folder)
        for piece, tap in zip(pieces, taps(pieces, Asked()), strict=True):
            forward(piece, get, ids, states, states, tap, machine)
        return by_window(states)


def _share(step: int, steps: int) -> float:
    """Returns the share of the highest step size: a short rise, then half a cosine."""
    rise = min(1.0, (step + 1) / max(1.0, 0.1 * steps))
    return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _divergence(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Returns how far predictions are from those wanted, and the slope at their logits.

    Autograd would keep several tensors as large as the logits, which are the largest there are.

    Args:
        found: logits [windows, length, vocab].
        wanted: the dense model's, of the same shape; the gradient takes their place.

    Returns:
        The mean over tokens of the Kullback-Leibler divergence, in nats, and its gradient.
    """
    rows, target = found.flatten(0, 1), wanted.flatten(0, 1)
    total = 0.0
    for first in range(0, len(rows), ROWS):
        some = slice(first, first + ROWS)
        own = rows[some].float().log_softmax(-1)
        other = target[some].float().log_softmax(-1)
        share = other.exp()
        total += float((share * (other - own)).sum(dtype=torch.float64))
        target[some] = own.exp_().sub_(share).div_(len(rows))
    return total / len(rows), target.view_as(found)


def _gains(
    program: Program, selection: Selection, device: str
) -> tuple[Gains, dict[int, Callable[..., Any]]]:
    """Returns gains of one, and the products that they take part in, by operation."""
    gains: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    change: dict[int, Callable[..., Any]] = {}
    for c in trained(program):
        if not selection.separable(c.param):
            continue  # its rows lose other columns than their neighbours: there is no one factor
        shape = [int(s) for s in program.param[c.param].type.shape]
        reads, makes = shape[c.dim], shape[1 - c.dim]
        pair = tuple(torch.ones(n, device=device, requires_grad=True) for n in (reads, makes))
        gains[c.param] = (pair[0], pair[1])
        index = program.producer[c.out]
        change[index] = _with_gains(program.ops[index].target, pair[0], pair[1])
    return gains, change


def _with_gains(target: str, reads: torch.Tensor, makes: torch.Tensor) -> Callable[..., Any]:
    """Returns a product with gains on both sides; what is added to it gets none."""
    if target == "aten.linear.default":

        def linear(x: Any, weight: Any, bias: Any = None) -> Any:
            made = functional.linear(x * reads, weight) * makes
            return made if bias is None else made + bias

        return linear
    if target == "aten.addmm.default":
        return lambda bias, x, weight: ((x * reads) @ weight) * makes + bias
    return lambda x, weight: ((x * reads) @ weight) * makes


def _folded(
    program: Program, selection: Selection, now: Get, gains: Gains
) -> dict[str, torch.Tensor]:
    """Returns the parameters with their gains as factors, in full size."""
    dims = {c.param: c.dim for c in contractions(program)}
    out: dict[str, torch.Tensor] = {}
    for name, pair in gains.items():
        whole = now(name)
        full = whole.clone()
        kept = selection.kept(name)
        for dim, gain in zip((dims[name], 1 - dims[name]), pair, strict=True):
            factor = torch.ones(whole.shape[dim])
            indices = kept[dim]
            at = slice(None) if indices is None else torch.from_numpy(indices)
            factor[at] = gain.detach().float().cpu()
            full *= factor[:, None] if dim == 0 else factor[None]
        out[name] = full
    return out
