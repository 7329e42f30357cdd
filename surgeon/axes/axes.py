"""Axes as users see them: named, with role, members, pins, uses and gauge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from surgeon.axes.branches import Branch
from surgeon.axes.space import Expr, Sum, leaves, occurrences
from surgeon.errors import Code, SurgeonError, near
from surgeon.ir.program import Program
from surgeon.ops.rule import Gauge

if TYPE_CHECKING:
    import networkx as nx

    from surgeon.axes.analysis import Facts
    from surgeon.axes.explanation import Explanation


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is so, and the operation (its place in words) that makes it so."""

    why: str
    where: str


@dataclass(frozen=True, slots=True)
class Member:
    """One dimension of one parameter that carries an axis."""

    param: str
    dim: int

    def __str__(self) -> str:
        return f"{self.param}:{self.dim}"


@dataclass(frozen=True, slots=True)
class Axis:
    """A set of channels that are one and the same thing wherever they appear.

    Attributes:
        name: unique; scope, slash, role.
        role: what the operations say it is.
        size: number of indices.
        scope: longest common module path of its members.
        members: the parameter dimensions that carry it.
        outer: axes that enclose it wherever it appears: its indices may be chosen anew for each
            of theirs, as long as the counts agree.
        pins: why it can't be pruned; empty if it can.
        inexact: why removing differs from masking; empty if it doesn't.
        normalisers: operations that average over it.
        gauge: the changes of basis that every use commutes with.
        uses: the kinds of use made of it.
        least: how many of its indices have to stay: what a top-k chooses among them.
    """

    name: str
    role: str
    size: int
    scope: str
    members: tuple[Member, ...]
    outer: tuple[str, ...] = ()
    pins: tuple[Reason, ...] = ()
    inexact: tuple[Reason, ...] = ()
    normalisers: tuple[int, ...] = ()
    gauge: Gauge = Gauge.ANY
    uses: tuple[str, ...] = ()
    least: int = 1

    @property
    def prunable(self) -> bool:
        """Whether nothing pins it."""
        return not self.pins

    @property
    def exact(self) -> bool:
        """Whether removing it gives what masking gives."""
        return not self.inexact

    def __str__(self) -> str:
        return self.name

    def _repr_html_(self) -> str:
        from surgeon.axes.words import axis_html

        return axis_html(self)


