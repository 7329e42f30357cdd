"""Rewrites that leave fewer operations and no sizes merged: nothing is fused yet."""

from __future__ import annotations

from dataclasses import replace

from surgeon.emit.ort.graph import Edit, Graph
from surgeon.emit.ort.match import kind, number
from surgeon.ir import Arg, Op, Program, Ref, Size, Sym, TensorType
from surgeon.ir.program import substitute_op

_SHAPES = ("view", "reshape", "_unsafe_view", "expand", "to", "contiguous", "clone", "alias")
_ROWWISE = frozenset(
    ["add", "sub", "mul", "div", "pow", "tanh", "relu", "gelu", "silu", "sigmoid", "neg", "exp"]
    + ["linear", "surgeon.matmul", "layer_norm", "rms_norm", "square", "sqrt", "rsqrt"]
)
"""Operations that treat every row alike, whatever dimensions the rows are counted in."""


def tidy(graph: Graph) -> Graph:
    """Returns the graph without identities, repetitions, empty pieces and merged rows."""
    return _once(_identities(_unmerged(_identities(graph))))


def _once(graph: Graph) -> Graph:
    """Computes the same thing once: layers look up the same tables each for itself."""
    edit = Edit(graph)
    known: dict[object, tuple[str, ...]] = {}

    def now(arg: Arg) -> Arg:
        return edit.same.get(arg.name, arg) if isinstance(arg, Ref) else arg

    for op in graph.program.ops:
        found = substitute_op(op, now)
        # 1 and 1.0 and True are equal, and not the same argument.
        key = (found.target, repr(found.args), repr(found.kwargs), found.types)
        first = known.setdefault(key, op.outputs)
        edit.same.update(
            (name, Ref(other))
            for name, other in zip(op.outputs, first, strict=True)
            if name != other
        )
    return edit.done()


def _identities(graph: Graph) -> Graph:
    program, edit = graph.program, Edit(graph)
    for index, op in enumerate(program.ops):
        x = op.arg(0)
        if len(op.outputs) != 1:
            continue
        if kind(op) == "cat" and isinstance(x, tuple):
            left = tuple(a for a in x if 0 not in program.type_of(a).shape)
            if len(left) == 1:
                edit.same[op.outputs[0]] = left[0]
            elif len(left) < len(x):
                edit.ops[index] = (replace(op, args=(left, *op.args[1:])),)
        elif isinstance(x, Ref) and program.type_of(x) == op.types[0]:
            neutral = {"mul": 1.0, "div": 1.0, "add": 0.0, "sub": 0.0}.get(kind(op))
            same = kind(op) in _SHAPES or (neutral is not None and number(op.arg(1)) == neutral)
            if same:
                edit.same[op.outputs[0]] = x
    return edit.done()


def _rows(program: Program) -> tuple[Size, Size] | None:
    """Returns the two sizes that the program's first input counts its rows in."""
    shape = program.inputs[0].type.shape if program.inputs else ()
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _unmerged(graph: Graph) -> Graph:
    """Gives rows that were merged for a matrix product their two dimensions back.

    A graph with `batch*seq` rows needs both sizes at run time to part them again. Nothing is
    changed where an operation needs the rows merged.
    """
    program = graph.program
    rows = _rows(program)
    if rows is None:
        return graph
    merged = {f"{rows[0]}*{rows[1]}", f"{rows[1]}*{rows[0]}"}

    def is_merged(type_: TensorType) -> bool:
        return bool(type_.shape) and type_.shape[0] in merged

    ops: list[Op] = []
    for op in program.ops:
        inside = [a for a in op.args if isinstance(a, Ref) and is_merged(program.type_of(a))]
        if not inside and not any(map(is_merged, op.types)):
            ops.append(op)
            continue
        if kind(op) in _SHAPES:
            shape = op.types[0].shape
            shape = (*rows, *shape[1:]) if is_merged(op.types[0]) else shape
            if shape[:2] != rows:
                return graph
            sizes = tuple(Sym(s) if isinstance(s, str) else s for s in shape)
            args = (op.args[0], sizes)
            ops.append(Op(op.outputs, (TensorType(op.types[0].dtype, shape),), "aten.view.default",
                          args, (), op.module, op.source))  # fmt: skip
            continue
        new = _linear(op)
        if kind(new) not in _ROWWISE or not all(len(t.shape) == 2 for t in new.types):
            return graph
        types = tuple(TensorType(t.dtype, (*rows, *t.shape[1:])) for t in op.types)
        ops.append(replace(new, types=types))
    return Graph(replace(program, ops=tuple(ops)), graph.derived)


def _linear(op: Op) -> Op:
    """Returns `addmm` with a weight that is stored the other way round as what it is to rows."""
    if kind(op) != "addmm" or op.kwarg("alpha", 1) != 1 or op.kwarg("beta", 1) != 1:
        return op
    bias, x, weight = op.args[:3]
    return replace(op, target="surgeon.matmul", args=(x, weight, bias), kwargs=())
