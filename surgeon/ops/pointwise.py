"""Elementwise maps: of one operand, and of several that broadcast."""

from __future__ import annotations

from collections.abc import Sequence

from surgeon.ir.program import Arg, DType, ParamRef, Ref
from surgeon.ops.rule import Atoms, Context, Flow, Gauge, rule, vanishing, wherever

LINEAR = ("neg", "clone", "contiguous", "alias", "detach", "lift_fresh_copy", "dropout")
"""Maps that any change of basis passes through."""
ODD = (
    *("tanh", "sin", "erf", "sign", "asinh", "atan"),
    *("tan", "sinh", "asin", "atanh", "round", "trunc"),
)
"""Maps with f(-x) = -f(x)."""
ZERO_KEEPING = (
    "silu",
    "gelu",
    "relu",
    "relu6",
    "leaky_relu",
    "abs",
    "sqrt",
    "square",
    "mish",
    "hardswish",
    "elu",
    "selu",
    "celu",
    "expm1",
    "log1p",
    "floor",
    "ceil",
)
NOT_ZERO_KEEPING = (
    *("cos", "exp", "sigmoid", "softplus", "logical_not", "bitwise_not", "isnan", "isinf"),
)
INFINITE_AT_ZERO = ("rsqrt", "log", "reciprocal")

CASTS = (
    *("aten.to.dtype", "aten.to.device", "aten.to.dtype_layout", "aten.to.other"),
    *("aten._to_copy.default", "aten.type_as.default", "aten.float.default"),
)


def tensors(op_args: tuple[Arg, ...]) -> list[Ref | ParamRef]:
    """Returns the operands that are tensors."""
    return [arg for arg in op_args if isinstance(arg, Ref | ParamRef)]


def couple(c: Context, operands: list[Ref | ParamRef]) -> None:
    """Equates the dimensions of operands that broadcast with those of the result."""
    out = c.out()
    out_shape = c.op.types[0].shape
    for operand in operands:
        dims, shape = c.dims(operand), c.shape(operand)
        offset = len(out) - len(dims)
        for i, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if size != 1 or out_shape[offset + i] == 1:
                c.equate(dim, out[offset + i])


def _unary(gauge: Gauge, kind: str = "map"):
    def analyse(c: Context) -> None:
        couple(c, [tensors(c.op.args)[0]])
        for dim in c.out():
            c.use(dim, kind, gauge)

    return analyse


def _keeps(f: Flow) -> Atoms:
    return f.zero(f.op.arg(0))


def _nothing(f: Flow) -> Atoms:
    return frozenset()


def _infinite(f: Flow) -> Atoms:
    f.inexact(f.perhaps(f.op.arg(0)), "a masked channel would become infinite here")
    return frozenset()


for names, gauge, vanish in (
    (LINEAR, Gauge.ANY, _keeps),
    (ODD, Gauge.SIGNED, _keeps),
    (ZERO_KEEPING, Gauge.PERMUTATION, _keeps),
    (NOT_ZERO_KEEPING, Gauge.PERMUTATION, _nothing),
    (INFINITE_AT_ZERO, Gauge.PERMUTATION, _infinite),
):
    rule(*(f"aten.{name}.default" for name in names), vanish=vanish)(_unary(gauge))
rule(*CASTS, vanish=_keeps)(_unary(Gauge.ANY))


# --- several operands ---------------------------------------------------------------------


def _number(arg: Arg) -> float | None:
    return float(arg) if isinstance(arg, int | float) else None


def _where_all(f: Flow, operands: Sequence[Arg]) -> Atoms:
    """Axes on which a result vanishes that is zero where every operand is."""
    if any(_number(arg) != 0 for arg in operands if not isinstance(arg, Ref | ParamRef)):
        return frozenset()
    spread = [arg for arg in operands if isinstance(arg, Ref | ParamRef)]
    dims = range(-len(f.out()), 0)
    everywhere = [[vanishing(f, arg, d) for arg in spread] for d in dims]
    return wherever(f, [frozenset.intersection(*found) for found in everywhere])


