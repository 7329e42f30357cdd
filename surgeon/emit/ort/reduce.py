"""Averages, sums, softmax and norms that are no RMSNorm."""

from __future__ import annotations

from typing import Any

from surgeon.emit.ort.build import CONTRIB, Builder
from surgeon.emit.ort.norms import SKIP_LAYER_NORM
from surgeon.emit.ort.table import lowers
from surgeon.ir import Arg, Op

_REDUCE = {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}


def _dims(b: Builder, op: Op, arg: Arg) -> list[int]:
    shape = b.program.type_of(op.arg(0)).shape
    given = arg if isinstance(arg, tuple) and arg else tuple(range(len(shape)))
    dims = [d % len(shape) for d in given if isinstance(d, int)]
    if any(isinstance(shape[d], str) for d in dims):
        raise b.refused("it is taken over a dynamic size, of which a step sees a part only")
    return dims


@lowers("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default")
def reduce(b: Builder, op: Op) -> Any:
    """One number in the place of several."""
    dims = b.ints(*_dims(b, op, op.arg(1)))
    keep = int(op.arg(2, False) is True)
    x = b.arg(op.arg(0), b.wanted(op))
    return b.node(_REDUCE[op.target.split(".")[1]], [x, dims], {"keepdims": keep})


@lowers("aten.softmax.int", "aten._softmax.default")
def softmax(b: Builder, op: Op) -> Any:
    """Softmax over a dimension of a fixed size."""
    (dim,) = _dims(b, op, (op.arg(1),))
    return b.node("Softmax", [b.arg(op.arg(0), b.wanted(op))], {"axis": dim})


@lowers("aten.layer_norm.default")
def layer_norm(b: Builder, op: Op) -> Any:
    """LayerNorm over the last dimensions."""
    shape = op.arg(1)
    assert isinstance(shape, tuple)
    dtype = b.wanted(op)
    if op.arg(2) is not None:
        weight = b.arg(op.arg(2), dtype)
    elif len(shape) == 1 and isinstance(shape[0], int):
        weight = b.const([1.0] * shape[0], dtype)
    else:
        raise b.refused("a norm over several dimensions without a weight has no rule")
    bias = None if op.arg(3) is None else b.arg(op.arg(3), dtype)
    return b.node(
        "LayerNormalization",
        [b.arg(op.arg(0), dtype), weight, bias],
        {"axis": -len(shape), "epsilon": op.arg(4, 1e-5)},
    )


@lowers(SKIP_LAYER_NORM)
def skip_layer_norm(b: Builder, op: Op) -> Any:
    """A sum and its LayerNorm."""
    dtype = b.wanted(op)
    operands = [b.arg(a, dtype) for a in op.args]
    found = b.node(
        "SkipLayerNormalization",
        operands,
        {"epsilon": op.kwarg("eps")},
        domain=CONTRIB,
        dtype=[dtype, "", "", dtype],
    )
    return found[0], found[3]
