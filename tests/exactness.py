"""Masked against removed: the master test of the whole compiler, as a helper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch

from surgeon.axes import Axes, Axis, analyse
from surgeon.axes.plan import Cut, Plan, Selection, check, cut
from surgeon.axes.surgery import operate, without_branches
from surgeon.capture.model import Captured, capture_model
from surgeon.ir import Program, verify
from surgeon.runtime.apply import kept_only, masked, removed
from surgeon.runtime.lower import lower


@dataclass(frozen=True)
class Subject:
    """A program with weights and inputs. `valid` picks the places of an output that count."""

    axes: Axes
    weights: Mapping[str, torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    valid: torch.Tensor | None = None

    def outputs(self, found: Any) -> tuple[torch.Tensor, ...]:
        several = found if isinstance(found, tuple | list) else (found,)
        return tuple(t if self.valid is None else t[self.valid] for t in several)

    def run(self, program: Program, get: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return self.outputs(lower(program, get, **options)(*self.inputs))

    @cached_property
    def original(self) -> tuple[torch.Tensor, ...]:
        return self.run(self.axes.program, self.weights.__getitem__)

    def masked(self, plan: Plan, *, kept_norms: bool = True) -> tuple[torch.Tensor, ...]:
        """The outputs of the full-size program whose removed channels are zero."""
        selection = Selection(self.axes, plan)
        program = without_branches(self.axes, plan.branches) if plan.branches else self.axes.program
        norms = kept_only(self.axes, selection, program.producer) if kept_norms else {}
        return self.run(
            program, lambda name: masked(selection, name, self.weights[name]), change=norms
        )

    def small(self, plan: Plan) -> tuple[Program, dict[str, torch.Tensor]]:
        """The program and the weights after removal, checked."""
        check(self.axes, plan)
        selection = Selection(self.axes, plan)
        program = verify(operate(self.axes, plan))
        weights = {p.name: removed(selection, p.name, self.weights[p.name]) for p in program.params}
        for p in program.params:
            assert tuple(weights[p.name].shape) == p.type.shape, p.name
        return program, weights

    def removed(self, plan: Plan) -> tuple[torch.Tensor, ...]:
        """The outputs after removal."""
        program, weights = self.small(plan)
        return self.run(program, weights)

    def difference(self, plan: Plan) -> float:
        """The largest difference between masked and removed, over the largest masked output."""
        return difference(self.removed(plan), self.masked(plan))


def difference(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """Returns the largest |left − right| over the largest |right|; NaN counts as infinite."""
    top = max(float(b.abs().max()) for b in right)
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape
        here = float((a - b).abs().max())
        worst = max(worst, here if np.isfinite(here) else float("inf"))
    return worst / top if top > 0 else worst


def some(size: int, rng: np.random.Generator, keep: int) -> list[int]:
    """Returns `keep` of `size` indices, ascending."""
    return sorted(int(i) for i in rng.permutation(size)[:keep])


def random_cut(
    axes: Axes, axis: Axis, rng: np.random.Generator, *, keep: int | None = None, free: bool = True
) -> Cut:
    """Returns a random cut of an axis, with its own indices for each enclosing one if `free`."""
    keep = max(1, int(axis.size * 0.6)) if keep is None else keep
    if not (free and axis.outer):
        return cut(axis, some(axis.size, rng, keep))
    sizes = [axes.get(name).size for name in axis.outer]
    rows = [some(axis.size, rng, keep) for _ in range(prod(sizes))]
    return cut(axis, np.array(rows).reshape(*sizes, keep), axis.outer)


def prunable(axes: Axes, wanted: Callable[[Axis], bool] = lambda axis: True) -> list[Axis]:
    """Returns the axes that something can be removed from."""
    return [a for a in axes.axes if a.prunable and a.size > 1 and wanted(a)]


def weights_of(model: torch.nn.Module, captured: Captured) -> dict[str, torch.Tensor]:
    """Returns every tensor of a program by name."""
    named = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in {**named, **captured.constants}.items()}


def left_padded(vocab: int = 100, length: int = 11, padding: int = 4) -> tuple[torch.Tensor, ...]:
    """Returns ids, mask and positions of two rows, the first of which is padded on the left."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab, (2, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def subject_of(model: Any, inputs: tuple[torch.Tensor, ...] | None = None) -> Subject:
    """Returns a Transformers model as a subject, with a left-padded batch."""
    captured = capture_model(model)
    inputs = left_padded() if inputs is None else inputs
    axes = analyse(captured.program)
    return Subject(axes, weights_of(model, captured), inputs, inputs[1].bool())
