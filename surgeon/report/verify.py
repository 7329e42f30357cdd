"""Removed equals masked: the check that every emitted model has to pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.space import leaves
from surgeon.axes.surgery import without_branches
from surgeon.emit.pt2 import difference, samples, several
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Program
from surgeon.runtime.apply import Get, kept_only, masked
from surgeon.runtime.lower import lower

TOLERANCE = 1e-4
"""Largest difference allowed, as a share of the largest logit."""

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""From token ids, mask and positions, each `[batch, seq]`, to logits `[batch, seq, vocab]`."""

TEXTS = (
    "The surgeon looked at the picture for a long time before she said anything.",
    "In 1879 a bridge fell",
)


@dataclass(frozen=True)
class Probe:
    """One batch of inputs that both sides run on."""

    name: str
    ids: torch.Tensor
    mask: torch.Tensor

    @property
    def positions(self) -> torch.Tensor:
        """Positions counted from the first real token, `[batch, seq]`."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Difference:
    """How far two models are apart on one probe, as a share of the largest logit."""

    probe: str
    largest: float


@dataclass(frozen=True)
class Verification:
    """The outcome of a comparison with the masked reference.

    Attributes:
        largest: largest difference over the probes, as a share of the largest logit.
        tolerance: what was allowed.
        probes: the difference for each probe.
        exact: whether removal is what masking gives; otherwise normalisers of the reference see
            kept channels only.
        reasons: why it isn't, if it isn't.
        cast: largest difference that rounding to the checkpoint's element type makes, if any.
        rounded: whether every stored tensor is the rounding of the verified one, bit for bit.
        layers: where no model was run as a whole: which branches were, each by itself, on random
            activations; `probes` has their differences, as shares of the largest value.
        tokens: how many activations each of them was run on.
    """

    largest: float
    tolerance: float
    probes: tuple[Difference, ...]
    exact: bool = True
    reasons: tuple[str, ...] = ()
    cast: float | None = None
    rounded: bool | None = None
    layers: tuple[str, ...] = ()
    tokens: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the outcome as plain data."""
        return asdict(self)


def together(found: Iterable[Verification]) -> Verification:
    """Returns the outcome of several comparisons with one reference: the worst of all of them."""
    every = tuple(found)
    worst = max(every, key=lambda one: one.largest)
    casts = [one.cast for one in every if one.cast is not None]
    known = [one.rounded for one in every if one.rounded is not None]
    return replace(
        worst,
        probes=tuple(dict.fromkeys(probe for one in every for probe in one.probes)),
        cast=max(casts, default=None),
        rounded=all(known) if known else None,
    )


