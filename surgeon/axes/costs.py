"""What a model takes: parameters, bytes, multiply-adds, cache; whole, by layer and by channel.

Everything is a sum of products of axis sizes, so that what a plan or one channel saves follows
from the same terms with smaller sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from math import prod
from typing import cast

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.branches import ATTENTION, DISPATCH
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.space import Expr, Extent, Factor, Sum, leaves
from surgeon.ir.program import Arg, Op, ParamRef, Ref, Size, op_refs
from surgeon.ops.linear import spelled_attention
from surgeon.ops.rule import Context

BYTES: Mapping[str, int] = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "f16": 2, "bf16": 2, "i16": 2}
"""Bytes of an element by its type's short name; what isn't listed takes one."""

_REARRANGED = tuple(
    f"aten.{name}"
    for name in (
        *("expand.default", "view.default", "reshape.default", "_unsafe_view.default"),
        *("transpose.int", "permute.default", "unsqueeze.default", "clone.default", "t.default"),
        *("contiguous.default", "repeat_interleave.self_int"),
    )
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What something takes.

    Attributes:
        parameters: elements of trained parameters; a tied one counts once.
        bytes: the same in bytes.
        flops: of matrix products, two for each multiply-add, for one token.
        flops_context: the same for each token that this one attends to.
        cache_bytes: keys and values of one token.
    """

    parameters: int = 0
    bytes: int = 0
    flops: int = 0
    flops_context: int = 0
    cache_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    def times(self, part: int, whole: int) -> Cost:
        """Returns part / whole of all figures, which `whole` divides."""
        return Cost(*(getattr(self, f.name) * part // whole for f in fields(self)))

    def to_json(self) -> dict[str, int]:
        """Returns the figures by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class _Term:
    """One product: `unit` times the sizes of `exprs`. `path` is a parameter or a module."""

    unit: Cost
    exprs: tuple[Expr, ...]
    path: str
    param: str = ""
    op: int = -1


@dataclass(frozen=True)
class _View:
    """As much of a rule's context as recognising spelled-out attention takes."""

    axes: Axes
    op: Op

    @property
    def program(self) -> object:
        return self.axes.program

    def dims(self, arg: Arg) -> tuple[Expr, ...]:
        return _dims(self.axes, arg)

    def out(self, index: int = 0) -> tuple[Expr, ...]:
        return self.axes.dims.get("%" + self.op.outputs[index], ())


def _dims(axes: Axes, arg: Arg) -> tuple[Expr, ...]:
    if isinstance(arg, ParamRef):
        return axes.dims.get("$" + arg.name, ())
    return axes.dims.get("%" + arg.name, ()) if isinstance(arg, Ref) else ()


class Costs:
    """The costs of a model with these axes.

    Args:
        axes: the axes of the program.
        bytes_of: bytes of an element of a parameter; by default as the program has it.
        state_bytes: bytes of an element of the key/value cache.
    """

    def __init__(
        self, axes: Axes, bytes_of: Callable[[str], int] | None = None, state_bytes: int = 4
    ) -> None:
        self.axes, self._state_bytes = axes, state_bytes
        self._bytes_of = bytes_of or (lambda n: BYTES.get(axes.program.param[n].type.dtype, 1))

    @cached_property
    def per(self) -> str:
        """What `flops` are counted for: a token, a row of the input, or one call."""
        count = len(self._symbols)
        return ("call", "row", "token")[min(count, 2)]

    @cached_property
    def whole(self) -> Cost:
        """The cost of the whole model."""
        return self.under(Plan())

    def under(self, plan: Plan) -> Cost:
        """Returns the cost of the model after a plan."""
        return sum((cost for _, cost in self._after(plan)), Cost())

    def products(self, measure: str) -> Iterator[tuple[int, tuple[Expr, ...], str, int]]:
        """Yields what a measure is the sum of: a number, the expressions it is multiplied with.

        Then the parameter that it belongs to, or an empty name and the index of an operation.

        Args:
            measure: a field of `Cost`.
        """
        for term in self._terms:
            number = getattr(term.unit, measure)
            if number:
                yield number, term.exprs, term.param, term.op

    def layers(self, plan: Plan | None = None) -> dict[str, Cost]:
        """Returns the cost of each layer, by its module path, after a plan."""
        out = {branch.layer: Cost() for branch in self.axes.branches if branch.layer}
        for path, cost in self._after(plan or Plan()):
            while path and path not in out:
                path = path.rpartition(".")[0]
            if path:
                out[path] += cost
        return out

    def _after(self, plan: Plan) -> Iterator[tuple[str, Cost]]:
        smaller = {self.axes.number[c.axis]: c.count for c in plan.cuts}
        gone_params, gone_ops = self._gone(plan)
        parts = self._parts(plan)
        for term in self._terms:
            if term.param not in gone_params and term.op not in gone_ops:
                whole, kept = parts.get(term.param or term.op, (1, 1))
                yield term.path, self._value(term, smaller).times(kept, whole)

    def _parts(self, plan: Plan) -> dict[str | int, tuple[int, int]]:
        """Returns the elements as one and as two of what the plan makes two.

        They are found by parameter, and by operation that it is used in.
        """
        selection = Selection(self.axes, plan)
        out: dict[str | int, tuple[int, int]] = {}
        for name in selection.splits:
            kept = sum(prod(selection.shape(part)) for part in selection.parts(name))
            out[name] = (prod(selection.shape(name)), kept)
            out |= dict.fromkeys(self.axes.program.readers.get(name, ()), out[name])
        return out

    def channel(self, axis: Axis) -> Cost:
        """Returns what goes when one index of an axis goes, in every place that carries it."""
        number = self.axes.number[axis.name]
        saved = Cost()
        for term in self._by_axis.get(number, ()):
            saved += self._value(term, {}) - self._value(term, {number: axis.size - 1})
        return saved

    @cached_property
    def _symbols(self) -> tuple[str, ...]:
        """The dynamic sizes of the first input: what one token is one of."""
        inputs = self.axes.program.inputs
        shape: tuple[Size, ...] = inputs[0].type.shape if inputs else ()
        return tuple(s for size in shape for s in Extent.of(size).symbols)

    @cached_property
    def _by_axis(self) -> dict[int, list[_Term]]:
        out: dict[int, list[_Term]] = {}
        for term in self._terms:
            for number in {a for expr in term.exprs for a in leaves(expr)}:
                out.setdefault(number, []).append(term)
        return out

    def _gone(self, plan: Plan) -> tuple[set[str], set[int]]:
        if not plan.branches:
            return set(), set()
        from surgeon.axes.surgery import without_branches

        program = self.axes.program
        left = without_branches(self.axes, plan.branches)
        there = {op.outputs[0] for op in left.ops}
        ops = {i for i, op in enumerate(program.ops) if op.outputs[0] not in there}
        return set(program.param) - set(left.param), ops

    def _value(self, term: _Term, smaller: Mapping[int, int]) -> Cost:
        total = 1
        for expr in term.exprs:
            total *= self._width(expr, smaller)
        return Cost(*(getattr(term.unit, f.name) * total for f in fields(Cost)))

    def _width(self, expr: Expr, smaller: Mapping[int, int]) -> int:
        total = 1
        for factor in expr:
            if isinstance(factor, Sum):
                total *= sum(self._width(part, smaller) for part in factor.parts)
            else:
                size = smaller.get(factor, self.axes.sizes[factor])
                assert isinstance(size, int)
                total *= size
        return total

    @cached_property
    def _terms(self) -> list[_Term]:
        program = self.axes.program
        out = [
            _Term(Cost(1, self._bytes_of(p.name)), self.axes.param_dims(p.name), p.name, p.name)
            for p in program.params
            if p.kind == "parameter"
        ]
        contracted: dict[int, list[Expr]] = {}
        for use in self.axes.facts.uses:
            if use.kind == "contract" and len(list(op_refs(program.ops[use.op]))) > 1:
                contracted.setdefault(use.op, []).append(self.axes.facts.space.resolve(use.expr))
        sent = self._sent()
        for index, over in contracted.items():
            op = program.ops[index]
            result = self.axes.dims.get("%" + op.outputs[0], ())
            if op.target in ATTENTION:
                q, k = _dims(self.axes, op.arg(0)), _dims(self.axes, op.arg(1))
                out += self._products(index, (*q[:-1], k[-2], *over))
                out += self._products(index, (*q[:-1], k[-2], result[-1]))
                out += self._state(index, op.arg(1), op.arg(2))
            elif result and result[0] in sent:
                # A token goes through those experts that it is sent to, whatever runs the graph.
                out += self._products(index, (*result[1:], *over), sent[result[0]])
            else:
                out += self._products(index, (*result, *over))
                scores = spelled_attention(cast(Context, _View(self.axes, op)))
                if scores is not None:
                    out += self._state(index, scores.arg(1), op.arg(1))
        return out

    def _sent(self) -> dict[Expr, int]:
        """How many experts a token is sent to, by the expression of all of them."""
        out: dict[Expr, int] = {}
        for op in self.axes.program.ops:
            if op.target == DISPATCH:
                count = self.axes.program.type_of(op.arg(0)).shape[-1]
                if isinstance(count, int):
                    out[self.axes.dims["%" + op.outputs[0]][-1]] = count
        return out

    def _products(self, index: int, exprs: tuple[Expr, ...], times: int = 1) -> list[_Term]:
        """So many times the multiply-adds over some dimensions, for one token of one row."""
        symbols: list[str] = []
        static = tuple(self._static(expr, symbols) for expr in exprs)
        for symbol in self._symbols:
            if symbol not in symbols:
                return []  # done once for many tokens, such as a table of positions
            symbols.remove(symbol)
        if len(symbols) > 1:
            return []
        unit = Cost(flops_context=2 * times) if symbols else Cost(flops=2 * times)
        return [_Term(unit, static, self.axes.program.ops[index].module, op=index)]

    def _state(self, index: int, *kept: Arg) -> list[_Term]:
        """What a cache keeps of a token, before heads are repeated for the queries."""
        out: list[_Term] = []
        for arg in kept:
            dims = self._smallest(arg)
            unit = Cost(cache_bytes=self._state_bytes)
            out.append(_Term(unit, dims, self.axes.program.ops[index].module, op=index))
        return out

    def _smallest(self, arg: Arg) -> tuple[Expr, ...]:
        """Static dimensions of a value where it is smallest, up through what rearranges it."""
        found: list[tuple[Expr, ...]] = []
        producer = self.axes.program.producer
        while isinstance(arg, Ref):
            found.append(tuple(self._static(expr, []) for expr in _dims(self.axes, arg)))
            index = producer.get(arg.name)
            if index is None or self.axes.program.ops[index].target not in _REARRANGED:
                break
            arg = self.axes.program.ops[index].arg(0)
        none: Mapping[int, int] = {}
        return min(
            found,
            key=lambda dims: self._value(_Term(Cost(1), dims, ""), none).parameters,
            default=(),
        )

    def _static(self, expr: Expr, symbols: list[str]) -> Expr:
        """Returns an expression less its dynamic axes, whose symbols are added to the list."""
        out: list[Factor] = []
        for factor in expr:
            sizes = [self.axes.sizes.get(a, 1) for a in leaves((factor,))]
            dynamic = [s for s in sizes if not isinstance(s, int)]
            if not dynamic:
                out.append(factor)
                continue
            for size in dynamic:
                extent = Extent.of(size)
                symbols += extent.symbols
        return tuple(out)
