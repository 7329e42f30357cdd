"""Axis expressions and their unification: the algebra by which dimensions are coupled."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Extent:
    """A size as a monomial: a number times dynamic symbols (sorted)."""

    number: int
    symbols: tuple[str, ...] = ()

    @classmethod
    def of(cls, size: int | str) -> Extent:
        """Returns the monomial of a size; an expression that is none is one opaque symbol."""
        if isinstance(size, int):
            return cls(size)
        parts = [part.strip() for part in size.split("*")]
        if all(re.fullmatch(r"\w+", part) for part in parts):
            number = prod(int(part) for part in parts if part.isdigit())
            return cls(number, tuple(sorted(part for part in parts if not part.isdigit())))
        return cls(1, (size,))

    @property
    def dynamic(self) -> bool:
        """Whether any part of the size is known only at run time."""
        return bool(self.symbols)

    @property
    def one(self) -> bool:
        """Whether the size is exactly one: the empty product."""
        return self.number == 1 and not self.symbols

    def over(self, other: Extent) -> Extent | None:
        """Returns the exact quotient, or None where `other` does not divide this size."""
        if other.number == 0 or self.number % other.number:
            return None
        left = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in left:
                return None
            left.remove(symbol)
        return Extent(self.number // other.number, tuple(left))

    def times(self, other: Extent) -> Extent:
        """Returns the product of two sizes."""
        return Extent(self.number * other.number, tuple(sorted(self.symbols + other.symbols)))

    def __str__(self) -> str:
        if not self.symbols:
            return str(self.number)
        head = [str(self.number)] if self.number != 1 else []
        factors = head + list(self.symbols)
        if len(factors) == 1:
            return factors[0]
        return "*".join(f if re.fullmatch(r"\w+", f) else f"({f})" for f in factors)


@dataclass(frozen=True, slots=True)
class Sum:
    """A concatenation of expressions along one dimension."""

    parts: tuple[Expr, ...]


Factor = int | Sum
Expr = tuple[Factor, ...]
"""An ordered product, outermost first; the empty product is 1. An integer names an axis."""


class Clash(Exception):
    """Two expressions that have no common refinement. Its text is the reason."""


class Space:
    """Axes and what is known of them. Equating expressions refines them; failures are undone."""

    def __init__(self) -> None:
        self.extents: list[Extent] = []
        self._links: list[Expr | None] = []
        self._trail: list[int] = []

    def fresh(self, size: int | str | Extent) -> int:
        """Returns a new, unknown axis of the given size."""
        self.extents.append(size if isinstance(size, Extent) else Extent.of(size))
        self._links.append(None)
        return len(self.extents) - 1

    def resolve(self, expr: Expr) -> Expr:
        """Returns `expr` in terms of the axes that are indivisible as far as is known."""
        out: list[Factor] = []
        for factor in expr:
            self._resolve(factor, out)
        return tuple(out)

    def _resolve(self, factor: Factor, out: list[Factor]) -> None:
        if isinstance(factor, Sum):
            parts: list[Expr] = []
            for part in factor.parts:
                resolved = self.resolve(part)
                if len(resolved) == 1 and isinstance(resolved[0], Sum):
                    parts.extend(resolved[0].parts)
                else:
                    parts.append(resolved)
            if len(parts) == 1:
                out.extend(parts[0])
            elif parts:
                out.append(Sum(tuple(parts)))
            return
        while True:
            link = self._links[factor]
            if link is None:
                if not self.extents[factor].one:
                    out.append(factor)
                return
            if len(link) == 1 and isinstance(link[0], int):
                factor = link[0]
                continue
            for inner in link:
                self._resolve(inner, out)
            return

    def extent(self, expr: Iterable[Factor]) -> Extent:
        """Returns the size of an expression."""
        total = Extent(1)
        for factor in expr:
            if isinstance(factor, Sum):
                sizes = [self.extent(part) for part in factor.parts]
                if any(size.dynamic for size in sizes):
                    # A concatenation of a dynamic and another size is one opaque size.
                    total = total.times(Extent(1, (" + ".join(map(str, sizes)),)))
                else:
                    total = total.times(Extent(sum(size.number for size in sizes)))
            else:
                total = total.times(self.extents[factor])
        return total

    def unify(self, left: Expr, right: Expr) -> None:
        """Makes two expressions equal by refining axes.

        Raises:
            Clash: they have no common refinement; nothing has changed.
        """
        mark = len(self._trail)
        try:
            self._unify(left, right)
        except Clash:
            for axis in reversed(self._trail[mark:]):
                self._links[axis] = None
            del self._trail[mark:]
            raise
        del self._trail[mark:]

    def _link(self, axis: int, expr: Expr) -> None:
        self._links[axis] = expr
        self._trail.append(axis)

    def _unify(self, left: Expr, right: Expr) -> None:
        a, b = list(self.resolve(left)), list(self.resolve(right))
        while a and b:
            x, y = a[0], b[0]
            if x == y:
                del a[0], b[0]
                continue
            size_x, size_y = self.extent((x,)), self.extent((y,))
            if size_x == size_y:
                self._same(x, y)
                del a[0], b[0]
            elif isinstance(x, int) and (rest := size_x.over(size_y)) is not None:
                self._split(x, y, rest, a)
                del b[0]
            elif isinstance(y, int) and (rest := size_y.over(size_x)) is not None:
                self._split(y, x, rest, b)
                del a[0]
            else:
                raise Clash(
                    f"{size_x} and {size_y} cut the same dimension at places that don't nest"
                )
            a, b = list(self.resolve(tuple(a))), list(self.resolve(tuple(b)))
        if a or b:
            raise Clash(f"sizes differ: {self.extent(left)} and {self.extent(right)}")

    def _split(self, axis: int, front: Factor, rest: Extent, expr: list[Factor]) -> None:
        if isinstance(front, Sum) and axis in leaves((front,)):
            raise Clash("an axis would contain itself")
        inner = self.fresh(rest)
        self._link(axis, (front, inner))
        expr[0] = inner

    def _same(self, x: Factor, y: Factor) -> None:
        if isinstance(x, int) and isinstance(y, int):
            old, new = min(x, y), max(x, y)
            self._link(new, (old,))
        elif isinstance(x, int):
            self._into_sum(x, y)
        elif isinstance(y, int):
            self._into_sum(y, x)
        else:
            self._sums(x, y)

    def _into_sum(self, axis: int, total: Factor) -> None:
        if axis in leaves((total,)):
            raise Clash("an axis would contain itself")
        self._link(axis, (total,))

    def _sums(self, x: Sum, y: Sum) -> None:
        a, b = list(x.parts), list(y.parts)
        while a and b:
            size_a, size_b = self.extent(a[0]), self.extent(b[0])
            if size_a != size_b:
                if size_a.dynamic or size_b.dynamic:
                    raise Clash("a concatenation is cut at a place known only at run time")
                if size_a.number > size_b.number:
                    self._cut(a, size_b)
                else:
                    self._cut(b, size_a)
            self._unify(a[0], b[0])
            a, b = self._again(a[1:]), self._again(b[1:])
        if a or b:
            raise Clash("two concatenations have different sizes")

    def _again(self, parts: list[Expr]) -> list[Expr]:
        """Parts after other axes were refined: a part may have become a sum itself."""
        if not parts:
            return []
        whole = self.resolve((Sum(tuple(parts)),))
        if len(whole) == 1 and isinstance(whole[0], Sum):
            return list(whole[0].parts)
        return [whole]

    def _cut(self, parts: list[Expr], at: Extent) -> None:
        """Cuts the first part so that its first piece has size `at`."""
        first = self.resolve(parts[0])
        if len(first) != 1 or not isinstance(first[0], int):
            raise Clash(f"a cut at {at} falls inside the product {self.extent(first)}")
        size = self.extents[first[0]]
        head, tail = self.fresh(at), self.fresh(Extent(size.number - at.number))
        self._link(first[0], (Sum(((head,), (tail,))),))
        parts[0:1] = [(head,), (tail,)]


def leaves(expr: Expr) -> Iterator[int]:
    """Yields the axes of an expression in row-major order, repeats included."""
    for factor in expr:
        if isinstance(factor, Sum):
            for part in factor.parts:
                yield from leaves(part)
        else:
            yield factor


def occurrences(expr: Expr, outer: tuple[int, ...] = ()) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields each axis with the axes that enclose it from outside, within one dimension."""
    seen = list(outer)
    for factor in expr:
        if isinstance(factor, Sum):
            for part in factor.parts:
                yield from occurrences(part, tuple(seen))
        else:
            yield factor, tuple(seen)
            seen.append(factor)
