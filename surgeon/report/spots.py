"""Removed equals masked, layer by layer: the check of a model that is never run as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.surgery import without_branches
from surgeon.calibrate.segments import Segment, segments
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Program
from surgeon.memory import Memory
from surgeon.report.verify import TOLERANCE, Difference, Verification, inexact
from surgeon.runtime.apply import Normaliser, kept_only
from surgeon.runtime.lower import lower

Get = Callable[[str], torch.Tensor]

LENGTH = 256
"""Tokens of a batch that the embedding is asked for."""


@dataclass(frozen=True)
class Side:
    """One of two models that are compared.

    Attributes:
        program: what it computes.
        get: reads a parameter in fp32.
    """

    program: Program
    get: Get


@dataclass(frozen=True)
class Part:
    """Pieces that are compared together: a branch alone, or what lies before and after branches.

    Attributes:
        pieces: in order.
        branch: whether it is one piece that adds something to what it is given.
    """

    pieces: tuple[Segment, ...]
    branch: bool

    @property
    def made(self) -> str:
        """The value that is compared: what a branch adds, or what is handed on or returned."""
        last = self.pieces[-1]
        added = last.added if self.branch else None
        return added or last.program.outputs[0]

    @property
    def label(self) -> str:
        """The module that makes that value."""
        program = self.pieces[-1].program
        return program.ops[program.producer[self.made]].module or "the model"

    @property
    def elements(self) -> int:
        """Elements of the parameters that it reads."""
        params = {p.name: p for piece in self.pieces for p in piece.program.params}
        return sum(prod(s for s in p.type.shape if isinstance(s, int)) for p in params.values())


def parts(program: Program) -> tuple[Part, ...]:
    """Returns a program's pieces, each branch of the residual stream by itself."""
    out: list[Part] = []
    for piece in segments(program):
        if _adds(piece):
            out.append(Part((piece,), True))
        elif out and not out[-1].branch:
            out[-1] = replace(out[-1], pieces=(*out[-1].pieces, piece))
        else:
            out.append(Part((piece,), False))
    return tuple(out)


def _adds(piece: Segment) -> bool:
    """Whether a piece adds something that it makes of what it is given."""
    if piece.added is None:
        return False
    made = replace(piece.program, outputs=(piece.added,)).without_dead_code()
    return piece.given in made.consumers


def needed(program: Program) -> int:
    """Returns the bytes that comparing the layers of a program takes.

    One side is held after the other, but for what lies before the first branch: there both are, and
    are compared batch by batch.
    """
    first, *others = parts(program)
    return int(4.5 * max([2 * first.elements, *(part.elements for part in others)]))


