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
    """

    ratio: float | None = None
    roles: Mapping[str, float] = field(default_factory=dict[str, float])
    counted: tuple[str, ...] = ()
    axes: frozenset[str] = frozenset()
    branches: frozenset[str] = frozenset()


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


def axis_names(axis: Axis) -> tuple[str, ...]:
    """Returns what a glob may match of an axis: its name, scope, role and its parameters."""
    return (axis.name, axis.scope, axis.role, *(m.param for m in axis.members))


def branch_names(branch: Branch) -> tuple[str, ...]:
    """Returns what a glob may match of a branch: its name, its layer and its parameters."""
    return (branch.name, branch.layer, "layers", *branch.params)


def allowed(
    axes: Axes, freeze: Iterable[str], only: Iterable[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Returns the names of the axes and of the branches that may be pruned.

    Args:
        axes: the axes of the program.
        freeze: globs over axis names, roles, module paths and parameters that must stay whole.
        only: globs of the same kind; if given, nothing else is pruned.

    Raises:
        SurgeonError: `no-such-axis` where a glob matches nothing.
    """
    freeze, only = tuple(freeze), tuple(only)
    every = [axis_names(a) for a in axes.axes] + [branch_names(b) for b in axes.branches]
    for pattern in (*freeze, *only):
        if not any(_matches((pattern,), names) for names in every):
            raise SurgeonError(
                Code.NO_SUCH_AXIS,
                f"{pattern!r} matches no axis",
                at=pattern,
                why="no axis, module path or parameter of this model matches it",
                try_=near(pattern, axes.by_name),
            )

    def may(names: tuple[str, ...]) -> bool:
        return (not only or _matches(only, names)) and not _matches(freeze, names)

    return (
        frozenset(a.name for a in axes.axes if a.prunable and a.size > 1 and may(axis_names(a))),
        frozenset(b.name for b in axes.branches if may(branch_names(b))),
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
