"""Whether a program is well formed, by a table of conditions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Arg, Op, ParamRef, Program, Ref, Sym, TensorType, op_refs
from surgeon.ir.text import KINDS

DTYPES = frozenset(
    ["f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool", "f8_e4m3", "f8_e5m2"]
    + ["c64", "u16", "u32", "u64"]
)
# A word before a bracket is a function of sizes, such as Max(1,seq).
_WORD = re.compile(r"[A-Za-z_]\w*\b(?!\()")

Fault = tuple[str, str]
"""The offending value or parameter, and what is wrong with it."""


def _symbols(size: int | str) -> set[str]:
    return set(_WORD.findall(size)) if isinstance(size, str) else set()


def _typed(program: Program) -> Iterator[tuple[str, TensorType]]:
    yield from (("%" + i.name, i.type) for i in program.inputs)
    yield from (("$" + p.name, p.type) for p in program.params)
    for op in program.ops:
        yield from (("%" + n, t) for n, t in zip(op.outputs, op.types, strict=True))


def _arity(program: Program) -> Iterator[Fault]:
    for op in program.ops:
        if not op.outputs or len(op.outputs) != len(op.types):
            name = "%" + op.outputs[0] if op.outputs else op.target
            yield name, f"{len(op.outputs)} results and {len(op.types)} types"


def _unique(program: Program) -> Iterator[Fault]:
    seen: set[str] = set()
    names = ["%" + i.name for i in program.inputs]
    names += ["$" + n for p in program.params for n in (p.name, *p.aliases)]
    names += ["%" + n for op in program.ops for n in op.outputs]
    for name in names:
        if name in seen:
            yield name, "it is defined twice"
        seen.add(name)


def _defined(program: Program) -> Iterator[Fault]:
    known = {i.name for i in program.inputs}
    for op in program.ops:
        for ref in op_refs(op):
            if isinstance(ref, Ref) and ref.name not in known:
                yield "%" + op.outputs[0], f"it reads %{ref.name}, which no earlier line defines"
            if isinstance(ref, ParamRef) and ref.name not in program.param:
                yield "%" + op.outputs[0], f"it reads ${ref.name}, which is not declared"
        known.update(op.outputs)
    for name in program.outputs:
        if name not in known:
            yield "%" + name, "it is returned and never defined"
    if not program.outputs:
        yield "return", "the program returns nothing"


def _dtypes(program: Program) -> Iterator[Fault]:
    for name, type_ in _typed(program):
        if type_.dtype not in DTYPES:
            yield name, f"{type_.dtype} is no element type"


def _sizes(program: Program) -> Iterator[Fault]:
    known = set(program.symbols)
    for name, type_ in _typed(program):
        for size in type_.shape:
            if isinstance(size, int) and size < 0:
                yield name, f"its shape has the size {size}"
            missing = _symbols(size) - known
            if missing:
                yield name, f"its shape uses {min(missing)}, which is no declared symbol"


def _literals(program: Program) -> Iterator[Fault]:
    known = set(program.symbols)

    def syms(arg: Arg) -> Iterator[str]:
        if isinstance(arg, tuple):
            for item in arg:
                yield from syms(item)
        elif isinstance(arg, Sym):
            yield from _symbols(arg.expr)

    for op in program.ops:
        for arg in (*op.args, *(value for _, value in op.kwargs)):
            for symbol in syms(arg):
                if symbol not in known:
                    yield "%" + op.outputs[0], f"an argument uses {symbol}, no declared symbol"


def _static_params(program: Program) -> Iterator[Fault]:
    for p in program.params:
        if p.kind not in KINDS:
            yield "$" + p.name, f"{p.kind} is no kind of parameter"
        if any(not isinstance(size, int) for size in p.type.shape):
            yield "$" + p.name, "a parameter's shape must be numbers"


def _ranks(op: Op, program: Program) -> str | None:
    """What is wrong with an operation's tensors themselves, before their sizes are compared."""
    for index, (least, most) in enumerate(OP_RANKS[op.target]):
        arg = op.arg(index)
        if not isinstance(arg, Ref | ParamRef):
            return f"operand {index} is no tensor"
        rank = len(program.type_of(arg).shape)
        if not least <= rank <= most:
            return f"operand {index} has {rank} dimensions"
    return None


def _linear(op: Op, program: Program) -> str | None:
    x, w = (program.type_of(op.arg(i)) for i in (0, 1))
    if x.shape[-1] != w.shape[-1]:
        return f"its input is {x.shape[-1]} wide and its weight wants {w.shape[-1]}"
    if op.types[0].shape != (*x.shape[:-1], *w.shape[:-1]):
        return "its declared shape does not follow from its operands"
    return None


def _embedding(op: Op, program: Program) -> str | None:
    w, ids = (program.type_of(op.arg(i)) for i in (0, 1))
    if op.types[0].shape != (*ids.shape, w.shape[1]):
        return "its declared shape does not follow from its operands"
    return None


def _attention(op: Op, program: Program) -> str | None:
    q, k, v = (program.type_of(op.arg(i)).shape for i in (0, 1, 2))
    if q[3] != k[3]:
        return f"queries are {q[-1]} wide and keys {k[-1]}"
    if k[1] != v[1]:
        return f"there are {k[1]} key heads and {v[1]} value heads"
    if isinstance(q[1], int) and isinstance(k[1], int) and (not k[1] or q[1] % k[1]):
        return f"{q[1]} query heads are no multiple of {k[1]} key/value heads"
    return None


OP_RANKS: dict[str, tuple[tuple[int, int], ...]] = {
    "aten.linear.default": ((1, 99), (1, 2)),
    "aten.embedding.default": ((2, 2), (0, 99)),
    "surgeon.attention": ((4, 4), (4, 4), (4, 4)),
}
"""The fewest and the most dimensions of each operand that must be a tensor."""

OP_CONDITIONS: dict[str, Callable[[Op, Program], str | None]] = {
    "aten.linear.default": _linear,
    "aten.embedding.default": _embedding,
    "surgeon.attention": _attention,
}


def _shapes(program: Program) -> Iterator[Fault]:
    for op in program.ops:
        condition = OP_CONDITIONS.get(op.target)
        why = (_ranks(op, program) or condition(op, program)) if condition else None
        if why:
            yield "%" + op.outputs[0], why


VALIDITY: tuple[tuple[str, Callable[[Program], Iterator[Fault]]], ...] = (
    ("every operation has as many types as results", _arity),
    ("every name is defined once", _unique),
    ("every use follows its definition", _defined),
    ("every element type is known", _dtypes),
    ("every size is a number or made of declared symbols", _sizes),
    ("every symbolic argument is made of declared symbols", _literals),
    ("every parameter is static", _static_params),
    ("operand shapes agree", _shapes),
)
"""The conditions of a well-formed program, in the order in which they are tried."""


def verify(program: Program) -> Program:
    """Returns `program` if it is well formed.

    Raises:
        SurgeonError: `bad-program`, naming the first offending value and the broken condition.
    """
    for condition, check in VALIDITY:
        for value, why in check(program):
            raise SurgeonError(
                Code.BAD_PROGRAM,
                f"the program is not well formed: {value}",
                at=value,
                why=f"{why} (condition: {condition})",
                try_="report this with the program's text (`surgeon ir MODEL`)",
                data={"value": value, "condition": condition},
            )
    return program
