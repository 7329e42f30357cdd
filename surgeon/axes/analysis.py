"""From a program to its axes: every rule applied, every fact settled."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from surgeon.axes.space import Clash, Expr, Extent, Factor, Space, Sum, leaves
from surgeon.ir.program import Arg, Op, ParamRef, Program, Ref, Size, op_refs
from surgeon.ops.rule import Atoms, Gauge, OpRule, rules

SlotKey = tuple[str, int]
"""A tensor (`%value` or `$parameter`) and one of its dimensions."""


def key(ref: Arg) -> str:
    """Returns the name of a tensor with its sigil."""
    if isinstance(ref, Ref):
        return "%" + ref.name
    if isinstance(ref, ParamRef):
        return "$" + ref.name
    raise TypeError(f"{ref!r} is no tensor")


@dataclass(frozen=True, slots=True)
class Equation:
    """Two expressions that the operation `op` makes equal."""

    op: int
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class PinFact:
    """Axes of an expression that must stay, why, and at which operation (-1: an interface)."""

    expr: Expr
    why: str
    op: int


@dataclass(frozen=True, slots=True)
class UseFact:
    """A use an operation makes of the axes of an expression."""

    expr: Expr
    kind: str
    gauge: Gauge
    op: int


@dataclass
class Facts:
    """Everything the rules said, before it is settled into axes."""

    program: Program
    space: Space = field(default_factory=Space)
    slots: dict[SlotKey, int] = field(default_factory=dict[SlotKey, int])
    labels: dict[tuple[int, str], Expr] = field(default_factory=dict[tuple[int, str], Expr])
    equations: list[Equation] = field(default_factory=list[Equation])
    failed: list[tuple[Equation, str]] = field(default_factory=list[tuple[Equation, str]])
    pins: list[PinFact] = field(default_factory=list[PinFact])
    uses: list[UseFact] = field(default_factory=list[UseFact])
    tags: list[tuple[Expr, str]] = field(default_factory=list[tuple[Expr, str]])
    floors: list[tuple[Expr, int, int]] = field(default_factory=list[tuple[Expr, int, int]])
    barriers: list[int] = field(default_factory=list[int])

    def dims(self, name: str) -> tuple[Expr, ...]:
        """Returns the expressions of a tensor's dimensions, unresolved."""
        out: list[Expr] = []
        while (name, len(out)) in self.slots:
            out.append((self.slots[name, len(out)],))
        return tuple(out)


class _Context:
    """The view of one operation that a rule couples through."""

    def __init__(self, facts: Facts, index: int) -> None:
        self._facts, self._index = facts, index
        self.program = facts.program
        self.op: Op = facts.program.ops[index]

    def dims(self, arg: Arg) -> tuple[Expr, ...]:
        return self._facts.dims(key(arg))

    def shape(self, arg: Arg) -> tuple[Size, ...]:
        return self.program.type_of(arg).shape

    def out(self, index: int = 0) -> tuple[Expr, ...]:
        return self._facts.dims("%" + self.op.outputs[index])

    def fresh(self, size: Size, label: str) -> Expr:
        expr: Expr = (self._facts.space.fresh(size),)
        self._facts.labels[self._index, label] = expr
        return expr

    def equate(self, left: Expr, right: Expr) -> None:
        equation = Equation(self._index, left, right)
        self._facts.equations.append(equation)
        try:
            self._facts.space.unify(left, right)
        except Clash as clash:
            self._facts.failed.append((equation, str(clash)))

    def use(self, expr: Expr, kind: str, gauge: Gauge) -> None:
        self._facts.uses.append(UseFact(expr, kind, gauge, self._index))

    def pin(self, expr: Expr, why: str) -> None:
        self._facts.pins.append(PinFact(expr, why, self._index))

    def least(self, expr: Expr, count: int) -> None:
        self._facts.floors.append((expr, count, self._index))

    def tag(self, expr: Expr, tag: str) -> None:
        self._facts.tags.append((expr, tag))


def _new_slots(facts: Facts, name: str, shape: tuple[Size, ...]) -> None:
    for dim, size in enumerate(shape):
        facts.slots[name, dim] = facts.space.fresh(size)


def _barrier(facts: Facts, index: int, op: Op) -> None:
    facts.barriers.append(index)
    for name in (*(key(r) for r in op_refs(op)), *("%" + o for o in op.outputs)):
        for expr in facts.dims(name):
            facts.pins.append(PinFact(expr, f"no axis rule for {op.target}", index))


def derive(program: Program, table: dict[str, OpRule] | None = None) -> Facts:
    """Returns everything the operations' rules say of `program`.

    Args:
        program: a well-formed program.
        table: the rules by operation; by default those of `surgeon.ops`.
    """
    table = rules() if table is None else table
    facts = Facts(program)
    for p in program.params:
        _new_slots(facts, "$" + p.name, p.type.shape)
    for given in program.inputs:
        _new_slots(facts, "%" + given.name, given.type.shape)
    for index, op in enumerate(program.ops):
        for name, type_ in zip(op.outputs, op.types, strict=True):
            _new_slots(facts, "%" + name, type_.shape)
        found = table.get(op.target)
        if found is None:
            _barrier(facts, index, op)
        else:
            found.analyse(_Context(facts, index))
    for kind, names in (("input", [i.name for i in program.inputs]), ("output", program.outputs)):
        for name in names:
            for dim, expr in enumerate(facts.dims("%" + name)):
                why = f"it is dimension {dim} of the model's {kind} {name}"
                facts.pins.append(PinFact(expr, why, -1))
    _settle_failures(facts)
    return facts


