"""Shapes, pieces and arrangement."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from surgeon.emit.ort.build import Builder
from surgeon.emit.ort.table import lowers
from surgeon.ir import Op, Size
from surgeon.runtime.lower import evaluate


def reshaped(b: Builder, x: ir.Value, before: Sequence[Size], after: Sequence[Size]) -> ir.Value:
    """Returns the value in another shape, whose dynamic sizes are copied or left to be inferred."""
    target: list[int] = []
    for i, size in enumerate(after):
        same = i < len(before) and before[i] == size and before[:i] == after[:i]
        target.append(
            0 if isinstance(size, str) and same else size if isinstance(size, int) else -1
        )
    if target.count(-1) <= 1:
        return b.node("Reshape", [x, b.ints(*target)])
    parts = [b.ints(s) if isinstance(s, int) else _size(b, s) for s in after]
    return b.node("Reshape", [x, b.node("Concat", parts, {"axis": 0})])


def _size(b: Builder, expression: str) -> ir.Value:
    """Returns a dynamic size as a tensor [1]."""
    arithmetic = {"add": "Add", "sub": "Sub", "mul": "Mul", "floordiv": "Div", "neg": "Neg"}
    arithmetic |= {"sym_max": "Max", "sym_min": "Min"}

    def symbol(name: str) -> ir.Value:
        for value in b.inputs:
            for dim, size in enumerate(value.shape or ()):
                if str(size) == _names(b).get(name):
                    return b.node("Shape", [value], {"start": dim, "end": dim + 1}, dtype="i64")
        raise b.refused(f"the size {name} is no input's size")

    def call(function: Any, *operands: Any) -> Any:
        values = [b.ints(o) if isinstance(o, int) else o for o in operands]
        return b.node(arithmetic[function.__name__], values)

    found = evaluate(expression, symbol, call)
    return b.ints(found) if isinstance(found, int) else found


def _names(b: Builder) -> dict[str, str]:
    return b.facts["sizes"]


def renamed(b: Builder, size: Size) -> Size:
    """Returns a size by the name that it has in the graph."""
    if isinstance(size, int):
        return size
    return re.sub(r"\w+", lambda found: _names(b).get(found[0], found[0]), size)


@lowers("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")
def view(b: Builder, op: Op) -> Any:
    """The same elements in another shape."""
    x = b.arg(op.arg(0), b.wanted(op))
    return reshaped(b, x, b.program.type_of(op.arg(0)).shape, op.types[0].shape)


@lowers("aten.flatten.using_ints", "aten.unflatten.int")
def flatten(b: Builder, op: Op) -> Any:
    """Dimensions merged or parted."""
    return view(b, op)


@lowers("aten.transpose.int", "aten.permute.default", "aten.t.default")
def permute(b: Builder, op: Op) -> Any:
    """Dimensions in another order."""
    rank = len(op.types[0].shape)
    order = list(range(rank))
    if op.target == "aten.permute.default":
        given = op.arg(1)
        assert isinstance(given, tuple)
        order = [d % rank for d in given if isinstance(d, int)]
    else:
        first, second = (op.arg(1), op.arg(2)) if op.target == "aten.transpose.int" else (0, 1)
        assert isinstance(first, int) and isinstance(second, int)
        first, second = first % rank, second % rank
        order[first], order[second] = order[second], order[first]
    return b.node("Transpose", [b.arg(op.arg(0), b.wanted(op))], {"perm": order})


@lowers("aten.unsqueeze.default")
def unsqueeze(b: Builder, op: Op) -> Any:
    """A dimension of one more."""
    dim = op.arg(1)
    assert isinstance(dim, int)
    dims = b.ints(dim % len(op.types[0].shape))
    return b.node("Unsqueeze", [b.arg(op.arg(0), b.wanted(op)), dims])


@lowers("aten.squeeze.dim", "aten.squeeze.dims")
def squeeze(b: Builder, op: Op) -> Any:
    """Dimensions of one less."""
    shape = b.program.type_of(op.arg(0)).shape
    given = op.arg(1)
    dims = given if isinstance(given, tuple) else (given,)
    gone = [d % len(shape) for d in dims if isinstance(d, int) and shape[d] == 1]
    x = b.arg(op.arg(0), b.wanted(op))
    return b.node("Squeeze", [x, b.ints(*gone)]) if gone else b.node("Identity", [x])


@lowers("aten.expand.default")
def expand(b: Builder, op: Op) -> Any:
    """Repeated along dimensions of one."""
    shape = [1 if isinstance(s, str) else s for s in op.types[0].shape]
    before = b.program.type_of(op.arg(0)).shape
    padded = (1,) * (len(shape) - len(before)) + tuple(before)
    if any(isinstance(s, str) and p == 1 for s, p in zip(op.types[0].shape, padded, strict=True)):
        raise b.refused("it repeats along a dynamic size")
    return b.node("Expand", [b.arg(op.arg(0), b.wanted(op)), b.ints(*shape)])


@lowers("aten.cat.default", "aten.concat.default")
def cat(b: Builder, op: Op) -> Any:
    """Pieces one after the other."""
    pieces, dim = op.arg(0), op.arg(1, 0)
    assert isinstance(pieces, tuple) and isinstance(dim, int)
    dim %= len(op.types[0].shape)
    return b.node("Concat", [b.arg(p, b.wanted(op)) for p in pieces], {"axis": dim})


@lowers("aten.stack.default")
def stack(b: Builder, op: Op) -> Any:
    """Pieces along a dimension of their own."""
    pieces, dim = op.arg(0), op.arg(1, 0)
    assert isinstance(pieces, tuple) and isinstance(dim, int)
    dim %= len(op.types[0].shape)
    apart = [b.node("Unsqueeze", [b.arg(p, b.wanted(op)), b.ints(dim)]) for p in pieces]
    return b.node("Concat", apart, {"axis": dim})


@lowers("aten.slice.Tensor")
def slice_(b: Builder, op: Op) -> Any:
    """A range of a dimension."""
    dim, start, stop, step = op.arg(1, 0), op.arg(2), op.arg(3), op.arg(4, 1)
    start, stop = start or 0, (1 << 62) if stop is None else stop
    if not isinstance(start, int) or not isinstance(stop, int):
        raise b.refused("its bounds are dynamic")
    assert isinstance(dim, int) and isinstance(step, int)
    dim %= len(op.types[0].shape)
    ends = [b.ints(start), b.ints(stop), b.ints(dim), b.ints(step)]
    return b.node("Slice", [b.arg(op.arg(0), b.wanted(op)), *ends])


@lowers("aten.split.Tensor", "aten.chunk.default", "aten.split_with_sizes.default")
def split(b: Builder, op: Op) -> Any:
    """All ranges of a dimension."""
    dim = op.arg(2, 0)
    assert isinstance(dim, int)
    dim %= len(op.types[0].shape)
    sizes = [t.shape[dim] for t in op.types]
    if any(isinstance(s, str) for s in sizes):
        raise b.refused("it parts a dynamic size")
    x = b.arg(op.arg(0), b.wanted(op))
    types = [b.wanted(op, i) for i in range(len(op.outputs))]
    pieces = b.ints(*(s for s in sizes if isinstance(s, int)))
    return b.node("Split", [x, pieces], {"axis": dim}, dtype=types)


@lowers("aten.select.int")
def select(b: Builder, op: Op) -> Any:
    """One index of a dimension."""
    dim, index = op.arg(1), op.arg(2)
    assert isinstance(dim, int) and isinstance(index, int)
    x = b.arg(op.arg(0), b.wanted(op))
    dim %= len(b.program.type_of(op.arg(0)).shape)
    return b.node("Gather", [x, b.const(index, "i64")], {"axis": dim})


@lowers("aten.index_select.default")
def index_select(b: Builder, op: Op) -> Any:
    """Chosen indices of a dimension."""
    dim = op.arg(1)
    x = b.arg(op.arg(0), b.wanted(op))
    return b.node("Gather", [x, b.arg(op.arg(2))], {"axis": dim})
