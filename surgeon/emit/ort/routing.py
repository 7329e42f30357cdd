"""Routing: what top-k chooses, and what its numbers pick or mark."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from surgeon.emit.ort.build import Builder
from surgeon.emit.ort.table import lowers
from surgeon.ir import Op


def _dim(b: Builder, op: Op, place: int, default: int) -> int:
    given = op.arg(place, default)
    assert isinstance(given, int)
    return given % len(b.program.type_of(op.arg(0)).shape)


def zeros(b: Builder, like: ir.Value, dim: int, width: int, dtype: str) -> ir.Value:
    """Returns zeros [rows, width], as many rows as a value has along a dimension."""
    rows = b.node("Shape", [like], {"start": dim, "end": dim + 1}, dtype="i64")
    shape = b.node("Concat", [rows, b.ints(width)], {"axis": 0})
    return b.node("Expand", [b.const(0.0, dtype), shape])


@lowers("aten.topk.default")
def topk(b: Builder, op: Op) -> Any:
    """The largest or smallest of a dimension, and their places."""
    count, dtype = op.arg(1), b.wanted(op)
    if not isinstance(count, int):
        raise b.refused("how many it chooses is known only at run time")
    flags = {"largest": int(op.arg(3, True) is True), "sorted": int(op.arg(4, True) is True)}
    attributes = {"axis": _dim(b, op, 2, -1), **flags}
    operands = [b.arg(op.arg(0), dtype), b.ints(count)]
    return b.node("TopK", operands, attributes, dtype=[dtype, "i64"])


@lowers("surgeon.dispatch")
def dispatch(b: Builder, op: Op) -> Any:
    """The weights of chosen experts among zeros for all others."""
    index, dtype = b.arg(op.arg(0)), b.wanted(op)
    experts = op.arg(2)
    assert isinstance(experts, int)
    none = zeros(b, index, 0, experts, dtype)
    return b.node("ScatterElements", [none, index, b.arg(op.arg(1), dtype)], {"axis": 1})


@lowers("aten.gather.default")
def gather(b: Builder, op: Op) -> Any:
    """Elements picked by numbers along a dimension."""
    operands = [b.arg(op.arg(0), b.wanted(op)), b.arg(op.arg(2))]
    return b.node("GatherElements", operands, {"axis": _dim(b, op, 1, 0)})


@lowers("aten.scatter.value", "aten.scatter.src")
def scatter(b: Builder, op: Op) -> Any:
    """Elements replaced at numbers along a dimension."""
    dtype, index = b.wanted(op), b.arg(op.arg(2))
    new = b.arg(op.arg(3), dtype)
    if op.target == "aten.scatter.value":
        new = b.node("Expand", [new, b.node("Shape", [index], dtype="i64")])
    operands = [b.arg(op.arg(0), dtype), index, new]
    return b.node("ScatterElements", operands, {"axis": _dim(b, op, 1, 0)})


@lowers("aten.masked_fill.Scalar")
def masked_fill(b: Builder, op: Op) -> Any:
    """A number wherever a truth value says so."""
    dtype = b.wanted(op)
    operands = [b.arg(op.arg(1)), b.arg(op.arg(2), dtype), b.arg(op.arg(0), dtype)]
    return b.node("Where", operands, dtype=dtype)


@lowers("aten.zeros_like.default")
def zeros_like(b: Builder, op: Op) -> Any:
    """Zeros in the shape of a value."""
    shape = b.node("Shape", [b.arg(op.arg(0))], dtype="i64")
    return b.node("Expand", [b.const(0, b.wanted(op)), shape])
