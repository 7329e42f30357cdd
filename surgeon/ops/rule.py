"""What an operation's rule is, and the registry that finds them: here, and in plug-ins."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Protocol

from surgeon.ir.program import Arg, Op, ParamRef, Program, Ref, Size
from surgeon.ops.plugins import import_rules

if TYPE_CHECKING:
    # The axes need the rules' gauges: imported here at run time, neither could be imported first.
    from surgeon.axes.space import Expr

Atoms = frozenset[int]


class Gauge(IntEnum):
    """Changes of basis that an operation commutes with, from none to any invertible map."""

    FIXED = 0
    PERMUTATION = 1
    SIGNED = 2
    PAIRWISE = 3
    ROTATION = 4
    ANY = 5

    def meet(self, other: Gauge) -> Gauge:
        """Returns what both allow. A pair's rotations and signs share permutations only."""
        low, high = min(self, other), max(self, other)
        if (low, high) == (Gauge.SIGNED, Gauge.PAIRWISE):
            return Gauge.PERMUTATION
        return low

    @property
    def text(self) -> str:
        """The gauge as users read it."""
        return {
            Gauge.FIXED: "none",
            Gauge.PERMUTATION: "permutation",
            Gauge.SIGNED: "signed permutation",
            Gauge.PAIRWISE: "rotation of each pair",
            Gauge.ROTATION: "rotation",
            Gauge.ANY: "any invertible map",
        }[self]


class Context(Protocol):
    """What a rule sees of one operation while axes are derived.

    Expressions of operands and results are lists, one expression a dimension.
    """

    op: Op
    program: Program

    def dims(self, arg: Arg) -> tuple[Expr, ...]:
        """The expressions of an operand's dimensions."""
        ...

    def shape(self, arg: Arg) -> tuple[Size, ...]:
        """The sizes of an operand's dimensions."""
        ...

    def out(self, index: int = 0) -> tuple[Expr, ...]:
        """The expressions of a result's dimensions."""
        ...

    def fresh(self, size: Size, label: str) -> Expr:
        """A new axis of this operation, kept under `label` for rebuilding literals."""
        ...

    def equate(self, left: Expr, right: Expr) -> None:
        """Couples two expressions; where they can't be, both are pinned with the reason."""
        ...

    def use(self, expr: Expr, kind: str, gauge: Gauge) -> None:
        """Records what use the operation makes of the axes of an expression."""
        ...

    def pin(self, expr: Expr, why: str) -> None:
        """Keeps the axes of an expression from being pruned."""
        ...

    def least(self, expr: Expr, count: int) -> None:
        """Records that no fewer than `count` indices of an expression may be left."""
        ...

    def tag(self, expr: Expr, tag: str) -> None:
        """Records a fact from which roles are derived."""
        ...


class Flow(Protocol):
    """What a rule sees of one operation while masked channels are followed through it.

    A value *vanishes* on an axis if masking a channel of the axis makes that channel zero, in
    every appearance of the axis: a square tensor carries one axis twice.
    """

    op: Op

    def carried(self, arg: Arg) -> Atoms:
        """Axes that an operand carries."""
        ...

    def rank(self, arg: Arg) -> int:
        """Number of dimensions of an operand."""
        ...

    def at(self, arg: Arg, dim: int) -> Atoms:
        """Axes within one dimension of an operand."""
        ...

    def out(self) -> tuple[Atoms, ...]:
        """Axes within each dimension of the (first) result."""
        ...

    def zero(self, arg: Arg) -> Atoms:
        """Axes on which an operand vanishes, wherever in it they appear."""
        ...

    def perhaps(self, arg: Arg) -> Atoms:
        """Axes on which an operand vanishes in at least one of their appearances, or might."""
        ...

    def inexact(self, atoms: Atoms, why: str) -> None:
        """Records that removal along these axes is not what masking gives."""
        ...

    def normalised(self, atoms: Atoms) -> None:
        """Records that this operation averages over these axes."""
        ...


class Rebuild(Protocol):
    """What a rule sees of one operation while literals are rebuilt for smaller axes."""

    op: Op
    program: Program

    def shape(self, index: int = 0) -> tuple[Size, ...]:
        """The new shape of a result."""
        ...

    def operand(self, arg: Arg) -> tuple[Size, ...]:
        """The new shape of an operand."""
        ...

    def label(self, name: str) -> int:
        """The new size of the axis that analysis made under this label."""
        ...


def vanishing(f: Flow, arg: Arg, dim: int) -> Atoms:
    """Returns the axes of one dimension of an operand on which it vanishes."""
    if not isinstance(arg, Ref | ParamRef) or not -f.rank(arg) <= dim < f.rank(arg):
        return frozenset()
    return f.at(arg, dim) & f.zero(arg)


def wherever(f: Flow, found: Sequence[Atoms]) -> Atoms:
    """Returns the axes on which a result vanishes that does so, dimension by dimension, on `found`.

    An axis that one dimension carries without vanishing there is none of them.
    """
    out: Atoms = frozenset()
    broken: Atoms = frozenset()
    for carried, zero in zip(f.out(), found, strict=True):
        out |= carried & zero
        broken |= carried - zero
    return out - broken


Analyse = Callable[[Context], None]
Vanish = Callable[[Flow], Atoms]
Literals = Callable[[Rebuild], Op]


@dataclass(frozen=True)
class OpRule:
    """The rule of one operation: coupling, masked channels, and literal sizes."""

    target: str
    analyse: Analyse
    vanish: Vanish
    rebuild: Literals | None = None


_RULES: dict[str, OpRule] = {}


def rule(
    *targets: str, vanish: Vanish, rebuild: Literals | None = None
) -> Callable[[Analyse], Analyse]:
    """Registers the decorated function as the coupling rule of the named operations."""

    def register(analyse: Analyse) -> Analyse:
        for target in targets:
            if target in _RULES:
                raise ValueError(f"{target} has two rules")
            _RULES[target] = OpRule(target, analyse, vanish, rebuild)
        return analyse

    return register


@cache
def rules() -> dict[str, OpRule]:
    """Returns every rule by operation: of this folder's files, then of plug-ins' folders `ops`."""
    package = importlib.import_module("surgeon.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"surgeon.ops.{module.name}")
    import_rules(_RULES)
    return _RULES


def axis_of(dim: Arg, rank: int) -> int:
    """Returns a dimension argument as a non-negative index."""
    if not isinstance(dim, int):
        raise TypeError(f"{dim!r} is no dimension")
    return dim % rank if rank else 0
