"""Attention on rows [B, S, heads·d], with the projections of one input packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from surgeon.emit.ort.graph import Edit, Get, Graph, fresh
from surgeon.emit.ort.match import Look, kind, weight
from surgeon.emit.ort.rotary import ROTARY
from surgeon.ir import Arg, Op, Program, Ref, Size, Sym, TensorType

GROUPED = "surgeon.grouped_attention"
"""`grouped_attention(q, k, v, padding, cos, sin; …)` on rows; k and v None where q holds all three.

Keywords: those of the attention, and `heads`, `kv_heads`, `head_dim`. Gives [B, S, heads·head_dim].
"""

HEAD_MULTIPLE = 8
"""Head sizes of GroupQueryAttention are multiples of this (ONNX Runtime 1.31)."""

ROTARY_MULTIPLE = 16
"""Where it turns heads itself, their size and the part that is turned are multiples of this."""


@dataclass(frozen=True)
class _Heads:
    """One operand of an attention: rows or heads, and the tables it is turned by."""

    rows: Arg
    """[B, S, H·d] if that exists already."""
    split: Arg
    """[B, S, H, d], if that exists."""
    heads: Arg
    """[B, H, S, d] before it is turned."""
    tables: tuple[Arg, Arg] | None
    count: int
    size: int


def _turns(look: Look, arg: Arg) -> Op | None:
    """Returns the rotation that makes an operand, if the attention can do it."""
    turned = look.op(arg, ROTARY)
    if turned is None:
        return None
    sizes = (turned.types[0].shape[-1], turned.kwarg("dim"))
    return turned if all(isinstance(s, int) and s % ROTARY_MULTIPLE == 0 for s in sizes) else None


def _heads(look: Look, arg: Arg, turned: Op | None) -> _Heads | None:
    before = turned.arg(0) if turned else arg
    tables = (turned.arg(2), turned.arg(3)) if turned else None
    _, count, _, size = look.shape(before)
    if not isinstance(count, int) or not isinstance(size, int):
        return None
    moved = look.op(before, "transpose")
    split = moved.arg(0) if moved and set(moved.args[1:]) == {1, 2} else None
    viewed = look.op(split, "view", "reshape") if split is not None else None
    flat = viewed.arg(0) if viewed else None
    whole = flat is not None and look.shape(flat)[2:] == (count * size,)
    return _Heads(flat if whole else None, split, before, tables, count, size)


def grouped(graph: Graph) -> Graph:
    """Returns the graph with attentions that GroupQueryAttention can do on rows and packed.

    What it can do: causal; value heads as wide as key heads; widths that are multiples of 8.
    It turns queries and keys by itself where both are turned by the same tables, in multiples
    of 16; otherwise they come turned.
    """
    program = graph.program
    look, edit, taken = Look(program), Edit(graph), set[str]()
    for index, op in enumerate(program.ops):
        if op.target != "surgeon.attention" or op.kwarg("causal") is not True:
            continue
        one, two = (_turns(look, a) for a in op.args[:2])
        # The positions are the same for all: tables and width are what may differ.
        if one is None or two is None or one.args[2:] != two.args[2:] or one.kwargs != two.kwargs:
            one = two = None
        turned = (one, two, None)
        q, k, v = (_heads(look, a, t) for a, t in zip(op.args[:3], turned, strict=True))
        if q is None or k is None or v is None:
            continue
        if not (q.size == k.size == v.size and k.count == v.count):
            continue
        if q.size % HEAD_MULTIPLE or q.count % k.count:
            continue
        sinks = op.kwarg("sinks")
        if sinks is not None and weight(sinks) is None:
            continue
        _replace(edit, look, index, op, (q, k, v), taken)
    return _unmoved(edit.done())


def _replace(
    edit: Edit, look: Look, index: int, op: Op, heads: Sequence[_Heads], taken: set[str]
) -> None:
    program = edit.graph.program
    q, k, v = heads
    batch, _, seq, size = op.types[0].shape
    new: list[Op] = []
    packed = _packed(edit, look, heads, op, taken)
    if packed is not None:
        extra, rows = packed
        new += extra
        operands: tuple[Arg, ...] = (rows, None, None)
    else:
        operands = tuple(_rows(program, h, op, new, taken) for h in heads)
    kwargs = dict(op.kwargs)
    kwargs.update(heads=q.count, kv_heads=k.count, head_dim=q.size)
    out = fresh(program, op.outputs[0] + "_rows", taken)
    type_ = TensorType(op.types[0].dtype, (batch, seq, q.count * v.size))
    args = (*operands, op.arg(3), *(q.tables or (None, None)))
    pairs = tuple(sorted(kwargs.items()))
    new.append(replace(op, outputs=(out,), types=(type_,), target=GROUPED, args=args, kwargs=pairs))
    split = fresh(program, op.outputs[0] + "_heads", taken)
    shape = (batch, seq, q.count, size)
    new.append(_view(op, split, Ref(out), shape))
    new.append(replace(op, target="aten.transpose.int", args=(Ref(split), 1, 2), kwargs=()))
    edit.ops[index] = tuple(new)


def _view(op: Op, name: str, x: Arg, shape: Sequence[Size]) -> Op:
    sizes = tuple(Sym(s) if isinstance(s, str) else s for s in shape)
    type_ = TensorType(op.types[0].dtype, tuple(shape))
    return Op((name,), (type_,), "aten.view.default", (x, sizes), (), op.module, op.source)


def _rows(program: Program, heads: _Heads, op: Op, new: list[Op], taken: set[str]) -> Arg:
    if heads.rows is not None:
        return heads.rows
    batch, _, seq, _ = program.type_of(heads.heads).shape
    split = heads.split
    base = op.outputs[0]
    if split is None:
        name = fresh(program, base + "_split", taken)
        type_ = TensorType(op.types[0].dtype, (batch, seq, heads.count, heads.size))
        moved = (heads.heads, 1, 2)
        new.append(Op((name,), (type_,), "aten.transpose.int", moved, (), op.module, op.source))
        split = Ref(name)
    name = fresh(program, base + "_flat", taken)
    new.append(_view(op, name, split, (batch, seq, heads.count * heads.size)))
    return Ref(name)


def _packed(
    edit: Edit, look: Look, heads: Sequence[_Heads], op: Op, taken: set[str]
) -> tuple[list[Op], Arg] | None:
    """Returns what makes [B, S, (heads + 2·kv)·d] in one piece, if the model does or could."""
    rows = [h.rows for h in heads]
    if any(r is None for r in rows):
        return None
    whole = _cut_from(look, rows)
    if whole is not None:
        return [], whole
    made = [look.op(r, "linear") for r in rows]
    if not all(m and look.only_use(r) for m, r in zip(made, rows, strict=True)):
        return None
    linears = [m for m in made if m is not None]
    x = linears[0].arg(0)
    names = [weight(m.arg(1)) for m in linears]
    if any(m.arg(0) != x for m in linears) or any(n is None for n in names):
        return None
    widths = [look.shape(m.arg(1))[0] for m in linears]
    inner = look.shape(linears[0].arg(1))[1]
    total = sum(w for w in widths if isinstance(w, int))
    weights = [n for n in names if n is not None]
    biases = [weight(m.arg(2)) for m in linears]
    assert isinstance(inner, int)
    args: list[Arg] = [x]
    args.append(edit.tensor("+".join(weights), (total, inner), partial(_joined, weights)))
    if any(biases):
        sizes = [w for w in widths if isinstance(w, int)]
        make = partial(_joined_biases, biases, sizes)
        args.append(edit.tensor("+".join(weights) + ".bias", (total,), make))
    name = fresh(edit.graph.program, op.outputs[0] + "_qkv", taken)
    shape = (*look.shape(x)[:-1], total)
    type_ = TensorType(op.types[0].dtype, shape)
    first = linears[0]
    return [replace(first, outputs=(name,), types=(type_,), args=tuple(args))], Ref(name)


def _joined(names: Sequence[str], get: Get) -> torch.Tensor:
    return torch.cat([get(n) for n in names])


def _joined_biases(names: Sequence[str | None], sizes: Sequence[int], get: Get) -> torch.Tensor:
    pairs = zip(names, sizes, strict=True)
    return torch.cat([torch.zeros(size) if n is None else get(n) for n, size in pairs])


def _cut_from(look: Look, rows: Sequence[Arg]) -> Arg:
    """Returns the value whose three parts, in order and without a gap, these rows are."""
    first = look.op(rows[0], "slice", "split", "chunk", "split_with_sizes")
    base = first.arg(0) if first else None
    if first is None or base is None:
        return None
    if kind(first) == "slice":
        start = 0
        for row in rows:
            width = look.shape(row)[-1]
            if not isinstance(width, int) or not look.slice(row, base, start, start + width):
                return None
            start += width
        return base if start == look.shape(base)[-1] else None
    parts = tuple(Ref(name) for name in first.outputs)
    last = len(look.shape(base)) - 1
    dim = first.arg(2, 0)
    return base if tuple(rows) == parts and dim in (-1, last) else None


def _unmoved(graph: Graph) -> Graph:
    """Heads put back into rows right after the attention are the attention's own rows."""
    look, edit = Look(graph.program), Edit(graph)
    for op in graph.program.ops:
        if kind(op) not in ("view", "reshape"):
            continue
        back = look.op(op.arg(0), "transpose")
        there = look.op(back.arg(0), "transpose") if back else None
        if back is None or there is None or set(back.args[1:]) != set(there.args[1:]):
            continue
        split = look.op(there.arg(0), "view")
        rows = look.op(split.arg(0), GROUPED) if split else None
        if rows is not None and rows.types[0] == op.types[0]:
            edit.same[op.outputs[0]] = Ref(rows.outputs[0])
    return edit.done()
