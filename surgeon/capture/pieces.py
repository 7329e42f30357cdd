"""A tensor that is made empty and filled piece by piece is the pieces, joined."""

from __future__ import annotations

from dataclasses import dataclass, replace

from surgeon.ir import Arg, Op, ParamRef, Program, Ref
from surgeon.ir.program import substitute_op

_EMPTY = (
    "aten.new_empty.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
)
_COPY, _FILL = "aten.copy.default", "aten.slice_scatter.default"


@dataclass(frozen=True)
class _Filled:
    """What has been written along one dimension of an empty tensor: (from, to, value)."""

    dim: int
    pieces: tuple[tuple[int, int, Ref | ParamRef], ...]

    def whole(self, size: object) -> bool:
        """Whether the pieces cover the dimension, none of them over another."""
        at = 0
        for start, end, _ in sorted(self.pieces, key=lambda p: p[0]):
            if start != at:
                return False
            at = end
        return at == size


def joined(program: Program) -> Program:
    """Returns the program with pieces joined where they were written into an empty tensor.

    In-place writes come out of functionalisation as `copy` and `slice_scatter`. A copy into a
    place of the same shape and type is what is copied.
    """
    if not any(op.target == _FILL for op in program.ops):
        return program
    types = program.types
    same: dict[str, Arg] = {}
    filled: dict[str, _Filled] = {}
    empty = {op.outputs[0] for op in program.ops if op.target in _EMPTY}
    ops: list[Op] = []

    def now(arg: Arg) -> Arg:
        return same.get(arg.name, arg) if isinstance(arg, Ref) else arg

    for op in program.ops:
        op = substitute_op(op, now)
        source = op.arg(1)
        returned = op.outputs[0] in program.outputs
        if op.target == _COPY and isinstance(source, Ref | ParamRef) and not returned:
            before = types[source.name] if isinstance(source, Ref) else program.type_of(source)
            if before == op.types[0]:
                same[op.outputs[0]] = source
                continue
        found = _written(op, filled, empty)
        if found is not None:
            filled[op.outputs[0]] = found
            if found.whole(op.types[0].shape[found.dim]):
                pieces = tuple(p for _, _, p in sorted(found.pieces, key=lambda p: p[0]))
                op = replace(op, target="aten.cat.default", args=(pieces, found.dim), kwargs=())
        ops.append(op)
    return replace(program, ops=tuple(ops)).without_dead_code()


def _written(op: Op, filled: dict[str, _Filled], empty: set[str]) -> _Filled | None:
    """Returns what an operation leaves of an empty tensor, if it writes a piece of it."""
    base, source, dim = op.arg(0), op.arg(1), op.arg(2, 0)
    if op.target != _FILL or not isinstance(base, Ref) or not isinstance(source, Ref | ParamRef):
        return None
    shape = op.types[0].shape
    if not isinstance(dim, int):
        return None
    dim %= len(shape)
    size, start, end, step = shape[dim], op.arg(3, None), op.arg(4, None), op.arg(5, 1)
    start = 0 if start is None else start
    end = size if end is None else end
    if not (isinstance(size, int) and isinstance(start, int) and isinstance(end, int)):
        return None
    start, end, _ = slice(start, end).indices(size)
    before = filled.get(base.name, _Filled(dim, ()) if base.name in empty else None)
    if before is None or before.dim != dim or step != 1:
        return None
    return _Filled(dim, (*before.pieces, (start, end, source)))