def _where_any(f: Flow, operands: Sequence[Arg]) -> Atoms:
    """Axes on which a result vanishes that is zero where any operand is."""
    spread = tensors(tuple(operands))
    dims = range(-len(f.out()), 0)
    return wherever(f, [Atoms().union(*(vanishing(f, a, d) for a in spread)) for d in dims])


def _sum_vanish(f: Flow) -> Atoms:
    """A sum vanishes where every operand does."""
    return _where_all(f, f.op.args[:2])


def _product_vanish(f: Flow) -> Atoms:
    """A product vanishes where any operand does."""
    return _where_any(f, f.op.args[:2])


def _quotient_vanish(f: Flow) -> Atoms:
    bottom = f.op.arg(1)
    if isinstance(bottom, Ref | ParamRef):
        f.inexact(f.perhaps(bottom), "a masked channel would be divided by zero")
    return _where_any(f, f.op.args[:1])


def _same_basis(c: Context) -> None:
    """A sum commutes with any change of basis made to every operand alike."""
    operands = tensors(c.op.args[:2])
    couple(c, operands)
    whole = len(operands) == 2
    for i, dim in enumerate(c.out()):
        alike = whole and all(_spans(c, operand, i) for operand in operands)
        c.use(dim, "map", Gauge.ANY if alike else Gauge.PERMUTATION)


def _spans(c: Context, operand: Ref | ParamRef, out_dim: int) -> bool:
    shape = c.shape(operand)
    i = out_dim - (len(c.out()) - len(shape))
    return i >= 0 and (shape[i] != 1 or c.op.types[0].shape[out_dim] == 1)


rule(
    *(f"aten.{name}.{kind}" for name in ("add", "sub", "rsub") for kind in ("Tensor", "Scalar")),
    vanish=_sum_vanish,
)(_same_basis)


def sinusoid(c: Context, arg: Arg) -> bool:
    """Whether a value is a table of cosines or sines, reshaped or scaled."""
    while isinstance(arg, Ref):
        index = c.program.producer.get(arg.name)
        if index is None:
            return False
        op = c.program.ops[index]
        if op.target in ("aten.cos.default", "aten.sin.default"):
            return True
        others = [a for a in op.args[1:] if isinstance(a, Ref | ParamRef)]
        if others:
            return False
        arg = op.arg(0)
    return False


def foldable(c: Context, name: str, depth: int = 0) -> bool:
    """Whether every use of a value is a linear map whose weight nothing else uses."""
    users = c.program.consumers.get(name, ())
    if not users or name in c.program.outputs or depth > 4:
        return False
    for index in users:
        op = c.program.ops[index]
        if op.target in CASTS or op.target == "aten.slice.Tensor":
            if not foldable(c, op.outputs[0], depth + 1):
                return False
        elif op.target == "aten.linear.default" and isinstance(op.arg(1), ParamRef):
            weight = op.arg(1)
            assert isinstance(weight, ParamRef)
            if op.arg(0) != Ref(name) or len(c.program.readers[weight.name]) != 1:
                return False
        else:
            return False
    return True


@rule("aten.mul.Tensor", "aten.mul.Scalar", vanish=_product_vanish)
def product(c: Context) -> None:
    """Couples both operands; how it acts on a basis depends on what the other operand is."""
    operands = tensors(c.op.args[:2])
    couple(c, operands)
    for i, dim in enumerate(c.out()):
        both = len(operands) == 2 and all(_spans(c, operand, i) for operand in operands)
        if not both:
            gauge = Gauge.ANY
        elif any(sinusoid(c, operand) for operand in operands):
            gauge = Gauge.PAIRWISE
        elif any(scale(c, operand) for operand in operands):
            gauge = Gauge.ANY if foldable(c, c.op.outputs[0]) else Gauge.SIGNED
        else:
            gauge = Gauge.PERMUTATION
        c.use(dim, "map", gauge)


def scale(c: Context, arg: Arg) -> bool:
    """Whether a value is a vector of parameters, possibly cast or offset by a number."""
    while isinstance(arg, Ref):
        index = c.program.producer.get(arg.name)
        if index is None:
            return False
        op = c.program.ops[index]
        found = tensors(op.args)
        if len(found) != 1:
            return False
        arg = found[0]
    return isinstance(arg, ParamRef)