def _settle_failures(facts: Facts) -> None:
    """Pins what a failed equation may have touched, whatever the order of equations was.

    Which of several contradictory equations fails depends on their order; the axes that any
    chain of equations connects with them do not, so all of those are pinned.
    """
    if not facts.failed:
        return
    group: dict[int, int] = {}

    def find(axis: int) -> int:
        while group.setdefault(axis, axis) != axis:
            group[axis] = group[group[axis]]
            axis = group[axis]
        return axis

    for equation in facts.equations:
        found = [*leaves(equation.left), *leaves(equation.right)]
        found += leaves(facts.space.resolve(equation.left))
        found += leaves(facts.space.resolve(equation.right))
        for axis in found[1:]:
            group[find(axis)] = find(found[0])
    bad: dict[int, tuple[str, int]] = {}
    for equation, why in facts.failed:
        for axis in (*leaves(equation.left), *leaves(equation.right)):
            bad.setdefault(find(axis), (why, equation.op))
    for axis in list(group):
        reason = bad.get(find(axis))
        if reason:
            facts.pins.append(PinFact((axis,), reason[0], reason[1]))


class _Flow:
    """The view of one operation through which masked channels are followed."""

    def __init__(self, follow: MaskFlow, index: int) -> None:
        self._follow, self._index = follow, index
        self.op = follow.facts.program.ops[index]

    def rank(self, arg: Arg) -> int:
        return len(self._follow.facts.dims(key(arg)))

    def carried(self, arg: Arg) -> Atoms:
        return self._follow.carried(key(arg))

    def at(self, arg: Arg, dim: int) -> Atoms:
        exprs = self._follow.facts.dims(key(arg))
        return frozenset(leaves(self._follow.facts.space.resolve(exprs[dim])))

    def out(self) -> tuple[Atoms, ...]:
        space = self._follow.facts.space
        exprs = self._follow.facts.dims("%" + self.op.outputs[0])
        return tuple(frozenset(leaves(space.resolve(expr))) for expr in exprs)

    def perhaps(self, arg: Arg) -> Atoms:
        if not isinstance(arg, Ref | ParamRef):
            return frozenset()
        space = self._follow.facts.space
        exprs = self._follow.facts.dims(key(arg))
        count = Counter(a for expr in exprs for a in leaves(space.resolve(expr)))
        return self.zero(arg) | {atom for atom, n in count.items() if n > 1}

    def zero(self, arg: Arg) -> Atoms:
        if not isinstance(arg, Ref | ParamRef):
            return frozenset()
        if isinstance(arg, ParamRef):
            return self.carried(arg)
        return self._follow.zero.get(arg.name, frozenset())

    def inexact(self, atoms: Atoms, why: str) -> None:
        for atom in atoms:
            self._follow.inexact.setdefault(atom, []).append((why, self._index))

    def normalised(self, atoms: Atoms) -> None:
        for atom in atoms:
            self._follow.normalisers.setdefault(atom, []).append(self._index)


class MaskFlow:
    """Where masked channels vanish, where removal differs from masking, what is averaged."""

    def __init__(self, facts: Facts, table: dict[str, OpRule] | None = None) -> None:
        self.facts = facts
        self.zero: dict[str, Atoms] = {}
        self.inexact: dict[int, list[tuple[str, int]]] = {}
        self.normalisers: dict[int, list[int]] = {}
        self._carried: dict[str, Atoms] = {}
        table = rules() if table is None else table
        for index, op in enumerate(facts.program.ops):
            found = table.get(op.target)
            zero: Atoms = found.vanish(_Flow(self, index)) if found else frozenset()
            for name in op.outputs:
                self.zero[name] = zero & self.carried("%" + name)

    def carried(self, name: str) -> Atoms:
        """Returns the axes that a tensor carries."""
        if name not in self._carried:
            space = self.facts.space
            found = (a for e in self.facts.dims(name) for a in leaves(space.resolve(e)))
            self._carried[name] = frozenset(found)
        return self._carried[name]


def renamed(expr: Expr, names: dict[int, int]) -> Expr:
    """Returns `expr` with its axes replaced by other numbers."""
    out: list[Factor] = []
    for factor in expr:
        if isinstance(factor, Sum):
            out.append(Sum(tuple(renamed(part, names) for part in factor.parts)))
        else:
            out.append(names[factor])
    return tuple(out)


def extent_number(extent: Extent) -> int | str:
    """Returns a size as a number, or as text where it is dynamic."""
    return str(extent) if extent.dynamic else extent.number
