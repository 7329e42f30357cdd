"""Times the pieces of a model at several widths, on the machine that runs this.

A piece is what lies between two places where a single value goes on: the attention or the MLP of a
layer with its norm and residual sum. It is cut down to each width as a plan would cut it, lowered,
and run. All pieces of one shape share their timings. Widths are timed in turns, so that a machine
that slows down slows all of them, and each figure is a median.

What is timed is one pass over a prompt in fp32, in torch. All widths of a piece share their memory,
and a small piece stays in a processor's cache where a whole model wouldn't: differences between
widths come out smaller than they are where memory is what limits.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import ceil, prod
from time import perf_counter
from typing import Any

import numpy as np
import torch

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.clock import Grid, Piece, Table
from surgeon.axes.plan import Plan, cut
from surgeon.axes.surgery import operate
from surgeon.calibrate.running import Running
from surgeon.calibrate.segments import Segment, segments
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Op, ParamRef, Ref
from surgeon.runtime.lower import TORCH_DTYPES

ROLES = ("ffn", "kv_heads", "q_per_kv")
"""Roles whose widths are timed, unless others are asked for."""

COMBINATIONS = 150
"""Widths of a piece that are timed at most."""

LONG_ENOUGH = 0.002
"""Seconds of one timing; what is quicker is run several times."""


@dataclass(frozen=True)
class Settings:
    """What is timed.

    Attributes:
        tokens: of a prompt that is read at once.
        batch: rows.
        repeat: timings of each width, after one that warms up; a figure is their median.
        points: widths of each axis, about evenly spaced.
        roles: whose axes are timed at several widths.
        device: `cpu` or `cuda`.
    """

    tokens: int = 128
    batch: int = 1
    repeat: int = 5
    points: int = 5
    roles: tuple[str, ...] = ROLES
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuses settings under which nothing would be measured."""
        for name, least in (("tokens", 1), ("batch", 1), ("repeat", 5), ("points", 2)):
            if getattr(self, name) < least:
                raise SurgeonError(
                    Code.BAD_OPTION,
                    f"{name} can't be {getattr(self, name)}",
                    at=f"--{name}",
                    why="the median of fewer timings, or of fewer widths, says nothing",
                    try_=f"{least} or more",
                )


@dataclass(frozen=True)
class _Place:
    """A piece of the model, before anything is cut."""

    segment: Segment
    axes: tuple[str, ...]
    branches: tuple[str, ...]


def measure(
    axes: Axes, settings: Settings | None = None, progress: Callable[[str], None] | None = None
) -> Table:
    """Returns how long a model's pieces take at several widths; its weights are not needed.

    Args:
        axes: of the model.
        settings: what is timed.
        progress: gets a line for each piece.

    Raises:
        SurgeonError: `bad-option` where there is no branch with an axis of these roles.
    """
    settings = settings or Settings()
    say = progress or (lambda _: None)
    places = _places(axes, settings.roles)
    shapes: dict[object, list[_Place]] = {}
    rest = [p for p in places if not p.branches]
    for place in places:
        if place.branches:
            shapes.setdefault(_shape(axes, place), []).append(place)
    if not any(p.axes for p in places):
        raise SurgeonError(
            Code.BAD_OPTION,
            f"no branch has an axis of the roles {', '.join(settings.roles)}",
            at="--role",
            why=f"the roles of this model are {', '.join(axes.roles)}",
            try_="one of those that lie in a layer",
        )
    pieces: list[Piece] = []
    for number, alike in enumerate(shapes.values(), 1):
        first = alike[0]
        say(f"{number} of {len(shapes)}: {', '.join(first.branches)}")
        pieces.append(
            Piece(
                tuple((p.axes, p.branches) for p in alike),
                tuple(axes.by_name[n].size for n in first.axes),
                tuple(_grids(axes, first, settings)),
            )
        )
    say("what no width changes")
    varied = {name for p in places for name in p.axes}
    spent = sum(_timed([p.segment], settings)[0] for p in rest)
    return Table(
        tuple(pieces),
        max(spent, 1e-9),
        {a.name: a.size for a in axes.axes if a.name not in varied},
        settings.tokens,
        settings.batch,
        settings.repeat,
        _machine(settings.device),
        {"python": platform.python_version(), "torch": torch.__version__},
    )


def _machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _places(axes: Axes, roles: Sequence[str]) -> list[_Place]:
    """Returns the pieces of a model, with the branches and the axes that lie wholly in each."""
    wanted = [a for role in roles for a in axes.of_role(role) if a.prunable and a.size > 1]
    out: list[_Place] = []
    for segment in segments(axes.program):
        params = set(segment.params)
        branches = [b for b in axes.branches if b.params and params.issuperset(b.params)]
        own = {name for branch in branches for name in branch.params}
        inside = [a for a in wanted if {m.param for m in a.members} <= own]
        out.append(_Place(segment, tuple(a.name for a in inside), tuple(b.name for b in branches)))
    return out


def _shape(axes: Axes, place: _Place) -> object:
    """Returns what pieces have in common that take the same time: operations, sizes, literals."""
    numbers: dict[str, int] = {}

    def plain(arg: Any) -> Any:
        if isinstance(arg, Ref | ParamRef):
            return numbers.setdefault(f"{type(arg).__name__} {arg.name}", len(numbers))
        return tuple(plain(item) for item in arg) if isinstance(arg, tuple) else repr(arg)

    def line(op: Op) -> object:
        args = (plain(op.args), tuple((name, plain(arg)) for name, arg in op.kwargs))
        results = tuple(plain(Ref(name)) for name in op.outputs)
        return op.target, args, tuple(map(str, op.types)), results

    found = [axes.by_name[n] for n in place.axes]
    return (
        tuple((a.role, a.size, len(a.outer)) for a in found),
        tuple(b.rpartition("/")[2] for b in place.branches),
        tuple(line(op) for op in place.segment.program.ops),
        tuple((p.kind, str(p.type)) for p in place.segment.program.params),
    )


