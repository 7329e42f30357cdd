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
from torch.utils.checkpoint import checkpoint

from surgeon.axes.axes import Axes
from surgeon.axes.contractions import Contraction, contractions
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.surgery import operate
from surgeon.calibrate.loss import ROWS
from surgeon.calibrate.running import Change, Get, Machine, Running
from surgeon.calibrate.segments import segments
from surgeon.calibrate.states import States, by_window, scratch
from surgeon.calibrate.statistics import forward
from surgeon.calibrate.taps import Asked, taps
from surgeon.ir import ParamRef, Program
from surgeon.memory import give_back
from surgeon.runtime.apply import removed
from surgeon.runtime.precision import rounded_products

Gains = Mapping[str, Mapping[int, torch.Tensor]]
"""By parameter and dimension: factors of what lies along it."""


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
    readers = program.readers
    return tuple(
        c
        for c in contractions(program)
        if len(readers[c.param]) == 1 and c.out not in program.outputs
    )


def scales(program: Program) -> dict[str, str]:
    """Returns vectors that scale what maps without gains read, such as the head's last norm's.

    Before other maps gains are the maps' own. A head often has none, and no gain before the norm
    can make predictions surer or less sure.

    Returns:
        The vector's name by the value that is made by multiplying with it and nothing else.
    """
    readers, own = program.readers, {c.param for c in trained(program)}
    found: dict[str, str] = {}
    for value in (c.value for c in contractions(program) if c.param not in own):
        index = program.producer.get(value)
        if index is None or program.ops[index].target != "aten.mul.Tensor":
            continue
        args = program.ops[index].args
        params = [a.name for a in args if isinstance(a, ParamRef)]
        names = [name for name in params if len(readers[name]) == 1]
        sizes = [program.param[name].type.shape for name in names]
        if sizes == [program.types[value].shape[-1:]]:
            found[value] = names[0]
    return found


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

    The smaller model runs a window at a time, with gradients at the gains alone.
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
    pieces = _pieces(program, selection, now, parts, change, world.device)
    stands: Mapping[str, torch.Tensor] = {}
    every = [g for found in gains.values() for g in found.values()]
    adam = torch.optim.Adam(every, lr=schedule.rate, betas=(0.9, 0.98))
    order = _turns([world.count(len(part.ids)) for part in parts])
    each = max(1, schedule.windows)
    steps = max(1, round(schedule.epochs * len(order) / each))
    divergences: list[float] = []
    with rounded_products():
        for step in range(steps):
            adam.param_groups[0]["lr"] = schedule.rate * _share(step, steps)
            total = torch.zeros(1)
            for g in every:
                # There is one to add up where a step has no window here.
                g.grad = torch.zeros_like(g)
            # A step has the same windows, however many processes share them.
            for number in range(step * each, (step + 1) * each):
                which, row = order[number % len(order)]
                if row % world.size != world.rank:
                    continue
                part, own = parts[which], row // world.size
                _stand(pieces, stands, part.shift)
                stands = part.shift
                batch = part.ids[own : own + 1].to(world.device)
                with torch.no_grad():
                    (wanted,) = head(batch, part.streams[own][None])
                found = _predictions(pieces, batch)
                divergence, slope = _divergence(found.detach(), wanted)
                found.backward(slope / each)
                total += divergence / each
            world.add(total, *(g.grad for g in every if g.grad is not None))
            adam.step()
            divergences.append(float(total))
            give_back()  # a step's graph: the next one would lie around what is left of it
    return _folded(program, selection, now, gains), tuple(divergences)


def _pieces(
    program: Program,
    selection: Selection,
    now: Get,
    parts: Sequence[Part],
    change: Change,
    device: str,
) -> list[Running]:
    """Returns the smaller model, which is the program's, in pieces with gains."""
    pieces = segments(program)
    shifted = {name for part in parts for name in part.shift}
    several = {n for n, k in Counter(n for p in pieces for n in p.params).items() if k > 1}
    held: dict[str, torch.Tensor] = {}

    def small(name: str) -> torch.Tensor:
        if name in held:
            return held[name]
        found = removed(selection, name, now(name))
        if name in shifted:
            # What is not cut may be the caller's own tensor, and what is shifted is written to.
            found = found.clone()
        if name in several:
            held[name] = found
        return found

    return [Running(piece, small, device, change=change) for piece in pieces]


def _stand(
    pieces: Sequence[Running],
    before: Mapping[str, torch.Tensor],
    shift: Mapping[str, torch.Tensor],
) -> None:
    """Puts one part's weights where another's stood, in place: they take the memory they took.

    What rounding leaves behind at every change is some 1e-7 of a weight.
    """
    weights = {n: w.data for piece in pieces for n, w in piece.module.named_parameters()}
    for name, old in before.items():
        weights[name] -= old.to(weights[name].device)
    for name, new in shift.items():
        weights[name] += new.to(weights[name].device)


def _predictions(pieces: Sequence[Running], batch: torch.Tensor) -> torch.Tensor:
    """Returns logits [windows, length, vocab] with a graph of the states between pieces alone.

    Within a piece everything is computed again on the way back (Chen et al., Training Deep Nets
    with Sublinear Memory Cost, 2016), which in memory that is warm takes little more time than to
    keep it.
    """
    state: torch.Tensor | None = None
    for piece in pieces[:-1]:
        found: Any = checkpoint(piece, batch, state, use_reentrant=False, preserve_rng_state=False)
        state = found[0]
    return pieces[-1](batch, state)[0]


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


def _gains(program: Program, selection: Selection, device: str) -> tuple[Gains, Change]:
    """Returns gains of one, and the operations that they take part in."""
    gains: dict[str, dict[int, torch.Tensor]] = {}
    calls: dict[str, Callable[..., Any]] = {}

    def ones(param: str, dim: int) -> torch.Tensor:
        count = int(program.param[param].type.shape[dim])
        gain = torch.ones(count, device=device, requires_grad=True)
        gains.setdefault(param, {})[dim] = gain
        return gain

    for c in trained(program):
        if not selection.separable(c.param):
            continue  # its rows lose other columns than their neighbours: there is no one factor
        target = program.ops[program.producer[c.out]].target
        calls[c.out] = _with_gains(target, ones(c.param, c.dim), ones(c.param, 1 - c.dim))
    for value, name in scales(program).items():
        calls[value] = _scaled(ones(name, 0))

    def change(where: Mapping[str, int]) -> dict[int, Callable[..., Any]]:
        return {where[value]: call for value, call in calls.items() if value in where}

    return gains, change


def _scaled(gain: torch.Tensor) -> Callable[..., Any]:
    """Returns a product of a vector and something else, with a gain."""
    return lambda x, y: x * y * gain


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
    out: dict[str, torch.Tensor] = {}
    for name, found in gains.items():
        whole = now(name)
        full = whole.clone()
        kept = selection.kept(name)
        for dim, gain in found.items():
            factor = torch.ones(whole.shape[dim])
            indices = kept[dim]
            at = slice(None) if indices is None else torch.from_numpy(indices)
            factor[at] = gain.detach().float().cpu()
            full *= factor.reshape([-1 if d == dim else 1 for d in range(full.dim())])
        out[name] = full
    return out