def check_layers(
    dense: Side,
    sliced: Side,
    axes: Axes,
    plan: Plan,
    *,
    memory: Memory,
    tokens: int = 16,
    positions: int | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Verification:
    """Returns how each layer of a smaller model compares with the masked layer of the original.

    Both are run on the same random activations, one layer in memory at a time; the embedding is
    asked for every token. The residual stream of the smaller model may be the masked one's times a
    number, as where averages over kept channels are folded into weights: which number the embedding
    says, and all that follows has to keep to it.

    Args:
        dense: the original, its parameters masked.
        sliced: the smaller model, as whoever loads it will run it.
        axes: of the original.
        plan: what is removed.
        memory: what it may take.
        tokens: how many random activations each layer is run on, two rows of them.
        positions: how many the model has.
        tolerance: the largest difference allowed, as a share of the largest value.
        seed: for the activations.

    Raises:
        SurgeonError: `verify-failed` where a layer differs, or the models have other layers;
            `bad-option` where a layer doesn't fit in memory.
    """
    left = parts(dense.program)
    right = parts(sliced.program)
    if [part.branch for part in left] != [part.branch for part in right]:
        counts = " and ".join(str(sum(part.branch for part in side)) for side in (left, right))
        raise _failed(
            "the model",
            f"the masked and the smaller model add {counts} branches to the residual stream, or in "
            "another order",
        )
    check = _Check(Selection(axes, plan), dense, sliced, tokens, positions, seed)
    memory.check(needed(dense.program), "the largest layer is compared in fp32")
    found: list[Difference] = []
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        largest = check.part(a, b, last=number == len(left) - 1)
        if not largest <= tolerance:
            raise _failed(
                b.label,
                f"the sliced layer differs from the masked one by {largest:.2e} of the largest "
                f"value, {tolerance:.0e} is allowed",
                {"largest": largest, "tolerance": tolerance},
            )
        found.append(Difference(b.label, largest))
    reasons = inexact(axes, plan)
    return Verification(
        max(d.largest for d in found),
        tolerance,
        tuple(found),
        not reasons,
        reasons,
        layers=tuple(part.label for part in right if part.branch),
        tokens=tokens,
    )


def masked_program(axes: Axes, plan: Plan) -> Program:
    """Returns the original program, dropped branches bypassed."""
    return without_branches(axes, plan.branches) if plan.branches else axes.program


class _Check:
    """Both models, the activations that both are given, and the factor between their streams."""

    def __init__(
        self,
        selection: Selection,
        dense: Side,
        sliced: Side,
        tokens: int,
        positions: int | None,
        seed: int,
    ) -> None:
        self.selection, self.dense, self.sliced = selection, dense, sliced
        self.rows, self.length = 2, max(1, min(tokens // 2, positions or tokens))
        self.positions = positions
        self.draw = torch.Generator().manual_seed(seed)
        self.factor = 1.0

    @torch.no_grad()
    def part(self, dense: Part, sliced: Part, *, last: bool) -> float:
        """Returns the largest difference of a part, as a share of the largest value."""
        given = dense.pieces[0].given
        if given is None:
            return self._first(dense, sliced)
        ids = torch.zeros(self.rows, self.length, dtype=torch.long)
        at = torch.arange(self.length).expand(self.rows, -1)
        state = self._state(given)
        with _Runner(dense, self.dense, self._change) as wide:
            want = self._kept(dense.made, wide(ids, at, state))
        small = self.factor * self._kept(given, state)
        with _Runner(sliced, self.sliced) as narrow:
            got = narrow(ids, at, small)
        found = _Apart(sliced.label)
        if not dense.branch:
            # Logits are what they were; between layers the stream may be scaled otherwise.
            self.factor = 1.0 if last else _factor(want, got)
        found.add(self.factor * want, got)
        return found.share

    def _first(self, dense: Part, sliced: Part) -> float:
        """Returns the same of what lies before the first branch, asked for every token."""
        found = _Apart(sliced.label)
        known = False
        with (
            _Runner(dense, self.dense, self._change) as wide,
            _Runner(sliced, self.sliced) as narrow,
        ):
            for (old, new), at in self._every_token():
                want, got = self._kept(dense.made, wide(old, at, None)), narrow(new, at, None)
                if not known:
                    self.factor, known = _factor(want, got), True
                found.add(self.factor * want, got)
        return found.share

    def _change(self, program: Program) -> Mapping[int, Normaliser]:
        return kept_only(self.selection.axes, self.selection, program.producer)

    def _kept(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns what is left of a value of the dense model."""
        for dim, expr in enumerate(self.selection.axes.dims["%" + name]):
            if self.selection.touches(expr):
                kept = torch.from_numpy(self.selection.indices(expr))
                tensor = tensor.index_select(dim, kept)
        return tensor

    def _state(self, name: str) -> torch.Tensor:
        """Returns random activations in the place of a value, zero where channels are removed."""
        *_, width = self.dense.program.types[name].shape
        assert isinstance(width, int)
        state = torch.randn(self.rows, self.length, width, generator=self.draw)
        expr = self.selection.axes.dims["%" + name][-1]
        if self.selection.touches(expr):
            on = torch.zeros(width)
            on[torch.from_numpy(self.selection.indices(expr))] = 1.0
            state = state * on
        return state

    def _every_token(self) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]]:
        """Yields all token ids in the old and new numbers, `[1, n]`, at positions all in turn."""
        axes, plan = self.selection.axes, self.selection.plan
        if plan.renumbered:
            old = torch.from_numpy(plan.by_axis[plan.renumbered[0]].array)
        else:
            old = torch.arange(max(_rows(axes), 1))
        length = min(LENGTH, self.positions or LENGTH)
        for start in range(0, len(old), length):
            new = torch.arange(start, min(start + length, len(old)))
            at = new % self.positions if self.positions else new
            yield (old[new].unsqueeze(0), new.unsqueeze(0)), at.unsqueeze(0)


def _rows(axes: Axes) -> int:
    """Returns how many tokens the embedding has a row for."""
    program = axes.program
    ids = program.inputs[0].name
    for op in program.ops:
        if op.target == "aten.embedding.default" and getattr(op.arg(1), "name", "") == ids:
            rows = program.type_of(op.arg(0)).shape[0]
            return rows if isinstance(rows, int) else 0
    return 0


class _Apart:
    """How far two values are apart, batch by batch."""

    def __init__(self, label: str) -> None:
        self.label, self.largest, self.scale = label, 0.0, 0.0

    def add(self, want: torch.Tensor, got: torch.Tensor) -> None:
        """Takes in what a layer ought to make and what it makes."""
        if want.shape != got.shape:
            why = f"it makes {list(got.shape)}, the plan says {list(want.shape)}"
            raise _failed(self.label, why)
        apart = (want.double() - got.double()).abs().max()
        self.largest = max(self.largest, float(apart) if bool(apart.isfinite()) else float("inf"))
        self.scale = max(self.scale, float(want.abs().max()))

    @property
    def share(self) -> float:
        """The largest difference, as a share of the largest value."""
        return self.largest / (self.scale or 1.0)


class _Runner:
    """Runs a part on token ids, positions and what it is given; its weights go when it is left."""

    def __init__(
        self,
        part: Part,
        side: Side,
        change: Callable[[Program], Mapping[int, Normaliser]] = lambda _: {},
    ) -> None:
        self.modules: list[nn.Module] = []
        for piece in part.pieces:
            made = part.made if piece is part.pieces[-1] else piece.program.outputs[0]
            program = replace(piece.program, outputs=(made,)).without_dead_code()
            self.modules.append(lower(program, side.get, change=change(program)))

    def __call__(
        self, ids: torch.Tensor, at: torch.Tensor, state: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns what the last piece makes."""
        for module in self.modules:
            given = () if state is None else (state,)
            state = module(ids, torch.ones_like(ids), at, *given)
        assert state is not None
        return state

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        # A module that runs a graph refers to itself: its weights would stay until that is noticed.
        for module in self.modules:
            for parameter in module.parameters():
                parameter.data = parameter.new_empty(0)
        self.modules.clear()


def _factor(want: torch.Tensor, got: torch.Tensor) -> float:
    """Returns the number that the left times comes nearest to the right."""
    if want.shape != got.shape:
        return 1.0  # which is refused a moment later
    own = float(want.double().square().sum())
    found = float((want.double() * got.double()).sum()) / own if own else 1.0
    return 1.0 if abs(found - 1.0) < 1e-6 else found


def _failed(at: str, why: str, data: Mapping[str, float] | None = None) -> SurgeonError:
    return SurgeonError(
        Code.VERIFY_FAILED,
        "the pruned model is not what the plan says",
        at=at,
        why=why,
        try_="prune again; if the folder was not edited since, report this with plan.json",
        data=data,
    )