def _grids(axes: Axes, place: _Place, settings: Settings) -> Iterator[Grid]:
    """Yields the timings of a piece, whole and with each set of its branches dropped but all."""
    by_name = {b.name: b for b in axes.branches}
    places = range(len(place.branches))
    for number in places:
        for gone in combinations(places, number):
            dropped = tuple(place.branches[i] for i in gone)
            params = {name for b in dropped for name in by_name[b].params}
            dims = tuple(
                i
                for i, name in enumerate(place.axes)
                if not {m.param for m in axes.by_name[name].members} & params
            )
            found = [axes.by_name[place.axes[i]] for i in dims]
            counts = _together(found, settings.points)
            kept = [b for b in place.branches if b not in dropped]
            mark = by_name[kept[0]].params[0]
            pieces = [_cut(axes, found, widths, dropped, mark) for widths in product(*counts)]
            yield Grid(gone, dims, tuple(counts), tuple(_timed(pieces, settings)))


def _together(found: Sequence[Axis], points: int) -> list[tuple[int, ...]]:
    """Returns the counts of each axis, fewer of them where there would be many combinations.

    Raises:
        SurgeonError: `bad-option` where there are too many even so.
    """
    for fewer in range(points, 1, -1):
        counts = [_counts(axis, fewer) for axis in found]
        if prod(map(len, counts)) <= COMBINATIONS:
            return counts
    raise SurgeonError(
        Code.BAD_OPTION,
        f"{len(found)} axes of one piece can't be timed together",
        at=", ".join(axis.name for axis in found[:4]),
        why=f"there are more than {COMBINATIONS} combinations of their widths",
        try_="fewer roles",
    )


def _counts(axis: Axis, points: int) -> tuple[int, ...]:
    """Returns about evenly spaced counts from 1 to all, of wide axes multiples of 8."""
    spaced = np.linspace(1, axis.size, min(points, axis.size))
    unit = 8 if axis.size >= 16 * points else 1
    inner = (round(float(x) / unit) * unit for x in spaced[1:-1])
    return tuple(sorted({1, axis.size, *(n for n in inner if 0 < n < axis.size)}))


def _cut(
    axes: Axes, found: Sequence[Axis], widths: Sequence[int], dropped: tuple[str, ...], mark: str
) -> Segment:
    """Returns the piece with a parameter, `mark`, after its axes were cut to some widths."""
    cuts = tuple(
        cut(axis, range(width))
        for axis, width in zip(found, widths, strict=True)
        if width < axis.size
    )
    smaller = operate(axes, Plan(cuts, dropped))
    return next(piece for piece in segments(smaller) if mark in piece.params)


def _timed(pieces: Sequence[Segment], settings: Settings) -> list[float]:
    """Returns the median seconds of each piece, timed in turns."""
    device = settings.device
    store = _Store(pieces, device)
    generator = torch.Generator().manual_seed(0)
    shape = (settings.batch, settings.tokens)
    calls: list[Callable[[], Any]] = []
    for piece in pieces:
        running = Running(piece, store.of(piece), device)
        ids = torch.zeros(shape, dtype=torch.int64, device=device)
        state = None
        if piece.given is not None:
            width = piece.program.types[piece.given].shape[-1]
            assert isinstance(width, int)
            state = torch.randn(*shape, width, generator=generator).to(device)
        calls.append(lambda run=running, ids=ids, state=state: run(ids, state))
    times: list[list[float]] = [[] for _ in calls]
    with torch.no_grad():
        loops = [ceil(LONG_ENOUGH / max(_once(call, 1, device), 1e-9)) for call in calls]
        for _ in range(settings.repeat):
            for call, loop, found in zip(calls, loops, times, strict=True):
                found.append(_once(call, loop, device))
    return [statistics.median(found) for found in times]


def _once(call: Callable[[], Any], loops: int, device: str) -> float:
    """Returns the seconds of one of several calls in a row."""
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    wait()
    start = perf_counter()
    for _ in range(loops):
        call()
    wait()
    return (perf_counter() - start) / loops


class _Store:
    """Weights of any shape that share one piece of memory: their values don't matter here."""

    def __init__(self, pieces: Sequence[Segment], device: str) -> None:
        most: dict[str, int] = {}
        for piece in pieces:
            for p in piece.program.params:
                most[p.name] = max(most.get(p.name, 0), prod(_static(p.type.shape)))
        generator = torch.Generator().manual_seed(0)
        # Small, so that nothing overflows, and no denormal numbers, which are slow.
        self._held = {
            name: (torch.randn(size, generator=generator) * 0.02).to(device)
            for name, size in most.items()
        }

    def of(self, piece: Segment) -> Callable[[str], torch.Tensor]:
        """Returns what gives a piece's weights."""
        types: Mapping[str, Any] = {p.name: p.type for p in piece.program.params}

        def get(name: str) -> torch.Tensor:
            shape = _static(types[name].shape)
            found = self._held[name][: prod(shape)].reshape(shape)
            kind = TORCH_DTYPES[types[name].dtype]
            return (
                found
                if kind.is_floating_point
                else torch.zeros(shape, dtype=kind, device=found.device)
            )

        return get


def _static(shape: Sequence[int | str]) -> tuple[int, ...]:
    return tuple(size for size in shape if isinstance(size, int))
