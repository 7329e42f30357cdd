"""Products of a value with a parameter: which operations make them, and of what."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.ir.program import ParamRef, Program, Ref

CONTRACT = {
    "aten.linear.default": (0, 1, 1),
    "aten.addmm.default": (1, 2, 0),
    "aten.matmul.default": (0, 1, 0),
    "aten.mm.default": (0, 1, 0),
}
"""Operations that sum over the last dimension of a value against a parameter: which operand is the
value, which the parameter, and which of its dimensions is summed over."""

_BIAS = {"aten.linear.default": 2, "aten.addmm.default": 0}
"""Of these, which operand is added to the product."""


@dataclass(frozen=True)
class Contraction:
    """A parameter that a value is multiplied with.

    Attributes:
        param: its name.
        dim: its dimension that is summed over.
        value: the value whose last dimension is summed over.
        out: what comes of it.
        bias: the parameter that is added to the product by the same operation, if one is.
    """

    param: str
    dim: int
    value: str
    out: str = ""
    bias: str | None = None


def contractions(program: Program) -> tuple[Contraction, ...]:
    """Returns every product of a value with a parameter, in order."""
    found: list[Contraction] = []
    for op in program.ops:
        places = CONTRACT.get(op.target)
        if places is None:
            continue
        value, param = op.arg(places[0]), op.arg(places[1])
        if isinstance(value, Ref) and isinstance(param, ParamRef):
            added = op.arg(_BIAS[op.target]) if op.target in _BIAS else None
            bias = added.name if isinstance(added, ParamRef) else None
            found.append(Contraction(param.name, places[2], value.name, op.outputs[0], bias))
    return tuple(found)
