"""Mixtures of experts: each expert computes what it is sent, and nothing else.

The program has experts as a dimension of every value: all of them see all tokens, and a token's
weight is zero for those that it isn't sent to. What is computed of a token that has weight zero is
zero, if nothing is added to it behind the weights. So a loop over the experts that are used gives
the same sum: each takes the rows whose weight isn't zero, and adds what it makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir

from surgeon.emit.ort.activations import SWISH
from surgeon.emit.ort.build import Builder
from surgeon.emit.ort.match import Look, kind
from surgeon.emit.ort.routing import zeros
from surgeon.emit.ort.table import lowered
from surgeon.ir import Arg, Input, Op, ParamRef, Program, Ref, TensorType
from surgeon.ir.program import op_refs, substitute_op

_KEEPS = frozenset(
    ["neg", "to", "clone", "contiguous", "alias", "relu", "tanh"]
    + ["split", "split_with_sizes", "chunk", "slice"]
)
"""Operations that make zero of zero, of one operand."""

_FREE = frozenset(
    ["add", "sub", "mul", "div", "pow", "exp", "sigmoid", "silu", "gelu", "clamp", "sqrt", "rsqrt"]
    + ["square", "abs", "maximum", "minimum", "softplus", "matmul", SWISH]
)
"""Further operations in which experts and tokens are each by themselves, if dimensions 0 and 1 of
every operand are these, or one."""

ROWS = "rows"
"""The size that stands for the tokens which one expert is sent."""


@dataclass(frozen=True)
class Mixture:
    """The part of a program that computes and adds up what experts make.

    Attributes:
        end: the index of the sum over the experts.
        body: what one expert computes of its tokens: a program whose inputs are tokens
            [1, rows, …], weights [1, rows, 1], and one expert's parameters; its result is what is
            added up.
        tokens: the body's inputs that are values, by what they are in the program.
        share: the input of the body, and the value [experts, tokens, 1], that says which expert
            is sent what.
        params: the body's inputs that are parameters, by their names in the program.
    """

    end: int
    body: Program
    tokens: tuple[str, ...]
    share: str
    params: tuple[str, ...]


def mixtures(program: Program) -> tuple[dict[int, Mixture], frozenset[int]]:
    """Returns the mixtures by the index of the operation that ends each, and all their indices."""
    found: dict[int, Mixture] = {}
    inside: set[int] = set()
    for index, op in enumerate(program.ops):
        if kind(op) != "sum" or op.arg(1) not in (0, (0,)) or op.arg(2, False):
            continue
        made = _mixture(program, index)
        if made is not None:
            found[index] = made[0]
            inside |= made[1]
    return found, frozenset(inside)


def _mixture(program: Program, end: int) -> tuple[Mixture, set[int]] | None:
    """Returns the mixture that a sum ends, and the indices of what it consists of, or None."""
    top = program.ops[end].arg(0)
    shape = program.type_of(top).shape
    if len(shape) != 3 or not isinstance(top, Ref) or not isinstance(shape[0], int):
        return None
    experts, rows = shape[0], shape[1]
    if experts == 1 or not isinstance(rows, str):
        return None
    look = Look(program)
    indices, tokens, params = {end}, dict[str, None](), dict[str, None]()
    share: str | None = None
    left: list[Arg] = [top]
    while left:
        arg = left.pop()
        size = program.type_of(arg).shape
        if isinstance(arg, ParamRef):
            if len(size) == 3 and size[0] == experts and not isinstance(size[1], str):
                params[arg.name] = None
            elif len(size) > 2 and size[0] != 1:
                return None
        elif not isinstance(arg, Ref) or len(size) != 3 or size[1] != rows:
            return None
        elif size[0] == 1:
            tokens[arg.name] = None
        elif size[0] != experts:
            return None
        elif size[2] == 1 and _sent(look, arg):
            if share not in (None, arg.name):
                return None
            share = arg.name
        else:
            index = program.producer[arg.name]
            op = program.ops[index]
            if index in indices:
                continue
            if kind(op) not in _KEEPS | _FREE or _parted(op) not in (2, -1):
                return None
            indices.add(index)
            left.extend(op_refs(op))
    if share is None or _leaks(program, indices, end):
        return None
    body = _body(program, sorted(indices)[:-1], top.name, (*tokens, share), tuple(params))
    if not _vanishes(body, share):
        return None
    return Mixture(end, body, tuple(tokens), share, tuple(params)), indices


def _parted(op: Op) -> Arg:
    """Returns the dimension that an operation takes a part of; the last for all others."""
    place = {"slice": 1, "split": 2, "split_with_sizes": 2, "chunk": 2}.get(kind(op))
    return -1 if place is None else op.arg(place, 0)


def _sent(look: Look, arg: Arg) -> bool:
    """Whether a value is the weights that tokens have for experts, their dimensions arranged."""
    op = look.op(arg, "unsqueeze")
    op = look.op(op.arg(0), "transpose") if op else None
    return op is not None and look.op(op.arg(0), "surgeon.dispatch") is not None


def _leaks(program: Program, indices: set[int], end: int) -> bool:
    """Whether anything else reads what is computed within."""
    inner = [name for i in indices - {end} for name in program.ops[i].outputs]
    readers = {i for name in inner for i in program.consumers.get(name, ())}
    return not readers <= indices or not set(program.outputs).isdisjoint(inner)


def _body(
    program: Program, indices: list[int], top: str, values: tuple[str, ...], params: tuple[str, ...]
) -> Program:
    """Returns the operations as a program of one expert and the rows that it is sent."""

    def smaller(type_: TensorType) -> TensorType:
        return replace(
            type_, shape=(1, *(ROWS if isinstance(s, str) else s for s in type_.shape[1:]))
        )

    def now(arg: Arg) -> Arg:
        return Ref(_own(arg.name)) if isinstance(arg, ParamRef) and arg.name in params else arg

    inputs = [Input(name, smaller(program.types[name])) for name in values]
    inputs += [Input(_own(name), smaller(program.param[name].type)) for name in params]
    ops = tuple(
        substitute_op(replace(op, types=tuple(smaller(t) for t in op.types)), now)
        for op in (program.ops[i] for i in indices)
    )
    return Program((ROWS,), tuple(inputs), program.params, ops, (top,))


def _own(param: str) -> str:
    """Returns what one expert's part of a parameter is called in the body."""
    return f"{param}[expert]"


