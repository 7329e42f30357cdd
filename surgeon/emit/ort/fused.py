"""RMSNorm and rotary embeddings, in ONNX Runtime's operations or the standard's."""

from __future__ import annotations

from typing import Any

from surgeon.emit.ort.build import CONTRIB, Builder
from surgeon.emit.ort.norms import RMS_NORM, SKIP_RMS_NORM
from surgeon.emit.ort.rotary import ROTARY
from surgeon.emit.ort.table import lowers
from surgeon.ir import Op


@lowers(RMS_NORM)
def rms_norm(b: Builder, op: Op) -> Any:
    """RMSNorm over the last dimension, in fp32 inside."""
    dtype = b.wanted(op)
    operands = [b.arg(op.arg(0), dtype), b.arg(op.arg(1), dtype)]
    attributes = {"epsilon": op.kwarg("eps"), "axis": -1, "stash_type": 1}
    return b.node("SimplifiedLayerNormalization" if b.contrib else "RMSNormalization",
                  operands, attributes)  # fmt: skip


@lowers(SKIP_RMS_NORM)
def skip_rms_norm(b: Builder, op: Op) -> Any:
    """A sum and its RMSNorm."""
    dtype = b.wanted(op)
    found = b.node(
        "SkipSimplifiedLayerNormalization",
        [b.arg(a, dtype) for a in op.args],
        {"epsilon": op.kwarg("eps")},
        domain=CONTRIB,
        dtype=[dtype, "", "", dtype],
    )
    return found[0], found[3]


@lowers(ROTARY)
def rotary(b: Builder, op: Op) -> Any:
    """Heads [B, H, S, D] turned by their positions."""
    dtype = b.wanted(op)
    x, positions = b.arg(op.arg(0), dtype), b.arg(op.arg(1))
    cos, sin = (b.arg(a, dtype) for a in op.args[2:4])
    width, size = op.kwarg("dim"), op.types[0].shape[-1]
    part = {} if width == size else {"rotary_embedding_dim": width}
    if b.contrib:
        heads = {"num_heads": op.types[0].shape[1]} if part else {}
        return b.node("RotaryEmbedding", [x, positions, cos, sin], {**part, **heads},
                      domain=CONTRIB)  # fmt: skip
    return b.node("RotaryEmbedding", [x, cos, sin, positions], part)
