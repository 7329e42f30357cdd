"""A table of timings per width as a measure: how long a model takes under any counts."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes
from surgeon.axes.meter import Counts
from surgeon.errors import Code, SurgeonError

VERSION = 1


@dataclass(frozen=True)
class Grid:
    """Seconds at every combination of some counts.

    Attributes:
        dropped: which of the piece's branches are not there, by their places.
        dims: which of the piece's axes the dimensions are, by their places.
        counts: along each dimension, ascending.
        seconds: medians, row-major.
    """

    dropped: tuple[int, ...]
    dims: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]

    def at(self, kept: list[Any]) -> Any:
        """Returns the seconds between those measured, linear in each count.

        Args:
            kept: by dimension, numbers or arrays that broadcast.
        """
        table = np.asarray(self.seconds).reshape([len(c) for c in self.counts])
        places: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []
        for counts, wanted in zip(self.counts, kept, strict=True):
            points, want = (
                np.asarray(counts, dtype=np.float64),
                np.asarray(wanted, dtype=np.float64),
            )
            low = np.clip(np.searchsorted(points, want, side="right") - 1, 0, len(points) - 2)
            share = (want - points[low]) / (points[low + 1] - points[low])
            places.append((low, np.clip(share, 0.0, 1.0)))
        total: Any = 0.0
        for corner in product((0, 1), repeat=len(places)):
            weight: Any = 1.0
            for above, (_, share) in zip(corner, places, strict=True):
                weight = weight * (share if above else 1.0 - share)
            index = tuple(low + above for above, (low, _) in zip(corner, places, strict=True))
            total = total + weight * table[index]
        return total


@dataclass(frozen=True)
class Piece:
    """Timings that all pieces of a model of one shape share, such as the MLPs of equal layers.

    Attributes:
        places: of each such piece, the names of its axes and of its branches.
        sizes: of its axes.
        grids: with all of its branches, and with every set of them dropped but the whole.
    """

    places: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    sizes: tuple[int, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Table:
    """How long the pieces of a model take, by width, on one machine.

    Attributes:
        pieces: those that can get faster.
        rest: seconds of what can't, such as the head.
        others: sizes of the axes that were timed at one width only, by name.
        tokens: of each row that is read at once.
        batch: rows.
        repeat: timings of which each figure is the median.
        device: name of it, and threads.
        versions: of what ran it.
    """

    pieces: tuple[Piece, ...]
    rest: float
    others: Mapping[str, int]
    tokens: int
    batch: int
    repeat: int
    device: str
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    def to_json(self) -> str:
        """Returns the table as JSON text; `from_json` gives it back."""
        return json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "the table") -> Table:
        """Returns the table that `text` spells.

        Raises:
            SurgeonError: `bad-text-input` where it is no table of timings.
        """
        try:
            data = json.loads(text)
            if data.pop("version") != VERSION:
                raise ValueError(f"its version is not {VERSION}")
            pieces = tuple(_piece(found) for found in data.pop("pieces"))
            table = cls(pieces, **data)
            times: list[Any] = [s for p in pieces for g in p.grids for s in g.seconds]
            if not all(isinstance(s, int | float) and 0 < s < np.inf for s in [*times, table.rest]):
                raise ValueError("a time is no positive number")
            return table
        except (
            *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError),
        ) as error:
            raise SurgeonError(
                Code.BAD_TEXT_INPUT,
                "this is no table of timings",
                at=where,
                why=f"{type(error).__name__}: {error}",
                try_="one that surgeon latency wrote",
            ) from error

    @classmethod
    def read(cls, path: str | Path) -> Table:
        """Returns the table of a file.

        Raises:
            SurgeonError: `missing-file` or `bad-text-input`.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SurgeonError(
                Code.MISSING_FILE,
                f"the table of timings '{path}' can't be read",
                at=str(path),
                why=getattr(error, "strerror", None) or str(error),
                try_="surgeon latency MODEL -o TABLE.json",
            ) from error
        return cls.from_json(text, str(path))

    def clock(self, axes: Axes) -> Clock:
        """Returns what tells how long a model with these axes takes.

        It may be the model that was timed, or one of which a part is gone already.

        Raises:
            SurgeonError: `bad-option` where the table was made for another model.
        """
        branches = {b.name for b in axes.branches}
        timed = {b for piece in self.pieces for _, own in piece.places for b in own}
        unknown = sorted(branches - timed) or ([] if branches else ["a model without branches"])
        if unknown:
            raise _other(unknown[0], "it was not timed")
        for name, size in self.others.items():
            if name in axes.by_name and axes.by_name[name].size != size:
                why = f"{name} has the size {axes.by_name[name].size}, the table's has {size}"
                raise _other(name, why)
        found: list[_Timed] = []
        for piece in self.pieces:
            for names, own in piece.places:
                # An axis of which one index is left is none any more.
                sizes = tuple(axes.by_name[n].size if n in axes.by_name else 1 for n in names)
                for name, size, most in zip(names, sizes, piece.sizes, strict=True):
                    if size > most:
                        raise _other(name, f"it has the size {size}, the table's has {most}")
                gone = frozenset(b for b in own if b not in branches)
                found.append(_Timed(piece, names, own, sizes, gone))
        return Clock({a.name: a.size for a in axes.axes}, tuple(found), self.rest)


