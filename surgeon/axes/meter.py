"""What is left of a measure, such as parameters or flops, under any counts of kept indices.

A measure is a sum of products of axis sizes. Multiplied out and collected they are a handful for
each layer, so that a selection can ask for thousands of combinations at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from surgeon.axes.axes import Axes
from surgeon.axes.costs import Costs
from surgeon.axes.plan import Plan
from surgeon.axes.space import Expr, Sum
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Program, Ref, op_refs

Counts = Mapping[str, Any]
"""Kept indices by axis: numbers, or arrays of one shape or shapes that broadcast."""

Clauses = frozenset[frozenset[str]]
"""When something goes: of each of these sets, one branch has to be dropped."""


class Part(Protocol):
    """A piece of a measure whose size depends on these axes and branches alone."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes."""
        ...

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches."""
        ...

    def left(self, kept: Counts, dropped: Collection[str] = ()) -> Any:
        """Returns what is left of it, a number or an array as the counts are.

        Args:
            kept: indices kept of its axes; an axis that isn't named keeps all.
            dropped: branches that go.
        """
        ...


class Meter(Protocol):
    """Tells what is left of a measure of the whole model."""

    @property
    def whole(self) -> float:
        """The measure of the model as it is."""
        ...

    def left(self, kept: Counts, dropped: Collection[str] = ()) -> Any:
        """Returns what is left of the measure; see `Part.left`."""
        ...

    def parts(
        self, axes: Collection[str], branches: Collection[str], kept: Counts | None = None
    ) -> tuple[Part, ...]:
        """Returns pieces that don't depend on each other's axes and branches.

        What depends on none of them is in no part, nor is what goes only when several branches do
        (a normaliser that two of them share): it is for `left` to count in the end.

        Args:
            axes: those whose counts are going to change.
            branches: those that may be dropped.
            kept: counts of other axes, which are fixed.
        """
        ...


def after(meter: Meter, plan: Plan) -> float:
    """Returns what is left of a measure after a plan."""
    return float(meter.left({found.axis: found.count for found in plan.cuts}, plan.branches))


@dataclass(frozen=True)
class Product:
    """A number times the sizes of some axes, there as long as its branches are.

    Attributes:
        number: the coefficient.
        axes: names, sorted; one may occur twice.
        goes: when it goes with branches; None where it never does.
    """

    number: float
    axes: tuple[str, ...]
    goes: Clauses | None = None

    def there(self, dropped: Collection[str]) -> bool:
        """Whether it is left when these branches are dropped."""
        if not dropped or self.goes is None:
            return True
        return any(clause.isdisjoint(dropped) for clause in self.goes)


@dataclass(frozen=True)
class Products:
    """A sum of products: a measure, or a part of one.

    Attributes:
        sizes: of every axis, by name.
        products: the addends.
        axes: those that may change, where it is a part.
        branches: those that may be dropped, likewise.
        fixed: counts of other axes.
    """

    sizes: Mapping[str, int]
    products: tuple[Product, ...]
    axes: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    fixed: Counts = field(default_factory=dict[str, int])

    @property
    def whole(self) -> float:
        """The sum for all sizes as they are."""
        return float(self.left({}))

    def left(self, kept: Counts, dropped: Collection[str] = ()) -> Any:
        """Returns the sum for other sizes; see `Part.left`."""
        gone = frozenset(dropped)
        total: Any = 0
        for product in self.products:
            if not product.there(gone):
                continue
            value: Any = product.number
            for name in product.axes:
                found = kept.get(name)
                value = value * (self.fixed.get(name, self.sizes[name]) if found is None else found)
            total = total + value
        return total

    def parts(
        self, axes: Collection[str], branches: Collection[str], kept: Counts | None = None
    ) -> tuple[Products, ...]:
        """Returns the pieces that don't depend on each other; see `Meter.parts`."""
        parent: dict[str, str] = {}

        def root(name: str) -> str:
            while parent.setdefault(name, name) != name:
                name = parent[name]
            return name

        owned: list[tuple[Product, str]] = []
        for product in self.products:
            single = [next(iter(c)) for c in product.goes or () if len(c) == 1]
            drop = single if product.goes is not None and len(product.goes) == 1 else []
            names = [
                *(f"axis {n}" for n in dict.fromkeys(product.axes) if n in axes),
                *(f"branch {n}" for n in drop if n in branches),
            ]
            for name in names[1:]:
                parent[root(name)] = root(names[0])
            if names:
                owned.append((product, names[0]))
        groups: dict[str, list[Product]] = {}
        for product, name in owned:
            groups.setdefault(root(name), []).append(product)
        members: dict[str, list[str]] = {}
        for name in list(parent):
            members.setdefault(root(name), []).append(name)
        return tuple(
            Products(
                self.sizes,
                tuple(found),
                tuple(n.removeprefix("axis ") for n in members[key] if n.startswith("axis ")),
                tuple(n.removeprefix("branch ") for n in members[key] if n.startswith("branch ")),
                kept or {},
            )
            for key, found in groups.items()
        )


