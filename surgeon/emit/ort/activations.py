"""Activations that are spelled out, found by their arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace

from surgeon.emit.ort.graph import Edit, Graph
from surgeon.emit.ort.match import Look, close, either, kind, number
from surgeon.ir import Arg, Op

SWISH = "surgeon.swish"
"""`swish(x; alpha)` is x · sigmoid(alpha · x)."""


def _tanh_gelu(look: Look, op: Op) -> Arg:
    """Returns x of `0.5·x · (1 + tanh(√(2/π) · (x + 0.044715·x³)))`."""
    for half, gate in either(op):
        halved, raised = look.op(half, "mul"), look.op(gate, "add")
        if halved is None or raised is None or not close(halved.arg(1), 0.5):
            continue
        if not close(raised.arg(1), 1.0):
            continue
        x, bent = halved.arg(0), look.op(raised.arg(0), "tanh")
        inner = look.op(bent.arg(0), "mul") if bent else None
        if inner is None or not close(inner.arg(1), math.sqrt(2 / math.pi)):
            continue
        total = look.op(inner.arg(0), "add")
        cubic = look.op(total.arg(1), "mul") if total and total.arg(0) == x else None
        cube = look.op(cubic.arg(0), "pow") if cubic and close(cubic.arg(1), 0.044715) else None
        if cube is not None and cube.arg(0) == x and close(cube.arg(1), 3.0):
            return x
    return None


def _swish(look: Look, op: Op) -> tuple[Arg, float] | None:
    """Returns x and α of `x · sigmoid(α·x)`."""
    for x, gate in either(op):
        squashed = look.op(gate, "sigmoid")
        if squashed is None:
            continue
        if squashed.arg(0) == x:
            return x, 1.0
        scaled = look.op(squashed.arg(0), "mul")
        alpha = number(scaled.arg(1)) if scaled and scaled.arg(0) == x else None
        if alpha is not None:
            return x, alpha
    return None


def activations(graph: Graph) -> Graph:
    """Returns the graph with GELU by tanh and x·sigmoid(α·x) as one operation each."""
    look, edit = Look(graph.program), Edit(graph)
    for index, op in enumerate(graph.program.ops):
        if kind(op) == "silu":
            edit.ops[index] = (replace(op, target=SWISH, kwargs=(("alpha", 1.0),)),)
        if kind(op) != "mul":
            continue
        x = _tanh_gelu(look, op)
        if x is not None:
            args, kwargs = (x,), (("approximate", "tanh"),)
            gelu = replace(op, target="aten.gelu.default", args=args, kwargs=kwargs)
            edit.ops[index] = (gelu,)
            continue
        gated = _swish(look, op)
        if gated is not None:
            edit.ops[index] = (
                replace(op, target=SWISH, args=(gated[0],), kwargs=(("alpha", gated[1]),)),
            )
    return edit.done()