@rule("aten.div.Tensor", "aten.div.Scalar", vanish=_quotient_vanish)
def quotient(c: Context) -> None:
    """Couples both operands; the denominator's channels must not vanish."""
    operands = tensors(c.op.args[:2])
    couple(c, operands)
    for i, dim in enumerate(c.out()):
        both = len(operands) == 2 and all(_spans(c, operand, i) for operand in operands)
        c.use(dim, "map", Gauge.PERMUTATION if both else Gauge.ANY)


def _power_vanish(f: Flow) -> Atoms:
    exponent = _number(f.op.arg(1))
    if exponent is not None and exponent < 0:
        return _infinite(f)
    return f.zero(f.op.arg(0)) if exponent is not None and exponent > 0 else frozenset()


@rule("aten.pow.Tensor_Scalar", vanish=_power_vanish)
def power(c: Context) -> None:
    """A square that is only averaged over the whole dimension is the same in any rotation."""
    couple(c, tensors(c.op.args))
    users = c.program.consumers.get(c.op.outputs[0], ())
    rank = len(c.out())
    averaged: set[int] | None = None
    for index in users:
        op = c.program.ops[index]
        dims = op.arg(1)
        if op.target != "aten.mean.dim" or not isinstance(dims, tuple):
            averaged = set()
            break
        found = {d % rank for d in dims if isinstance(d, int)}
        averaged = found if averaged is None else averaged & found
    for i, dim in enumerate(c.out()):
        whole = c.op.arg(1) == 2 and averaged is not None and i in averaged
        c.use(dim, "map", Gauge.ROTATION if whole else Gauge.SIGNED)


def _every_vanish(f: Flow) -> Atoms:
    return _where_all(f, f.op.args[:2])


def _pointwise(c: Context) -> None:
    couple(c, tensors(c.op.args))
    for dim in c.out():
        c.use(dim, "map", Gauge.PERMUTATION)


def _selected_vanish(f: Flow) -> Atoms:
    return _where_all(f, f.op.args[1:3])


def _filled_vanish(f: Flow) -> Atoms:
    return _where_all(f, (f.op.arg(0), f.op.arg(2)))


def _clamp_vanish(f: Flow) -> Atoms:
    low, high = _number(f.op.arg(1)), _number(f.op.arg(2))
    if not all(arg is None or _number(arg) is not None for arg in f.op.args[1:3]):
        return frozenset()
    kept = (low is None or low <= 0) and (high is None or high >= 0)
    return f.zero(f.op.arg(0)) if kept else frozenset()


def _power_of_vanish(f: Flow) -> Atoms:
    f.inexact(f.perhaps(f.op.arg(0)), "a masked channel may become infinite in a power")
    return frozenset()


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge", "__and__", "__or__", "bitwise_and", "bitwise_or")
rule(
    *(f"aten.{name}.{kind}" for name in COMPARISONS for kind in ("Tensor", "Scalar")),
    *("aten.logical_and.default", "aten.logical_or.default"),
    *("aten.floor_divide.default", "aten.remainder.Scalar", "aten.pow.Scalar"),
    vanish=_nothing,
)(_pointwise)
rule("aten.pow.Tensor_Tensor", vanish=_power_of_vanish)(_pointwise)
rule("aten.masked_fill.Scalar", "aten.masked_fill.Tensor", vanish=_filled_vanish)(_pointwise)
rule("aten.clamp.default", "aten.clamp.Tensor", vanish=_clamp_vanish)(_pointwise)
rule(
    *("aten.maximum.default", "aten.minimum.default", "aten.max.other", "aten.min.other"),
    vanish=_every_vanish,
)(_pointwise)
rule("aten.where.self", "aten.where.ScalarOther", vanish=_selected_vanish)(_pointwise)


def is_cast(target: str) -> bool:
    """Whether an operation only changes the element type."""
    return target in CASTS


def cast_type(arg: Arg) -> str | None:
    """Returns the element type an argument names."""
    return arg.name if isinstance(arg, DType) else None
