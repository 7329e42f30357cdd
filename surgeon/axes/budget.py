"""How much is to go, and from where: what a selection is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.branches import Branch
from surgeon.errors import Code, SurgeonError, near
from surgeon.ir.program import Program


@dataclass(frozen=True)
class Budget:
    """What a selection must meet.

    Attributes:
        ratio: share of the counted parameters to remove in all, or None for what `roles` give.
        roles: share of the indices of each axis of a role to remove.
        counted: parameters that the ratio is a share of.
        axes: names of the axes that may be cut.
        branches: names of the branches that may be dropped.
        multiple_of: by axis name, what the target wants its kept count to be a multiple of; an
            axis that isn't named may keep any number.
    """

    ratio: float | None = None
    roles: Mapping[str, float] = field(default_factory=dict[str, float])
    counted: tuple[str, ...] = ()
    axes: frozenset[str] = frozenset()
    branches: frozenset[str] = frozenset()
    multiple_of: Mapping[str, int] = field(default_factory=dict[str, int])


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
        frozenset(a.name for a in axes.axes if a.prunable and a.size > 1 and may(a)),
        frozenset(b.name for b in axes.branches if may(b)),
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
