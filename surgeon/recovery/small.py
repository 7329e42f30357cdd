"""The smaller model as something to train, and what it has learnt as tensors of a plan.

Training changes weights and nothing else. So what comes out is what any compensation gives:
full-size tensors that replace others before the plan is applied, found by undoing what writing the
model does to each (it takes the kept elements, and may scale them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgeon.axes.axes import Axes
from surgeon.axes.consumers import contractions
from surgeon.axes.plan import Plan, Selection
from surgeon.emit.hf_writing import final
from surgeon.emit.huggingface import Emission
from surgeon.emit.in_memory import in_memory
from surgeon.emit.layers import layer_shapes
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program, Ref
from surgeon.ir.program import op_refs
from surgeon.recovery.graph import trainable
from surgeon.runtime.apply import Get, removed


@dataclass(frozen=True)
class Stream:
    """Where a layer's residual stream is found after it.

    Attributes:
        layer: the layer in the original model, by module path.
        module: the module of this model that makes it.
        kept: the channels of the original that it has, ascending; None where it has all.
    """

    layer: str
    module: str
    kept: torch.Tensor | None


@dataclass(frozen=True)
class Small:
    """A model that a plan leaves, in fp32, to be trained in place.

    Attributes:
        model: of Transformers where its class can express the plan, else one that runs the program.
        names: the model's name of each parameter of the program that is trained.
        streams: the layers that are left.
        maps: names, in the program, of the weights of its linear maps, the head's excepted.
    """

    model: nn.Module
    names: Mapping[str, str]
    streams: tuple[Stream, ...]
    maps: tuple[str, ...]
    _axes: Axes
    _selection: Selection
    _full: Get
    _written: Callable[[str], torch.Tensor]
    _read: Callable[[str, torch.Tensor], torch.Tensor]

    def learnt(self, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Returns the full-size tensors of what training changed, by the program's names.

        Elements that the plan removes are what they were.

        Args:
            state: the trained model's tensors by its own names; without it, the model's.
        """
        every = dict(self.model.state_dict()) if state is None else state
        return dict(self._changed(every))

    def _changed(self, state: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, own in self.names.items():
            if own not in state or state[own].shape != self._selection.shape(name):
                raise SurgeonError(
                    Code.RUNTIME_FAILED,
                    f"the trained model has no {own} any more",
                    at=own,
                    why="training may change what is in the model's tensors, not which there are",
                    try_="merge adapters back into the model, in place, before it is read",
                )
            now = state[own].detach().to("cpu", torch.float32)
            if torch.equal(now, self._written(name)):
                continue
            full = self._full(name).detach().clone()
            kept = torch.from_numpy(self._selection.flat(name))
            full.reshape(-1)[kept] = self._read(name, now).reshape(-1)
            yield name, full


def of_transformers(axes: Axes, plan: Plan, emission: Emission, full: Get) -> Small:
    """Returns the smaller model as Transformers loads it once it is written.

    Args:
        axes: of the original model.
        plan: what is removed.
        emission: how the result is written.
        full: reads a tensor in full size, with rewrites, fp32.
    """
    selection = Selection(axes, plan)
    model = in_memory(emission, selection, full, lambda _: torch.float32)
    kept = [shape.path for shape in layer_shapes(axes, plan) if shape.attention or shape.mlp]
    paths = {path: f"{path.rpartition('.')[0]}.{number}" for number, path in enumerate(kept)}
    have = dict(model.named_modules())
    streams = tuple(
        Stream(found.layer, paths[found.layer], found.kept)
        for found in _streams(axes, selection)
        if paths.get(found.layer) in have
    )

    def written(name: str) -> torch.Tensor:
        return final(emission, selection, full, name, torch.float32)

    def read(name: str, tensor: torch.Tensor) -> torch.Tensor:
        exact = tensor.double()
        for scale in reversed(emission.scales.get(name, ())):
            exact = scale.undo(exact)
        return exact.float()

    names = {old: new for old, new in emission.names.items() if _trained(axes.program, old)}
    return Small(model, names, streams, _maps(axes, names), axes, selection, full, written, read)


def of_program(axes: Axes, plan: Plan, program: Program, full: Get) -> Small:
    """Returns the smaller model as its program, for what no class of Transformers expresses.

    Args:
        axes: of the original model.
        plan: what is removed.
        program: what is left of it.
        full: reads a tensor in full size, with rewrites, fp32.
    """
    selection = Selection(axes, plan)

    def written(name: str) -> torch.Tensor:
        return removed(selection, name, full(name))

    left = [s for s in _streams(axes, selection) if s.module in program.producer]
    model = trainable(program, lambda name: written(name).clone(), [s.module for s in left])
    streams = tuple(Stream(s.layer, model.stream(s.module), s.kept) for s in left)
    names = {p.name: model.name(p.name) for p in program.params if _trained(program, p.name)}
    return Small(
        model,
        names,
        streams,
        _maps(axes, names),
        axes,
        selection,
        full,
        written,
        lambda _, tensor: tensor,
    )


def _trained(program: Program, name: str) -> bool:
    return program.param[name].kind == "parameter"


def _maps(axes: Axes, names: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the weights that something is multiplied with, but those that make the output."""
    program = axes.program
    made = {c.out: c.param for c in contractions(program)}
    head: set[str] = set()
    seen, left = set[str](), list(program.outputs)
    while left:
        value = left.pop()
        if value in seen or value not in program.producer:
            continue
        seen.add(value)
        if value in made:
            head.add(made[value])
            continue
        refs = op_refs(program.ops[program.producer[value]])
        left += [ref.name for ref in refs if isinstance(ref, Ref)]
    return tuple(n for n in dict.fromkeys(made.values()) if n in names and n not in head)


def _streams(axes: Axes, selection: Selection) -> tuple[Stream, ...]:
    """Returns by layer the value that its last residual addition makes, as `module`."""
    last: dict[str, int] = {}
    for branch in axes.branches:
        last[branch.layer] = max(branch.add, last.get(branch.layer, -1))
    out: list[Stream] = []
    for layer, add in last.items():
        value = axes.program.ops[add].outputs[0]
        width = axes.dims["%" + value][-1]
        kept: Any = None
        if selection.touches(width):
            kept = torch.from_numpy(selection.indices(width).copy())
        out.append(Stream(layer, value, kept))
    return tuple(out)
