"""What a change of basis has to know beside the maps: scales that fold into them, and limits."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.axes.axes import Axes, Axis, Reason
from surgeon.axes.space import leaves
from surgeon.ir.program import ParamRef, Ref
from surgeon.ops.pointwise import CASTS
from surgeon.ops.rule import Gauge

_MULTIPLY = "aten.mul.Tensor"
_PASSED = (*CASTS, "aten.slice.Tensor")
"""What may stand between a scaled value and the maps that read it."""


@dataclass(frozen=True)
class Scale:
    """A vector of parameters by which the channels of an axis are multiplied.

    Attributes:
        param: its name.
        readers: the weights that are multiplied with what it scales; nothing else reads that, and
            each of them reads nothing else.
    """

    param: str
    readers: tuple[str, ...]


def scales(axes: Axes, axis: Axis) -> tuple[Scale, ...]:
    """Returns the scales on an axis that can be made part of the maps behind them."""
    out: list[Scale] = []
    alone = ((axes.number[axis.name],),)
    for name in dict.fromkeys(member.param for member in axis.members):
        if axes.param_dims(name) != alone:
            continue
        found = _readers(axes, name)
        if found:
            out.append(Scale(name, found))
    return tuple(out)


def _readers(axes: Axes, name: str) -> tuple[str, ...]:
    """Returns the weights behind the one product that a vector goes into; none if there's more."""
    program = axes.program
    found = program.readers.get(name, ())
    while len(found) == 1:
        op = program.ops[found[0]]
        if op.target == _MULTIPLY:
            return _weights(axes, op.outputs[0]) or ()
        if op.target not in CASTS:
            break
        found = program.consumers.get(op.outputs[0], ())
    return ()


def _weights(axes: Axes, value: str) -> tuple[str, ...] | None:
    """Returns the weights of the linear maps that read a value; None if anything else does."""
    program = axes.program
    out: list[str] = []
    if value in program.outputs:
        return None
    for index in program.consumers.get(value, ()):
        op = program.ops[index]
        weight = op.arg(1)
        if op.target in _PASSED:
            more = _weights(axes, op.outputs[0])
            if more is None:
                return None
            out += more
        elif (
            op.target == "aten.linear.default"
            and op.arg(0) == Ref(value)
            and isinstance(weight, ParamRef)
            and len(program.readers[weight.name]) == 1
        ):
            out.append(weight.name)
        else:
            return None
    return tuple(out)


def limit(axes: Axes, axis: Axis, wanted: Gauge) -> Reason | None:
    """Returns the first operation that doesn't commute with such a change of basis of an axis."""
    if axis.gauge >= wanted:
        return None
    number = axes.number[axis.name]
    for use in axes.facts.uses:
        if use.gauge < wanted and number in leaves(axes.facts.space.resolve(use.expr)):
            op = axes.program.ops[use.op]
            why = f"{op.target} allows no change of its basis but: {use.gauge.text}"
            return Reason(why, op.where)
    return Reason(f"its basis allows no change but: {axis.gauge.text}", axis.name)