def probes(
    vocab: int,
    tokenizer: Any = None,
    *,
    length: int = 24,
    positions: int | None = None,
    seed: int = 0,
) -> list[Probe]:
    """Returns random and, with a tokenizer, text inputs: whole, left-padded and right-padded.

    Args:
        vocab: rows of the embedding; tokens beyond it, as added ones may be, are left out.
        tokenizer: makes token ids of the texts.
        length: tokens of the random inputs.
        positions: how many the model has; no input is longer.
        seed: for the random inputs.
    """
    length = min(length, positions or length)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (2, length), generator=generator)
    whole = torch.ones_like(ids)
    left, right = whole.clone(), whole.clone()
    left[0, : length // 3] = 0
    right[1, length - length // 4 :] = 0
    found = [
        Probe("random", ids, whole),
        Probe("random, padded left", ids, left),
        Probe("random, padded right", ids, right),
    ]
    if tokenizer is not None:
        given = [tokenizer(text)["input_ids"] for text in TEXTS]
        kept = [[i for i in row if i < vocab][:positions] for row in given]
        rows = [row for row in kept if row]
        width = max(map(len, rows), default=0)
        for side in ("left", "right") if rows else ():
            batch, mask = torch.zeros(len(rows), width, dtype=torch.long), []
            for i, row in enumerate(rows):
                place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
                batch[i, place] = torch.tensor(row)
                on = torch.zeros(width, dtype=torch.long)
                on[place] = 1
                mask.append(on)
            found.append(Probe(f"text, padded {side}", batch, torch.stack(mask)))
    return found


def reference(axes: Axes, plan: Plan, get: Get) -> nn.Module:
    """Returns the masked model: full shape, dropped branches bypassed, zeros where channels go.

    Where the plan renumbers token ids, it is fed and read in the new numbers.

    Args:
        axes: the axes of the source.
        plan: what is removed.
        get: reads a parameter in full size, rewrites applied, as fp32.
    """
    selection = Selection(axes, plan)
    program = without_branches(axes, plan.branches) if plan.branches else axes.program
    change = kept_only(axes, selection, program.producer)
    full = lower(program, lambda name: masked(selection, name, get(name)), change=change)
    return _Renumbered(full, selection) if plan.renumbered else full


class _Renumbered(nn.Module):
    """A model in full shape that takes new token ids, and gives what it says of their tokens."""

    def __init__(self, full: nn.Module, selection: Selection) -> None:
        super().__init__()
        axes, plan = selection.axes, selection.plan
        self.full = full
        self.old = torch.from_numpy(plan.by_axis[plan.renumbered[0]].array)
        numbers = {axes.number[name] for name in plan.renumbered}
        self.read: list[dict[int, torch.Tensor]] = [
            {
                dim: torch.from_numpy(selection.indices(expr))
                for dim, expr in enumerate(axes.dims["%" + name])
                if numbers & set(leaves(expr))
            }
            for name in axes.program.outputs
        ]

    def forward(self, ids: torch.Tensor, *others: torch.Tensor) -> Any:
        found = self.full(self.old[ids], *others)
        out: list[torch.Tensor] = []
        for tensor, dims in zip(several(found), self.read, strict=True):
            for dim, kept in dims.items():
                tensor = tensor.index_select(dim, kept)
            out.append(tensor)
        return tuple(out) if isinstance(found, tuple) else out[0]


def transformers_forward(model: Any) -> Forward:
    """Returns a Transformers model as a function of ids, mask and positions."""

    def run(ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits

    return run


@torch.no_grad()
def differences(left: Forward, right: Forward, inputs: list[Probe]) -> tuple[Difference, ...]:
    """Returns for each probe the largest difference of logits at real tokens.

    Raises:
        SurgeonError: `verify-failed` where a logit is not finite or the shapes differ.
    """
    out: list[Difference] = []
    for probe in inputs:
        a = left(probe.ids, probe.mask, probe.positions)
        b = right(probe.ids, probe.mask, probe.positions)
        if a.shape != b.shape:
            raise _failed(f"logits have shapes {list(a.shape)} and {list(b.shape)}", probe.name)
        real = probe.mask.bool()
        a, b = a[real].double(), b[real].double()
        if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            raise _failed("a logit is not finite", probe.name)
        scale = float(b.abs().max()) or 1.0
        out.append(Difference(probe.name, float((a - b).abs().max()) / scale))
    return tuple(out)


def check(
    forward: Forward,
    masked_model: Forward,
    inputs: list[Probe],
    axes: Axes,
    plan: Plan,
    *,
    tolerance: float = TOLERANCE,
) -> Verification:
    """Returns how the smaller model compares with the masked one.

    Raises:
        SurgeonError: `verify-failed` where they differ by more than `tolerance`.
    """
    found = differences(forward, masked_model, inputs)
    return _judged(found, axes, plan, tolerance)


@torch.no_grad()
def check_program(
    program: Program, model: nn.Module, masked_model: nn.Module, axes: Axes, plan: Plan
) -> Verification:
    """Returns how a smaller module of any kind compares with the masked one.

    Args:
        program: the program after the plan, which says what the inputs are.
        model: the smaller module.
        masked_model: the masked one.
        axes: the axes of the original.
        plan: what is removed.

    Raises:
        SurgeonError: `verify-failed` where they differ by more than the tolerance.
    """
    found: list[Difference] = []
    for sample in samples(program):
        got, want = (several(m(*sample.inputs)) for m in (model, masked_model))
        found.append(Difference(sample.name, difference(got, want, sample.valid)))
    return _judged(tuple(found), axes, plan, TOLERANCE)


def _judged(
    found: tuple[Difference, ...], axes: Axes, plan: Plan, tolerance: float
) -> Verification:
    worst = max(found, key=lambda d: d.largest)
    if not worst.largest <= tolerance:
        raise _failed(
            f"the pruned model differs from the masked one by {worst.largest:.2e} of the largest "
            f"logit, {tolerance:.0e} is allowed",
            worst.probe,
            {"largest": worst.largest, "tolerance": tolerance},
        )
    reasons = inexact(axes, plan)
    return Verification(worst.largest, tolerance, found, not reasons, reasons)


def inexact(axes: Axes, plan: Plan) -> tuple[str, ...]:
    """Returns why removing what the plan removes differs from masking it; empty if it doesn't."""
    found = (f"{c.axis}: {r.why}" for c in plan.cuts for r in axes.by_name[c.axis].inexact)
    return tuple(dict.fromkeys(found))


def _failed(why: str, probe: str, data: Mapping[str, Any] | None = None) -> SurgeonError:
    return SurgeonError(
        Code.VERIFY_FAILED,
        "the pruned model is not what the plan says",
        at=f"probe: {probe}",
        why=why,
        try_="report this with the plan (plan.json) and the model's configuration",
        data=data,
    )
