"""Depth: branches that a residual addition can do without."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.ir.program import ParamRef, Program, Ref, op_refs

ATTENTION = ("surgeon.attention", "aten.scaled_dot_product_attention.default")
SPELLED = (*ATTENTION, "aten.softmax.int", "aten._softmax.default")
DISPATCH = "surgeon.dispatch"
TOPK = "aten.topk.default"
ADD = "aten.add.Tensor"


@dataclass(frozen=True, slots=True)
class Branch:
    """One addend of a residual addition that can be dropped, leaving the others.

    `add` is the index of the addition, `operand` the argument that goes. `params` are the
    parameters that nothing else needs, `ops` the operations; `layer` is the module path of the
    last addition of the sum, which branches of one layer share.
    """

    name: str
    kind: str
    layer: str
    add: int
    operand: int
    ops: tuple[int, ...]
    params: tuple[str, ...]


def _ancestors(program: Program) -> list[int]:
    """For every operation, a bit set of the operations that it depends on, itself included."""
    out: list[int] = []
    for index, op in enumerate(program.ops):
        bits = 1 << index
        for ref in op_refs(op):
            if isinstance(ref, Ref) and ref.name in program.producer:
                bits |= out[program.producer[ref.name]]
        out.append(bits)
    return out


def _attends(program: Program, index: int) -> bool:
    """Whether an operation is attention, or the softmax of one that is spelled out.

    The softmax of a router stands before or after a top-k, with no product in between.
    """
    op = program.ops[index]
    if op.target not in SPELLED:
        return False
    if op.target in ATTENTION:
        return True
    around = [program.producer.get(r.name) for r in op_refs(op) if isinstance(r, Ref)]
    around += program.consumers.get(op.outputs[0], ())
    return not any(i is not None and program.ops[i].target == TOPK for i in around)


def _same_shape(program: Program, index: int) -> bool:
    op = program.ops[index]
    return all(
        isinstance(arg, Ref) and program.types[arg.name].shape == op.types[0].shape
        for arg in (op.arg(0), op.arg(1))
    )


def _addends(program: Program, index: int) -> list[tuple[int, int, str]]:
    """Returns the leaves of a tree of additions as (addition, operand, value)."""
    out: list[tuple[int, int, str]] = []
    for operand in (0, 1):
        ref = program.ops[index].arg(operand)
        assert isinstance(ref, Ref)
        inner = program.producer.get(ref.name)
        single = program.consumers.get(ref.name, ()) == (index,)
        if (
            inner is not None
            and single
            and program.ops[inner].target == ADD
            and _same_shape(program, inner)
        ):
            out += _addends(program, inner)
        else:
            out.append((index, operand, ref.name))
    return out


def _exclusive(program: Program, add: int, value: str) -> list[int]:
    """Returns the operations that only serve the addition `add` by way of `value`."""
    start = program.producer.get(value)
    if start is None or program.consumers[value] != (add,):
        return []
    found = {start}
    order = [start]
    for index in order:
        for ref in op_refs(program.ops[index]):
            if not isinstance(ref, Ref) or ref.name not in program.producer:
                continue
            source = program.producer[ref.name]
            users = {
                u for name in program.ops[source].outputs for u in program.consumers.get(name, ())
            }
            returned = set(program.ops[source].outputs) & set(program.outputs)
            if source not in found and users <= found and not returned:
                found.add(source)
                order.append(source)
    # A source whose last user was found only later needs another look.
    while True:
        more = {
            program.producer[r.name]
            for i in found
            for r in op_refs(program.ops[i])
            if isinstance(r, Ref) and r.name in program.producer
        } - found
        more = {
            s
            for s in more
            if {u for n in program.ops[s].outputs for u in program.consumers.get(n, ())} <= found
            and not set(program.ops[s].outputs) & set(program.outputs)
        }
        if not more:
            return sorted(found)
        found |= more


def find_branches(program: Program) -> tuple[Branch, ...]:
    """Returns the branches of a program in order.

    In a tree of additions the residual is the addend that every other one is computed from; the
    others are branches if they own a weight matrix. A branch that owns an attention is called
    `attention`, any other `mlp`.
    """
    up = _ancestors(program)
    inner: set[int] = set()
    trees: list[tuple[int, list[tuple[int, int, str]]]] = []
    for index in range(len(program.ops) - 1, -1, -1):
        if program.ops[index].target != ADD or index in inner or not _same_shape(program, index):
            continue
        leaves = _addends(program, index)
        inner |= {add for add, _, _ in leaves}
        trees.append((index, leaves))
    out: list[Branch] = []
    names: dict[str, int] = {}
    for top, leaves in reversed(trees):
        made = {value: program.producer.get(value) for _, _, value in leaves}

        def from_(value: str, source: str, made: dict[str, int | None] = made) -> bool:
            """Whether `value` is computed from `source`."""
            at, below = made[source], made[value]
            if below is None:
                return False
            if at is None:
                return True
            return bool(up[below] >> at & 1)

        roots = [
            value
            for _, _, value in leaves
            if all(from_(other, value) for _, _, other in leaves if other != value)
        ]
        if len(roots) != 1 or len(leaves) < 2:
            continue
        for add, operand, value in leaves:
            if value == roots[0]:
                continue
            ops = _exclusive(program, add, value)
            used = {r.name for i in ops for r in op_refs(program.ops[i]) if isinstance(r, ParamRef)}
            own = tuple(
                p.name
                for p in program.params
                if p.name in used and set(program.readers[p.name]) <= set(ops)
            )
            if not any(len(program.param[name].type.shape) > 1 for name in own):
                continue
            kind = "attention" if any(_attends(program, i) for i in ops) else "mlp"
            layer = program.ops[top].module
            base = f"{layer}/{kind}" if layer else kind
            names[base] = names.get(base, 0) + 1
            name = base if names[base] == 1 else f"{base}~{names[base]}"
            out.append(Branch(name, kind, layer, add, operand, tuple(ops), own))
    return tuple(out)
