"""Tables that a model makes of literals alone become tensors of the program."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch

from surgeon.capture.exported import DTYPES, TORCH_DTYPES
from surgeon.ir import Arg, DType, Op, Param, ParamRef, Program, Ref, Sym, TensorType
from surgeon.ir.program import op_refs, substitute_op

LARGEST = 1 << 16
"""Elements of the largest table that is worked out."""
_CHANCE = ("rand", "bernoulli", "normal", "multinomial", "dropout", "empty")


def with_tables(program: Program) -> tuple[Program, dict[str, torch.Tensor]]:
    """Returns the program with float tables that depend on no input as constants, and these.

    Slopes of attention biases are such a table: made of the number of heads while the model runs,
    they could lose no head. As a tensor they carry the heads' axis like any parameter. Numbers
    alone and tables of integers, as of positions and masks, stay as they are.
    """
    known: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    params: list[Param] = []
    constants: dict[str, torch.Tensor] = {}
    ops: list[Op] = []

    def now(arg: Arg) -> Arg:
        return ParamRef(names[arg.name]) if isinstance(arg, Ref) and arg.name in names else arg

    for op in program.ops:
        if _literal(op, known):
            known[op.outputs[0]] = _value(op, known)
            ops.append(op)
            continue
        for ref in op_refs(op):
            table = known.get(ref.name) if isinstance(ref, Ref) else None
            if table is None or ref.name in names or not _wanted(table):
                continue
            scope = program.ops[program.producer[ref.name]].module
            name = f"{scope}.table_{len(names)}" if scope else f"table_{len(names)}"
            names[ref.name] = name
            constants[name] = table
            type_ = TensorType(DTYPES[table.dtype], tuple(table.shape))
            params.append(Param(name, type_, "constant"))
        ops.append(substitute_op(op, now))
    if not names:
        return program, {}
    folded = replace(program, ops=tuple(ops), params=(*program.params, *params))
    return folded.without_dead_code(), constants


def _wanted(table: torch.Tensor) -> bool:
    return table.is_floating_point() and table.numel() > 1


def _literal(op: Op, known: dict[str, torch.Tensor]) -> bool:
    """Whether an operation has one small result that only literals enter."""
    shape = op.types[0].shape
    sizes = [size for size in shape if isinstance(size, int)]
    if len(op.outputs) != 1 or len(sizes) != len(shape) or torch.Size(sizes).numel() > LARGEST:
        return False
    if not op.target.startswith("aten.") or any(word in op.target for word in _CHANCE):
        return False
    if any(isinstance(ref, ParamRef) or ref.name not in known for ref in op_refs(op)):
        return False
    return not any(_dynamic(arg) for arg in (*op.args, *(v for _, v in op.kwargs)))


def _dynamic(arg: Arg) -> bool:
    return isinstance(arg, Sym) or (isinstance(arg, tuple) and any(map(_dynamic, arg)))


def _value(op: Op, known: dict[str, torch.Tensor]) -> torch.Tensor:
    def given(arg: Arg) -> Any:
        match arg:
            case Ref(name):
                return known[name]
            case DType(name):
                return TORCH_DTYPES[name]
            case tuple():
                return [given(item) for item in arg]
            case _:
                return arg

    call: Any = reduce(getattr, op.target.split("."), torch.ops)
    return call(*map(given, op.args), **{name: given(value) for name, value in op.kwargs})
