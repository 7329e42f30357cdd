"""Matrix products and lookups."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from surgeon.emit.ort.build import CONTRIB, Builder
from surgeon.emit.ort.table import lowers
from surgeon.ir import Op, ParamRef


def _transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.t()


def _looked_up(b: Builder, name: str) -> bool:
    """Whether rows of the parameter are looked up too: then it is stored once, as it is."""
    return any(
        b.program.ops[i].target == "aten.embedding.default" for i in b.program.readers.get(name, ())
    )


def product(b: Builder, x: ir.Value, weight: str) -> ir.Value:
    """Returns x times a stored weight [out, in], transposed in the file or by the operation."""
    if not _looked_up(b, weight):
        return b.node("MatMul", [x, b.weight(weight, change=".T", make=_transposed)])
    table = b.weight(weight)
    if b.contrib:
        return b.node("FusedMatMul", [x, table], {"transB": 1, "alpha": 1.0}, domain=CONTRIB)
    return b.node("MatMul", [x, b.node("Transpose", [table], {"perm": [1, 0]})])


@lowers("aten.linear.default")
def linear(b: Builder, op: Op) -> Any:
    """The product x · Wᵀ, and a bias."""
    x, weight = b.arg(op.arg(0), b.wanted(op)), op.arg(1)
    if not isinstance(weight, ParamRef):
        raise b.refused("its weight is computed from the inputs")
    out = product(b, x, weight.name)
    return out if op.arg(2) is None else b.node("Add", [out, b.arg(op.arg(2), b.wanted(op))])


@lowers("surgeon.matmul")
def stored(b: Builder, op: Op) -> Any:
    """The product x · W with a weight [in, out] and a bias."""
    dtype = b.wanted(op)
    out = b.node("MatMul", [b.arg(op.arg(0), dtype), b.arg(op.arg(1), dtype)])
    return b.node("Add", [out, b.arg(op.arg(2), dtype)])


@lowers("aten.matmul.default", "aten.bmm.default", "aten.mm.default")
def matmul(b: Builder, op: Op) -> Any:
    """A product of two values."""
    dtype = b.wanted(op)
    return b.node("MatMul", [b.arg(op.arg(0), dtype), b.arg(op.arg(1), dtype)])


@lowers("aten.addmm.default")
def addmm(b: Builder, op: Op) -> Any:
    """A product and a bias."""
    if op.kwarg("alpha", 1) != 1 or op.kwarg("beta", 1) != 1:
        raise b.refused("factors of the product or the bias have no rule")
    dtype = b.wanted(op)
    out = b.node("MatMul", [b.arg(op.arg(1), dtype), b.arg(op.arg(2), dtype)])
    return b.node("Add", [out, b.arg(op.arg(0), dtype)])


@lowers("aten.embedding.default")
def embedding(b: Builder, op: Op) -> Any:
    """Rows of a table."""
    return b.node("Gather", [b.arg(op.arg(0), b.wanted(op)), b.arg(op.arg(1))], {"axis": 0})
