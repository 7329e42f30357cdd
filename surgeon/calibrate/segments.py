"""A program in pieces that pass one value on: a layer's weights are needed for its piece alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from surgeon.axes.branches import ADD
from surgeon.ir import Op, ParamRef, Program, Ref
from surgeon.ir.program import op_refs


@dataclass(frozen=True)
class Segment:
    """A run of operations that reads one value of those before it.

    Attributes:
        program: the piece as a program of its own: it reads the model's inputs, then `given`,
            and returns `passed`, or what the whole program returns.
        given: the value that it takes from the piece before; None for the first.
        passed: the value that it hands on; None for the last.
        params: what it reads.
    """

    program: Program
    given: str | None
    passed: str | None

    @property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters that it reads."""
        return tuple(p.name for p in self.program.params)

    @property
    def added(self) -> str | None:
        """The value that is added to `given` to make `passed`; None where that is not how.

        Nothing is scaled or normalised on the way to the sum.
        """
        index = self.program.producer.get(self.passed or "")
        if index is None or self.given is None:
            return None
        op = self.program.ops[index]
        parts = [arg.name for arg in op.args[:2] if isinstance(arg, Ref)]
        if op.target != ADD or op.kwargs or len(parts) != 2 or self.given not in parts:
            return None
        return next((name for name in parts if name != self.given), None)


def segments(program: Program, ops: Sequence[Op] | None = None) -> tuple[Segment, ...]:
    """Returns the program cut wherever a single value goes on that the inputs don't give.

    What depends on positions, masks and sizes alone (rotary tables, say) doesn't count: each piece
    computes its own. In a decoder the cuts lie after each residual sum, so that a piece is the
    attention or the MLP of one layer.

    Args:
        program: any program; where there is no such place it is one piece.
        ops: its operations in another valid order, if that is wanted.
    """
    order = tuple(program.ops if ops is None else ops)
    light = _light(program, order)
    last: dict[str, int] = {name: len(order) for name in program.outputs}
    for index in range(len(order) - 1, -1, -1):
        for ref in op_refs(order[index]):
            if isinstance(ref, Ref):
                last.setdefault(ref.name, index)
    cuts: list[tuple[int, str]] = []
    alive: set[str] = set()
    for index, op in enumerate(order):
        alive.update(name for name in op.outputs if name not in light and name in last)
        alive = {name for name in alive if last[name] > index}
        if len(alive) == 1 and not alive & set(program.outputs):
            (name,) = alive
            # The same value may stay the only one for some operations: the earliest cut counts.
            if not cuts or cuts[-1][1] != name:
                cuts.append((index + 1, name))
    return tuple(_pieces(program, order, light, cuts))


def _light(program: Program, ops: Sequence[Op]) -> frozenset[str]:
    """Returns what no floating-point parameter and no table lookup had a part in.

    Such values are cheap, and every piece can make them again from the inputs.
    """
    tables = {p.name for p in program.params if p.kind == "parameter"}
    found = {i.name for i in program.inputs}
    for op in ops:
        refs = list(op_refs(op))
        heavy = any(isinstance(r, ParamRef) and r.name in tables for r in refs)
        if not heavy and all(r.name in found for r in refs if isinstance(r, Ref)):
            found.update(op.outputs)
    return frozenset(found)


def _pieces(
    program: Program, ops: Sequence[Op], light: frozenset[str], cuts: Sequence[tuple[int, str]]
) -> list[Segment]:
    common = tuple(op for op in ops if light.issuperset(op.outputs))
    bounds = [*cuts, (len(ops), "")]
    out: list[Segment] = []
    start, given = 0, None
    for end, passed in bounds:
        own = tuple(op for op in ops[start:end] if not light.issuperset(op.outputs))
        inputs = program.inputs
        if given is not None:
            inputs = (*inputs, replace(inputs[0], name=given, type=program.types[given]))
        piece = replace(
            program,
            inputs=inputs,
            ops=(*common, *own),
            outputs=(passed,) if passed else program.outputs,
        )
        out.append(Segment(piece.without_dead_code(), given, passed or None))
        start, given = end, passed
    return out
