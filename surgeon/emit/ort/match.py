"""Looking backwards from an operation: what rewrite rules are written with."""

from __future__ import annotations

from collections.abc import Iterator

from surgeon.ir import Arg, Op, ParamRef, Program, Ref

END = 1 << 62
"""Slices that go to the end are written with a bound at least as large as this."""


class Look:
    """A program seen from its values backwards."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def op(self, arg: Arg, *targets: str) -> Op | None:
        """Returns the operation that makes a value, if it is one of these kinds."""
        if not isinstance(arg, Ref):
            return None
        index = self.program.producer.get(arg.name)
        if index is None:
            return None
        op = self.program.ops[index]
        return op if not targets or kind(op) in targets else None

    def shape(self, arg: Arg) -> tuple[int | str, ...]:
        """Returns the shape of a value or parameter."""
        return self.program.type_of(arg).shape

    def only_use(self, arg: Arg) -> bool:
        """Whether one operation alone reads the value, and it is no output."""
        assert isinstance(arg, Ref)
        uses = self.program.consumers.get(arg.name, ())
        return len(uses) == 1 and arg.name not in self.program.outputs

    def slice(self, arg: Arg, base: Arg, start: int, stop: int) -> bool:
        """Whether a value is `base[..., start:stop]`."""
        op = self.op(arg, "slice")
        if op is None or op.arg(0) != base or op.arg(4, 1) != 1:
            return False
        rank = len(self.shape(base))
        size = self.shape(base)[-1]
        end = op.arg(3, END)
        assert isinstance(size, int) and isinstance(end, int)
        return op.arg(1, 0) in (-1, rank - 1) and (op.arg(2) or 0, min(end, size)) == (start, stop)


def kind(op: Op) -> str:
    """Returns the operation without its library and overload: `add` for `aten.add.Tensor`."""
    parts = op.target.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else op.target


def either(op: Op) -> Iterator[tuple[Arg, Arg]]:
    """Yields the two operands in both orders, where no factor stands between them."""
    if op.kwarg("alpha", 1) == 1 and len(op.args) == 2:
        yield op.args[0], op.args[1]
        yield op.args[1], op.args[0]


def number(arg: Arg) -> float | None:
    """Returns a literal number, None for anything else."""
    return float(arg) if isinstance(arg, int | float) and not isinstance(arg, bool) else None


def close(arg: Arg, value: float) -> bool:
    """Whether an argument is this literal, to the precision in which constants are written."""
    found = number(arg)
    return found is not None and abs(found - value) <= 1e-6 * abs(value)


def weight(arg: Arg) -> str | None:
    """Returns a parameter's name, None for anything else."""
    return arg.name if isinstance(arg, ParamRef) else None
