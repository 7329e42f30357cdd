"""How much is to go, and from where: what a selection is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import ceil, floor, lcm, prod
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.branches import Branch
from surgeon.errors import Code, SurgeonError, near
from surgeon.ir.program import Program

if TYPE_CHECKING:
    from surgeon.axes.meter import Meter

Measure = Literal["parameters", "flops", "bytes", "cache_bytes", "latency"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

SPLIT = ("kv_heads", "ffn", "width")
"""Roles whose indices tensor parallelism deals out: heads with all that is theirs, and widths
between a map that is split by rows and one that is split by columns."""


@dataclass(frozen=True)
class Budget:
    """What a selection must meet.

    Attributes:
        ratio: share of the measure to remove in all, or None for what `roles` give.
        roles: share of the indices of each axis of a role to remove.
        counted: parameters that the ratio is a share of, where parameters are what is measured.
        axes: names of the axes that may be cut.
        branches: names of the branches that may be dropped.
        params: names of the parameters whose weights a transform may set to zero or round; None
            for all.
        multiple_of: by axis name or role, what its kept count has to be a multiple of: both hold,
            and so does what `tensor_parallel` takes. An axis that isn't named may keep any number,
            and any may be left whole.
        measure: what the ratio is a share of: the counted parameters, or of the whole model the
            flops of one token's matrix products, the bytes of its parameters, the bytes that one
            token takes in the cache, or the time that a token takes.
        limits: by role, or glob over axis names, the largest share of an axis's indices that may
            go; the smallest of those that match holds. `layers` limits the share of the branches
            of a kind.
        tensor_parallel: number of devices that heads and inner widths are dealt out to: kept
            counts are multiples of it, and an axis whose size isn't one can't be left whole.
        clock: gives what tells how long a model takes, for the measure `latency`.
    """

    ratio: float | None = None
    roles: Mapping[str, float] = field(default_factory=dict[str, float])
    counted: tuple[str, ...] = ()
    axes: frozenset[str] = frozenset()
    branches: frozenset[str] = frozenset()
    params: frozenset[str] | None = None
    multiple_of: Mapping[str, int] = field(default_factory=dict[str, int])
    measure: Measure = "parameters"
    limits: Mapping[str, float] = field(default_factory=dict[str, float])
    tensor_parallel: int = 1
    clock: Callable[[Axes], Meter] | None = None

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        for name, share in self.limits.items():
            if not 0 <= share <= 1:  # false for NaN as well
                raise _bad("--limit", f"the limit {name}={share} is no share", "from 0 to 1")
        for name, number in self.multiple_of.items():
            if number < 1:
                raise _bad("--multiple-of", f"{name}={number} is no multiple", "1 or more")
        if self.tensor_parallel < 1:
            raise _bad("--tensor-parallel", f"{self.tensor_parallel} devices", "1 or more")
        if self.measure not in MEASURES:
            why = f"there is no measure {self.measure!r}"
            raise _bad("--measure", why, near(self.measure, MEASURES))

    def meter(self, axes: Axes) -> Meter:
        """Returns what tells how much of the measure is left.

        Raises:
            SurgeonError: `bad-option` for latency without a table of timings.
        """
        if self.measure != "latency":
            from surgeon.axes.meter import meter

            return meter(axes, self.measure, self.counted)
        if self.clock is None:
            try_ = "surgeon latency MODEL -o TABLE.json, then --latency TABLE.json"
            raise _bad("--measure latency", "there is no table of timings", try_)
        return self.clock(axes)

    def multiple(self, axis: Axis) -> int:
        """Returns what the kept count of an axis has to be a multiple of, if it is cut."""
        own = (self.multiple_of.get(name, 1) for name in (axis.name, axis.role))
        return lcm(*own, self.tensor_parallel if axis.role in SPLIT else 1)

    def limit(self, axis: Axis) -> float:
        """Returns the largest share of an axis's indices that may go."""
        found = [
            share
            for pattern, share in self.limits.items()
            if pattern == axis.role or fnmatchcase(axis.name, pattern)
        ]
        return min(found, default=1.0)

    def kept(self, axis: Axis, share: float = 1.0) -> NDArray[np.int64]:
        """Returns the counts that an axis may keep, most first; never none at all.

        Args:
            axis: one that may be cut.
            share: the largest share of its indices that may go, beside the budget's own limits.

        Raises:
            SurgeonError: `bad-option` where no count will do.
        """
        size, multiple = axis.size, self.multiple(axis)
        gone = floor(min(share, self.limit(axis)) * size + 1e-9)
        least = max(size - gone, axis.least)
        found = np.arange(size // multiple, ceil(least / multiple) - 1, -1) * multiple
        whole = size % self.tensor_parallel == 0 or axis.role not in SPLIT
        if size % multiple and whole:
            found = np.concatenate([[size], found])
        if not len(found):
            raise SurgeonError(
                Code.BAD_OPTION,
                f"there is no count that {axis.name} may keep",
                at=axis.name,
                why=f"it has {size} indices, at least {least} stay, and what stays has to be a "
                f"multiple of {multiple}",
                try_="a smaller --tensor-parallel or --multiple-of, or a larger --limit",
                data={"axis": axis.name, "size": size, "multiple": multiple, "least": least},
            )
        return found

    def unreachable(self, reached: float, why: str) -> SurgeonError:
        """Returns the refusal of a ratio that can't be met, with the nearest that can.

        Args:
            reached: the nearest share of the measure.
            why: what is in the way.
        """
        assert self.ratio is not None
        what = "counted parameters" if self.measure == "parameters" else self.measure
        if reached < self.ratio:
            most = floor(reached * 1000) / 1000
            try_ = f"a ratio up to {most:.3f}, other roles (--role layers=…), or less frozen"
        else:
            try_ = f"a ratio from {ceil(reached * 1000) / 1000:.3f}, or smaller shares"
        return SurgeonError(
            Code.BAD_RATIO,
            f"a ratio of {self.ratio:g} can't be met",
            at="--ratio",
            why=f"{why}: {reached:.4f} of the {what} would go",
            try_=try_,
            data={"reachable": reached, "measure": self.measure},
        )


def _bad(at: str, what: str, try_: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION, what, at=at, why="a selection has to meet it as it stands", try_=try_
    )


def decoder_params(axes: Axes) -> tuple[str, ...]:
    """Returns the parameters inside decoder layers, or every one where there are no layers."""
    layers = tuple(dict.fromkeys(b.layer for b in axes.branches))
    stored = [p.name for p in axes.program.params if p.kind in ("parameter", "buffer")]
    inside = [n for n in stored if any(not la or n.startswith(la + ".") for la in layers)]
    return tuple(inside if layers else stored)


def count(program: Program, names: Iterable[str]) -> int:
    """Returns the elements of some parameters of a program; those it lacks count as none."""
    sizes = (program.param[n].type.shape for n in names if n in program.param)
    return sum(prod(s for s in shape if isinstance(s, int)) for shape in sizes)


def _matches(patterns: Iterable[str], names: Iterable[str]) -> bool:
    return any(
        fnmatchcase(name, pattern) or name.startswith(pattern + ".")
        for pattern in patterns
        for name in names
    )


@dataclass(frozen=True)
class _Names:
    """What a glob may match of an axis or a branch: its own names, and its parameters."""

    own: tuple[str, ...]
    params: tuple[str, ...]

    @classmethod
    def of(cls, found: Axis | Branch) -> _Names:
        if isinstance(found, Axis):
            params = dict.fromkeys(m.param for m in found.members)
            return cls((found.name, found.scope, found.role), tuple(params))
        return cls((found.name, found.layer, "layers"), found.params)

    def touched(self, patterns: Iterable[str]) -> bool:
        """Whether pruning it would change anything that a pattern names."""
        return _matches(patterns, (*self.own, *self.params))

    def within(self, patterns: Iterable[str]) -> bool:
        """Whether pruning it changes nothing but what the patterns name."""
        return _matches(patterns, self.own) or (
            bool(self.params) and all(_matches(patterns, (name,)) for name in self.params)
        )


def allowed(
    axes: Axes, freeze: Iterable[str], only: Iterable[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the names of the axes and of the branches that may be pruned.

    Args:
        axes: the axes of the program.
        freeze: globs over axis names, roles, module paths and parameters that must stay whole.
        only: globs of the same kind; if given, nothing else is pruned: an axis that also runs
            through parameters outside, such as the residual width, is not.

    Raises:
        SurgeonError: `no-such-axis` where a glob matches nothing.
    """
    freeze, only = tuple(freeze), tuple(only)
    every = [_Names.of(found) for found in (*axes.axes, *axes.branches)]
    for pattern in (*freeze, *only):
        if not any(names.touched((pattern,)) for names in every):
            raise SurgeonError(
                Code.NO_SUCH_AXIS,
                f"{pattern!r} matches no axis",
                at=pattern,
                why="no axis, module path or parameter of this model matches it",
                try_=near(pattern, axes.by_name),
            )

    def may(found: Axis | Branch) -> bool:
        names = _Names.of(found)
        return (not only or names.within(only)) and not names.touched(freeze)

    return (
        frozenset(a.name for a in axes.axes if a.prunable and a.size > a.least and may(a)),
        frozenset(b.name for b in axes.branches if may(b)),
    )


def allowed_params(
    program: Program, freeze: Iterable[str], only: Iterable[str]
) -> frozenset[str] | None:
    """Returns the names of the parameters that may get other weights; None for all.

    Args:
        program: the program.
        freeze: globs over parameters and module paths that stay what they are. Those over axes and
            roles are about what is removed, and don't count here.
        only: globs of the same kind; if given, every other parameter stays what it is.
    """
    freeze, only = tuple(freeze), tuple(only)
    if not freeze and not only:
        return None
    return frozenset(
        p.name
        for p in program.params
        if not _matches(freeze, (p.name,)) and (not only or _matches(only, (p.name,)))
    )


def check_ratio(value: float, name: str) -> float:
    """Returns a share that lies strictly between 0 and 1.

    Raises:
        SurgeonError: `bad-ratio`.
    """
    if not 0 < value < 1:  # false for NaN as well
        raise SurgeonError(
            Code.BAD_RATIO,
            f"{name} is {value}",
            at=name,
            why="a ratio is the share that goes: more than 0 and less than 1",
            try_="such as 0.2 for 20 %",
            data={"value": value},
        )
    return value