def _other(at: str, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        "the table of timings was made for another model",
        at=at,
        why=why,
        try_="surgeon latency MODEL -o TABLE.json with this model",
    )


def _piece(data: Mapping[str, Any]) -> Piece:
    places = tuple((tuple(names), tuple(branches)) for names, branches in data["places"])
    grids = tuple(
        Grid(
            tuple(g["dropped"]),
            tuple(g["dims"]),
            tuple(tuple(counts) for counts in g["counts"]),
            tuple(g["seconds"]),
        )
        for g in data["grids"]
    )
    for grid in grids:
        np.asarray(grid.seconds).reshape([len(c) for c in grid.counts])  # or it is no table
    return Piece(places, tuple(data["sizes"]), grids)


@dataclass(frozen=True)
class _Timed:
    """One piece of a model: a part of its time, as `meter.Part` describes it."""

    piece: Piece
    names: tuple[str, ...]
    own: tuple[str, ...]
    sizes: tuple[int, ...]
    gone: frozenset[str]
    axes: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    fixed: Counts = field(default_factory=dict[str, int])

    def left(self, kept: Counts, dropped: Collection[str] = ()) -> Any:
        """Returns the seconds that it takes."""
        gone = tuple(i for i, name in enumerate(self.own) if name in dropped or name in self.gone)
        if len(gone) == len(self.own):
            return 0.0
        grid = next(g for g in self.piece.grids if g.dropped == gone)
        counts: list[Any] = []
        for dim in grid.dims:
            name = self.names[dim]
            found = kept.get(name)
            counts.append(self.fixed.get(name, self.sizes[dim]) if found is None else found)
        return grid.at(counts)


@dataclass(frozen=True)
class Clock:
    """The time that a model takes, as `meter.Meter` describes a measure.

    Attributes:
        sizes: of every axis, by name.
        timed: the pieces that can get faster.
        rest: seconds of what can't.
    """

    sizes: Mapping[str, int]
    timed: tuple[_Timed, ...]
    rest: float

    @property
    def whole(self) -> float:
        """The seconds of the model as it is."""
        return float(self.left({}))

    def left(self, kept: Counts, dropped: Collection[str] = ()) -> Any:
        """Returns the seconds for other sizes; see `meter.Part.left`.

        Raises:
            SurgeonError: `bad-option` for an axis that was not timed.
        """
        self._check(kept)
        return sum((found.left(kept, dropped) for found in self.timed), self.rest)

    def parts(
        self, axes: Collection[str], branches: Collection[str], kept: Counts | None = None
    ) -> tuple[_Timed, ...]:
        """Returns the pieces that these axes and branches are in; see `meter.Meter.parts`."""
        self._check({**dict.fromkeys(axes, 0), **(kept or {})})
        out: list[_Timed] = []
        for found in self.timed:
            inside = tuple(n for n in found.names if n in axes)
            droppable = tuple(b for b in found.own if b in branches)
            if inside or droppable:
                out.append(replace(found, axes=inside, branches=droppable, fixed=kept or {}))
        return tuple(out)

    def _check(self, kept: Counts) -> None:
        known = {name for found in self.timed for name in found.names}
        for name, count in kept.items():
            if name not in known and np.any(np.asarray(count) < self.sizes[name]):
                raise SurgeonError(
                    Code.BAD_OPTION,
                    f"the table of timings says nothing of {name}",
                    at=name,
                    why="no piece was timed at several of its widths",
                    try_="surgeon latency with --role for its role, or another --measure",
                    data={"axis": name},
                )
