"""RMSNorm and residual sums, found by their arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from surgeon.emit.ort.graph import Edit, Get, Graph, fresh
from surgeon.emit.ort.match import Look, close, either, kind, number, weight
from surgeon.ir import Arg, Op, ParamRef, Ref

RMS_NORM = "surgeon.rms_norm"
"""`rms_norm(x, weight; eps)` over the last dimension."""

SKIP_RMS_NORM = "surgeon.skip_rms_norm"
"""`skip_rms_norm(x, y, weight; eps)` gives the norm of x + y, and x + y."""

SKIP_LAYER_NORM = "surgeon.skip_layer_norm"
"""`skip_layer_norm(x, y, weight, bias; eps)` gives the norm of x + y, and x + y."""


def _core(look: Look, op: Op) -> tuple[Arg, float, float] | None:
    """Returns x, eps and c of `x · rsqrt(c · mean(x²) + eps)`."""
    if kind(op) != "mul":
        return None
    for x, r in either(op):
        root = look.op(r, "rsqrt")
        total = look.op(root.arg(0), "add") if root else None
        if root is None or total is None:
            continue
        for mean, bound in either(total):
            eps = number(bound)
            share = 1.0
            scaled = look.op(mean, "mul")
            if scaled is not None and (factor := number(scaled.arg(1))) is not None:
                mean, share = scaled.arg(0), factor
            average = look.op(mean, "mean")
            if eps is None or average is None or share <= 0:
                continue
            last = len(look.shape(average.arg(0))) - 1
            dims, keeps = average.arg(1), average.arg(2)
            square = look.op(average.arg(0), "pow", "square", "mul")
            if dims in ((-1,), (last,)) and keeps is True and square and _squares(square, x):
                return x, eps, share
    return None


def _squares(op: Op, x: Arg) -> bool:
    if op.arg(0) != x:
        return False
    by = op.arg(1)
    return kind(op) == "square" or (kind(op) == "pow" and close(by, 2.0)) or by == x


def rms_norms(graph: Graph) -> Graph:
    """Returns the graph with every RMSNorm as one operation, its correction by a mean folded in.

    `x · rsqrt(c·mean + eps) · w` is the norm with eps/c and the weight w/√c.
    """
    look, edit = Look(graph.program), Edit(graph)
    for index, op in enumerate(graph.program.ops):
        if kind(op) == "rms_norm":
            shape, scale, eps = op.arg(1), weight(op.arg(2)), number(op.arg(3))
            found = (op.arg(0), torch.finfo(torch.float32).eps if eps is None else eps, 1.0)
            if not isinstance(shape, tuple) or len(shape) != 1:
                continue
        else:
            found, scale = _core(look, op), None
            if found is None and kind(op) == "mul":
                for a, b in either(op):
                    inner, scale = look.op(b, "mul"), weight(a)
                    if scale is not None and inner is not None and len(look.shape(a)) == 1:
                        found = _core(look, inner)
                        break
        if found is None:
            continue
        x, eps, share = found
        size = look.shape(x)[-1]
        if not isinstance(size, int) or (scale and look.shape(ParamRef(scale)) != (size,)):
            continue
        scaled = _scaled(edit, scale, share, size)
        edit.ops[index] = (
            replace(op, target=RMS_NORM, args=(x, scaled), kwargs=(("eps", eps / share),)),
        )
    return _before_transposes(edit.done())


def _scaled(edit: Edit, name: str | None, share: float, size: int) -> ParamRef:
    if name is not None and share == 1.0:
        return ParamRef(name)

    def compute(get: Get) -> torch.Tensor:
        base = torch.ones(size) if name is None else get(name)
        return base / math.sqrt(share)

    return edit.tensor(f"{name or 'ones'}.{size}.{share:.9g}", (size,), compute)


def _before_transposes(graph: Graph) -> Graph:
    """Norms of heads that were moved first happen before: the move then meets the attention."""
    look, edit, taken = Look(graph.program), Edit(graph), set[str]()
    for index, op in enumerate(graph.program.ops):
        moved = look.op(op.arg(0), "transpose") if op.target == RMS_NORM else None
        if moved is None or not look.only_use(op.arg(0)) or set(moved.args[1:]) != {1, 2}:
            continue
        type_ = graph.program.type_of(moved.arg(0))
        name = fresh(graph.program, op.outputs[0] + "_rows", taken)
        norm = replace(op, outputs=(name,), types=(type_,), args=(moved.arg(0), op.arg(1)))
        edit.ops[index] = (norm, replace(moved, outputs=op.outputs, args=(Ref(name), 1, 2)))
    return edit.done()


def skip_norms(graph: Graph) -> Graph:
    """Returns the graph with a sum and the norm of it as one operation.

    It takes the sum's place: what it needs besides is parameters.
    """
    look, edit, taken = Look(graph.program), Edit(graph), set[str]()
    done: set[str] = set()
    for op in graph.program.ops:
        plain = kind(op) == "layer_norm"
        if op.target != RMS_NORM and not plain:
            continue
        x = op.arg(0)
        total = look.op(x, "add")
        if total is None or not isinstance(x, Ref) or x.name in done or len(look.shape(x)) != 3:
            continue
        a, b = total.arg(0), total.arg(1)
        tensors = isinstance(a, Ref) and isinstance(b, Ref) and len(total.args) == 2
        if not tensors or total.kwargs or look.shape(a) != look.shape(b):
            continue
        if plain and not _hidden_norm(look, op):
            continue
        done.add(x.name)
        name = fresh(graph.program, x.name + "_sum", taken)
        eps = op.kwarg("eps") if not plain else op.arg(4, 1e-5)
        fused = Op(
            (op.outputs[0] + "_fused", name),
            (op.types[0], total.types[0]),
            SKIP_LAYER_NORM if plain else SKIP_RMS_NORM,
            (a, b, *((op.arg(2), op.arg(3)) if plain else (op.arg(1),))),
            (("eps", eps),),
            op.module,
            op.source,
        )
        edit.ops[graph.program.producer[x.name]] = (fused,)
        edit.same[op.outputs[0]] = Ref(fused.outputs[0])
        edit.same[x.name] = Ref(name)
    return edit.done()


def _hidden_norm(look: Look, op: Op) -> bool:
    """Whether a LayerNorm is over the last dimension, with a weight and a bias."""
    shape = op.arg(1)
    both = weight(op.arg(2)) is not None and weight(op.arg(3)) is not None
    return isinstance(shape, tuple) and len(shape) == 1 and both
