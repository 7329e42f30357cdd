"""Elementwise operations."""

from __future__ import annotations

from typing import Any

from surgeon.emit.ort.activations import SWISH
from surgeon.emit.ort.build import CONTRIB, Builder
from surgeon.emit.ort.table import lowers
from surgeon.ir import Op, ParamRef, Ref
from surgeon.ir.program import op_refs

_UNARY = {
    "neg": "Neg",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "sin": "Sin",
    "cos": "Cos",
    "abs": "Abs",
    "erf": "Erf",
    "floor": "Floor",
    "logical_not": "Not",
    "softplus": "Softplus",
}
_BINARY = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "maximum": "Max",
    "minimum": "Min",
}
_LOGIC = {"logical_and": "And", "logical_or": "Or", "bitwise_and": "And", "bitwise_or": "Or"}
_COMPARE = {
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
}


def _kind(op: Op) -> str:
    return op.target.split(".")[1]


@lowers(*(f"aten.{name}.default" for name in _UNARY))
def unary(b: Builder, op: Op) -> Any:
    """One operand, one node."""
    return b.node(_UNARY[_kind(op)], [b.arg(op.arg(0), b.wanted(op))])


@lowers(*(f"aten.{n}.{o}" for n in ("add", "sub", "mul", "div") for o in ("Tensor", "Scalar")))
@lowers("aten.pow.Tensor_Scalar", "aten.pow.Tensor_Tensor")
@lowers("aten.maximum.default", "aten.minimum.default")
def binary(b: Builder, op: Op) -> Any:
    """Two operands of one type; the second may be a number."""
    dtype = b.wanted(op)
    if op.kwarg("rounding_mode") is not None:
        raise b.refused("a division that rounds has no rule")
    second = b.arg(op.arg(1), dtype)
    alpha = op.kwarg("alpha", 1)
    if alpha != 1:
        second = b.node("Mul", [second, b.arg(alpha, dtype)])
    return b.node(_BINARY[_kind(op)], [b.arg(op.arg(0), dtype), second])


@lowers("aten.rsub.Scalar", "aten.rsub.Tensor")
def rsub(b: Builder, op: Op) -> Any:
    """The second operand less the first."""
    if op.kwarg("alpha", 1) != 1 or len(op.args) > 2:
        raise b.refused("a reversed difference with a factor has no rule")
    dtype = b.wanted(op)
    return b.node("Sub", [b.arg(op.arg(1), dtype), b.arg(op.arg(0), dtype)])


@lowers(*(f"aten.{name}.default" for name in ("logical_and", "logical_or")))
@lowers("aten.bitwise_and.Tensor", "aten.bitwise_or.Tensor")
def logic(b: Builder, op: Op) -> Any:
    """Truth values only."""
    if any(b.program.type_of(a).dtype != "bool" for a in op.args):
        raise b.refused("bits of integers have no rule")
    return b.node(_LOGIC[_kind(op)], [b.arg(a) for a in op.args])


@lowers("aten.bitwise_not.default")
def inverted(b: Builder, op: Op) -> Any:
    """The other truth value."""
    if b.program.type_of(op.arg(0)).dtype != "bool":
        raise b.refused("bits of integers have no rule")
    return b.node("Not", [b.arg(op.arg(0))])


@lowers(*(f"aten.{n}.{o}" for n in _COMPARE for o in ("Tensor", "Scalar")))
def compare(b: Builder, op: Op) -> Any:
    """Truth values from two operands of the first one's type."""
    first = b.arg(op.arg(0))
    return b.node(_COMPARE[_kind(op)], [first, b.arg(op.arg(1), b.dtype(first))], dtype="bool")


@lowers("aten.where.self", "aten.where.ScalarOther", "aten.where.Scalar")
def where(b: Builder, op: Op) -> Any:
    """Chosen by a truth value."""
    dtype = b.wanted(op)
    sides = [b.arg(a, dtype) for a in op.args[1:3]]
    return b.node("Where", [b.arg(op.arg(0)), *sides], dtype=dtype)


@lowers("aten.clamp.default")
def clamp(b: Builder, op: Op) -> Any:
    """Bounded by numbers."""
    dtype = b.wanted(op)
    bounds = [None if a is None else b.arg(a, dtype) for a in (op.arg(1), op.arg(2))]
    return b.node("Clip", [b.arg(op.arg(0), dtype), *bounds])


@lowers("aten.rsqrt.default")
def rsqrt(b: Builder, op: Op) -> Any:
    """One over the square root."""
    return b.node("Reciprocal", [b.node("Sqrt", [b.arg(op.arg(0), b.wanted(op))])])


@lowers("aten.square.default")
def square(b: Builder, op: Op) -> Any:
    """A value by itself."""
    x = b.arg(op.arg(0), b.wanted(op))
    return b.node("Mul", [x, x])


@lowers("aten.gelu.default")
def gelu(b: Builder, op: Op) -> Any:
    """GELU, exact or by tanh."""
    mode = op.kwarg("approximate", "none")
    x = b.arg(op.arg(0), b.wanted(op))
    if b.contrib:
        return b.node("FastGelu" if mode == "tanh" else "Gelu", [x], domain=CONTRIB)
    return b.node("Gelu", [x], {"approximate": mode})


@lowers(SWISH)
def swish(b: Builder, op: Op) -> Any:
    """The product x · sigmoid(α·x), one operation in ONNX Runtime."""
    x = b.arg(op.arg(0), b.wanted(op))
    alpha = op.kwarg("alpha")
    assert isinstance(alpha, float)
    if b.contrib:
        return b.node("QuickGelu", [x], {"alpha": alpha}, domain=CONTRIB)
    gate = x if alpha == 1.0 else b.node("Mul", [x, b.arg(alpha, b.dtype(x))])
    return b.node("Mul", [x, b.node("Sigmoid", [gate])])


@lowers("aten.to.dtype")
def to(b: Builder, op: Op) -> Any:
    """Another element type."""
    return b.cast(b.arg(op.arg(0)), b.wanted(op))


@lowers("aten.clone.default", "aten.contiguous.default", "aten.alias.default")
def same(b: Builder, op: Op) -> Any:
    """The value itself."""
    refs = list(op_refs(op))
    assert isinstance(refs[0], Ref | ParamRef)
    return b.arg(refs[0], b.wanted(op))