@dataclass(frozen=True)
class Axes:
    """The axes of a program.

    `dims` gives every tensor's dimensions (`$parameter`, `%value`) as expressions over numbers
    that index `numbered`; dynamic and nameless ones have no axis there.
    """

    program: Program
    axes: tuple[Axis, ...]
    branches: tuple[Branch, ...]
    dims: Mapping[str, tuple[Expr, ...]]
    numbered: Mapping[int, Axis]
    sizes: Mapping[int, int | str]
    labels: Mapping[tuple[int, str], Expr]
    facts: Facts

    @cached_property
    def graph(self) -> nx.Graph[Any]:
        """The coupling graph: its components are the axes, its shortest paths the proofs.

        A plain `networkx.Graph`. A node is a `surgeon.axes.graph.Place` (`tensor`, `dim`,
        `position`): `$name` is a parameter, `%name` a value. Node attribute `axis` is the number
        of its axis (`numbered[n]` is the `Axis`; a dynamic size has none). Edge attribute `op` is
        the index in `program.ops` of the operation that makes both ends one axis.
        """
        from surgeon.axes.graph import coupling_graph

        return coupling_graph(self.facts)

    @cached_property
    def by_name(self) -> Mapping[str, Axis]:
        """Axes by name."""
        return {axis.name: axis for axis in self.axes}

    @cached_property
    def number(self) -> Mapping[str, int]:
        """Axis numbers by name."""
        return {axis.name: n for n, axis in self.numbered.items()}

    @cached_property
    def roles(self) -> tuple[str, ...]:
        """The roles that occur, in order of first appearance; `layers` where there are branches."""
        found = dict.fromkeys(axis.role for axis in self.axes)
        return (*found, *(("layers",) if self.branches else ()))

    def of_role(self, role: str) -> tuple[Axis, ...]:
        """Returns the axes of one role; `qk` means rotary pairs and the rest of the width."""
        wanted = ("qk", "rotary") if role == "qk" else (role,)
        return tuple(axis for axis in self.axes if axis.role in wanted)

    def get(self, name: str) -> Axis:
        """Returns the axis of this name.

        Raises:
            SurgeonError: `no-such-axis`, with the nearest names.
        """
        if name not in self.by_name:
            raise SurgeonError(
                Code.NO_SUCH_AXIS,
                f"there is no axis {name!r}",
                at=name,
                why="no axis of this model has that name",
                try_=near(name, self.by_name),
            )
        return self.by_name[name]

    def axis(self, name: str) -> Axis:
        """Returns the axis that a name, a unique end or part of one, or a glob stands for.

        Raises:
            SurgeonError: `no-such-axis`, with the nearest names, or all that it could be.
        """
        from surgeon.axes.names import find_axis

        return find_axis(self, name)

    def members(self, name: str) -> tuple[Member, ...]:
        """Returns the parameter dimensions that carry an axis, found as by `axis`."""
        return self.axis(name).members

    def explain(self, a: str, b: str | None = None, *, channel: int | None = None) -> Explanation:
        """Returns why `a` and `b` are coupled; of `a` alone what goes with it and what pins it.

        Args:
            a: an axis, or a dimension of a parameter such as `layers.3.self_attn.k_proj.weight:0`.
            b: another one.
            channel: the index that goes.

        Raises:
            SurgeonError: `no-such-axis` or `bad-option`.
        """
        from surgeon.axes.explain import explain

        return explain(self, a, b, channel=channel)

    def _repr_html_(self) -> str:
        from surgeon.axes.words import axes_html

        return axes_html(self)

    def param_dims(self, param: str) -> tuple[Expr, ...]:
        """Returns a parameter's dimensions as expressions."""
        return self.dims["$" + param]

    def text(self, expr: Expr) -> str:
        """Returns an expression in words: `kv_heads:3 × (rotary:4 + rotary:4)`."""
        parts: list[str] = []
        for factor in expr:
            if isinstance(factor, Sum):
                parts.append("(" + " + ".join(self.text(part) for part in factor.parts) + ")")
            else:
                axis = self.numbered.get(factor)
                parts.append(f"{axis.name if axis else f'#{factor}'}:{self.sizes[factor]}")
        return " × ".join(parts) or "1"

    def carriers(self, axis: Axis) -> tuple[tuple[str, int], ...]:
        """Returns the (parameter, dimension) pairs that carry an axis."""
        return tuple((m.param, m.dim) for m in axis.members)

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data, expressions as text."""
        return {
            "axes": [
                {
                    "name": axis.name,
                    "role": axis.role,
                    "size": axis.size,
                    "scope": axis.scope,
                    "prunable": axis.prunable,
                    "exact": axis.exact,
                    "pins": [f"{r.why} ({r.where})" if r.where else r.why for r in axis.pins],
                    "inexact": [f"{r.why} ({r.where})" for r in axis.inexact],
                    "gauge": axis.gauge.text,
                    "uses": list(axis.uses),
                    "outer": list(axis.outer),
                    **({"least": axis.least} if axis.least > 1 else {}),
                    "members": [
                        {
                            "param": m.param,
                            "dim": m.dim,
                            "expr": self.text(self.param_dims(m.param)[m.dim]),
                        }
                        for m in axis.members
                    ],
                }
                for axis in self.axes
            ],
            "branches": [
                {"name": b.name, "kind": b.kind, "layer": b.layer, "params": list(b.params)}
                for b in self.branches
            ],
            "params": {
                p.name: {
                    "shape": list(p.type.shape),
                    "dims": [self.text(expr) for expr in self.param_dims(p.name)],
                }
                for p in self.program.params
            },
        }


def to_text(axes: Axes) -> str:
    """Returns the axes as text, one axis and one parameter a line: the form of golden files."""
    lines: list[str] = []
    for axis in axes.axes:
        line = f"{axis.name} : {axis.size} {axis.role}, {axis.gauge.text}"
        if axis.least > 1:
            line += f", at least {axis.least}"
        if axis.outer:
            line += ", within " + " × ".join(axis.outer)
        if axis.inexact:
            line += ", inexact: " + "; ".join(dict.fromkeys(r.why for r in axis.inexact))
        if axis.pins:
            line += ", pinned: " + "; ".join(dict.fromkeys(r.why for r in axis.pins))
        lines.append(line)
    lines.append("")
    for p in axes.program.params:
        dims = ", ".join(axes.text(expr) for expr in axes.param_dims(p.name))
        lines.append(f"{p.name} [{dims}]")
    if axes.branches:
        lines.append("")
        lines += [f"{b.name} owns {', '.join(b.params)}" for b in axes.branches]
    return "\n".join(lines) + "\n"


def outers(exprs: list[Expr], axis: int) -> tuple[int, ...]:
    """Returns the axes that enclose `axis` in every one of its occurrences, outermost first."""
    common: tuple[int, ...] | None = None
    for expr in exprs:
        for found, outer in occurrences(expr):
            if found != axis:
                continue
            common = outer if common is None else tuple(a for a in common if a in outer)
    return common or ()


def atoms(exprs: tuple[Expr, ...]) -> set[int]:
    """Returns the axes that some expressions carry."""
    return {a for expr in exprs for a in leaves(expr)}