def meter(axes: Axes, measure: str, counted: Iterable[str]) -> Products:
    """Returns what tells how much of a measure is left.

    Args:
        axes: of the model.
        measure: `parameters`, of those counted; `flops` of one token's matrix products, `bytes` of
            parameters, or `cache_bytes` of one token, of the whole model.
        counted: names of parameters.
    """
    going = _Going(axes)
    found: dict[tuple[tuple[str, ...], Clauses | None], float] = {}
    for number, exprs, goes in _terms(axes, measure, counted, going):
        for coefficient, names in _expanded(axes, tuple(f for expr in exprs for f in expr)):
            key = tuple(sorted(names)), goes
            found[key] = found.get(key, 0.0) + number * coefficient
    products = tuple(Product(number, *key) for key, number in found.items() if number)
    return Products({axis.name: axis.size for axis in axes.axes}, products)


def _terms(
    axes: Axes, measure: str, counted: Iterable[str], going: _Going
) -> Iterator[tuple[float, tuple[Expr, ...], Clauses | None]]:
    if measure == "parameters":
        for name in counted:
            yield 1.0, axes.param_dims(name), going.param(name)
        return
    for unit, exprs, param, op in Costs(axes).products(measure):
        yield float(unit), exprs, going.param(param) if param else going.ops[op]


def _expanded(axes: Axes, expr: Expr) -> Iterator[tuple[float, tuple[str, ...]]]:
    """Yields an expression's size multiplied out: numbers, and the axes each is multiplied with."""
    if not expr:
        yield 1.0, ()
        return
    first, rest = expr[0], tuple(_expanded(axes, expr[1:]))
    heads: list[tuple[float, tuple[str, ...]]] = []
    if isinstance(first, Sum):
        heads = [found for part in first.parts for found in _expanded(axes, part)]
    elif first in axes.numbered:
        heads = [(1.0, (axes.numbered[first].name,))]
    else:
        size = axes.sizes[first]
        if not isinstance(size, int):
            raise SurgeonError(
                Code.BAD_PROGRAM,
                f"the size {size} can't be counted",
                at=str(size),
                why="it is known at run time only",
                try_="another measure",
            )
        heads = [(float(size), ())]
    for number, names in heads:
        for other, others in rest:
            yield number * other, (*names, *others)


class _Going:
    """Which branches have to be dropped for an operation or a parameter to go."""

    def __init__(self, axes: Axes) -> None:
        self._program: Program = axes.program
        self._branch = {(b.add, b.operand): b.name for b in axes.branches}
        self.ops: list[Clauses | None] = [None] * len(axes.program.ops)
        self._users: dict[str, list[tuple[int, int]]] = {}
        for index, op in enumerate(axes.program.ops):
            direct = {arg.name for arg in op.args if isinstance(arg, Ref)}
            for operand, arg in enumerate(op.args):
                if isinstance(arg, Ref):
                    self._users.setdefault(arg.name, []).append((index, operand))
            for ref in op_refs(op):
                if isinstance(ref, Ref) and ref.name not in direct:
                    self._users.setdefault(ref.name, []).append((index, -1))
        returned = set(axes.program.outputs)
        for index in range(len(self.ops) - 1, -1, -1):
            outputs = axes.program.ops[index].outputs
            if returned.isdisjoint(outputs):
                uses = [use for name in outputs for use in self._users.get(name, ())]
                self.ops[index] = _all(self._use(*use) for use in uses)

    def _use(self, op: int, operand: int) -> Clauses | None:
        branch = self._branch.get((op, operand))
        if branch is None:
            return self.ops[op]
        if self.ops[op] is None:
            return frozenset({frozenset({branch})})
        return frozenset(clause | {branch} for clause in self.ops[op] or ())

    def param(self, name: str) -> Clauses | None:
        """Returns when a parameter goes: with all that read it."""
        return _all(self.ops[index] for index in self._program.readers.get(name, ()))


def _all(found: Iterable[Clauses | None]) -> Clauses | None:
    """Returns when all of these go."""
    out: set[frozenset[str]] = set()
    for clauses in found:
        if clauses is None:
            return None
        out |= clauses
    return frozenset(out) or None
