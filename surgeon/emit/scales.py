"""What a class computes by itself against what the pruned model needs, folded into weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.fold import Fold, Unfoldable, folds
from surgeon.axes.plan import Selection, dropped
from surgeon.axes.surgery import share_of
from surgeon.capture.buffers import computed_buffers
from surgeon.emit.hf_config import Candidate
from surgeon.runtime.apply import removed


class Refused(Exception):
    """A candidate can't express the plan. Its text is the reason."""


@dataclass(frozen=True)
class Scale:
    """A fold with its base: the parameter p becomes base^exponent · (p + offset) − offset."""

    base: float
    fold: Fold

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns the scaled tensor, computed in double precision."""
        factor = self.base ** float(self.fold.exponent)
        return (tensor.double() + self.fold.offset) * factor - self.fold.offset

    def undo(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what `apply` makes this tensor of, computed in double precision."""
        factor = self.base ** float(self.fold.exponent)
        return (tensor.double() + self.fold.offset) / factor - self.fold.offset


def table_ratios(
    axes: Axes, selection: Selection, candidate: Candidate, buffers: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Compares the tables that the candidate computes by itself with those the model needs.

    Returns the buffers that come out as a multiple of what is needed, by name; a table of
    positions must agree exactly.
    """
    gone = dropped(axes, selection.plan)
    theirs = computed_buffers(candidate.model_class, candidate.config)
    out: dict[str, float] = {}
    for p in axes.program.params:
        if p.kind == "constant" and p.name not in gone and selection.cuts_into(p.name):
            raise Refused(f"it makes {p.name} itself, whatever was removed")
        if p.kind != "computed" or p.name in gone:
            continue
        want = removed(selection, p.name, buffers[p.name])
        got = theirs.get(p.name)
        if got is None or got.shape != want.shape:
            size = None if got is None else list(got.shape)
            raise Refused(f"it computes {p.name} as {size}, the model needs {list(want.shape)}")
        if torch.equal(got.double(), want.double()):
            continue
        ratio = got.double() / want.double()
        if want.numel() != 1:
            if torch.allclose(got.double(), want.double(), rtol=1e-6):
                continue
            raise Refused(f"it computes other values for {p.name}")
        out[p.name] = float(ratio)
    return out


def folded_scales(
    axes: Axes, selection: Selection, fixed: Mapping[str, float]
) -> dict[str, tuple[Scale, ...]]:
    """Returns what folds the corrected averages into weights, one fold per share."""
    groups: dict[float, list[int]] = {}
    for index, op in enumerate(axes.program.ops):
        share = share_of(axes, selection, index, op)
        if share != 1.0:
            groups.setdefault(share, []).append(index)
    if fixed and not groups:
        name = next(iter(fixed))
        raise Refused(f"it computes {name} as {fixed[name]:.6g} times what the model needs")
    out: dict[str, tuple[Scale, ...]] = {}
    left = dict(fixed)
    for share, averages in groups.items():
        base = math.sqrt(share)
        exponents: dict[str, Fraction] = {}
        for name, ratio in list(left.items()):
            if ratio <= 0:
                continue
            power = math.log(ratio) / math.log(base)
            if abs(power - round(power)) < 1e-4:
                exponents[name] = Fraction(round(power))
                del left[name]
        try:
            found = folds(axes.program, frozenset(averages), exponents)
        except Unfoldable as error:
            raise Refused(
                f"the average over removed channels can't be folded into weights ({error})"
            ) from error
        for name, fold in found.items():
            out[name] = (*out.get(name, ()), Scale(base, fold))
    if left:
        name = next(iter(left))
        raise Refused(f"it computes {name} as {left[name]:.6g} times what the model needs")
    return out