def _vanishes(body: Program, share: str) -> bool:
    """Whether what is added up is zero wherever the weights are."""
    zero: set[Arg] = {Ref(share)}
    for op in body.ops:
        operands = [a for a in op.args if isinstance(a, Ref | ParamRef)]
        match kind(op):
            case "mul":
                found = not zero.isdisjoint(operands)
            case "add" | "sub":
                found = len(operands) == 2 and zero.issuperset(operands)
            case "matmul" | "div":
                found = op.arg(0) in zero
            case name:
                found = name in _KEEPS and op.arg(0) in zero
        if found:
            zero.update(Ref(out) for out in op.outputs)
    return Ref(body.outputs[0]) in zero


def lower_mixture(b: Builder, mixture: Mixture) -> ir.Value:
    """Adds the loop over the experts that are sent anything, and returns the sum [tokens, out].

    It is added up in fp32: ONNX Runtime's processor kernel knows no other float for it.
    """
    op = b.program.ops[mixture.end]
    dtype, width = b.wanted(op), op.types[0].shape[1]
    assert isinstance(width, int)
    share = b.env[mixture.share]
    sent = b.node("Not", [b.node("Equal", [share, b.const(0.0, b.dtype(share))], dtype="bool")])
    used = b.node("ReduceMax", [b.cast(sent, "i32"), b.ints(1, 2)], {"keepdims": 0})
    used = b.node("Squeeze", [b.node("NonZero", [used], dtype="i64"), b.ints(0)])
    times = b.node("Squeeze", [b.node("Shape", [used]), b.ints(0)])
    none = zeros(b, share, 1, width, "f32")
    with b.inside(mixture.body) as nodes:
        given = [
            b.value(b.name("turn"), "i64", ()),
            b.value(b.name("more"), "bool", ()),
            b.value(b.name("sum"), "f32", None),
        ]
        expert = b.node("Gather", [used, b.node("Unsqueeze", [given[0], b.ints(0)])], {"axis": 0})
        own = b.node("Squeeze", [b.node("Gather", [sent, expert], {"axis": 0}), b.ints(0, 2)])
        places = b.node("NonZero", [own], dtype="i64")
        at = b.node("Squeeze", [places, b.ints(0)])
        one = b.node("Gather", [share, expert], {"axis": 0})
        b.env[mixture.share] = b.node("Gather", [one, at], {"axis": 1})
        for name in mixture.tokens:
            b.env[name] = b.node("Gather", [b.env[name], at], {"axis": 1})
        for name in mixture.params:
            b.env[_own(name)] = b.node("Gather", [b.weight(name), expert], {"axis": 0})
        made = _computed(b, mixture.body)
        made = b.node("Squeeze", [b.cast(made, "f32"), b.ints(0)])
        index = b.node("Transpose", [places], {"perm": [1, 0]})
        total = b.node("ScatterND", [given[2], index, made], {"reduction": "add"})
        more = b.node("Identity", [given[1]])
        body = ir.Graph(given, [more, total], nodes=nodes, name=b.name("expert"))
    start = [times, b.const(True, "bool"), none]
    return b.cast(b.node("Loop", start, {"body": body}, dtype="f32"), dtype)


def _computed(b: Builder, body: Program) -> Any:
    outer = b.op
    for op in body.ops:
        b.op = op
        b.env.update(zip(op.outputs, lowered(b, op), strict=True))
    b.op = outer
    return b.env[body.outputs[0]]
