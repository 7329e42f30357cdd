"""Attention with a cache: GroupQueryAttention, the standard's operation, or spelled out."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from surgeon.emit.ort.build import CONTRIB, Builder
from surgeon.emit.ort.cache import Steps
from surgeon.emit.ort.grouped import GROUPED
from surgeon.emit.ort.table import lowers
from surgeon.ir import Op, Size


def _number(b: Builder, size: Size) -> int:
    if not isinstance(size, int):
        raise b.refused(f"a width is dynamic: {size}")
    return size


@lowers(GROUPED)
def grouped(b: Builder, op: Op) -> Any:
    """ONNX Runtime's attention on rows, that turns queries and keys and keeps the cache itself."""
    steps: Steps = b.facts["steps"]
    dtype = b.wanted(op)
    kv_heads, size = op.kwarg("kv_heads"), op.kwarg("head_dim")
    assert isinstance(kv_heads, int) and isinstance(size, int)
    slot, past_key, past_value = steps.slot(kv_heads, size, size, shared=True)
    rows = [None if a is None else b.arg(a, dtype) for a in op.args[:3]]
    tables = [None if a is None else b.arg(a, dtype) for a in op.args[4:6]]
    sinks = op.kwarg("sinks")
    attributes: dict[str, Any] = {
        "num_heads": op.kwarg("heads"),
        "kv_num_heads": kv_heads,
        "scale": op.kwarg("scale"),
        "do_rotary": int(tables[0] is not None),
        "rotary_interleaved": 0,
        "local_window_size": op.kwarg("window") or -1,
        "softcap": op.kwarg("softcap") or 0.0,
    }
    operands = [*rows, past_key, past_value, steps.last_key(), steps.total(), *tables]
    if sinks is not None:
        operands += [None, None, b.arg(sinks, dtype)]
    out, key, value = b.node(
        "GroupQueryAttention",
        operands,
        attributes,
        domain=CONTRIB,
        dtype=[dtype] * 3,
        names=["", f"present.{slot.number}.key", f"present.{slot.number}.value"],
    )
    steps.present(slot, key, value)
    return out


@lowers("surgeon.attention")
def attention(b: Builder, op: Op) -> Any:
    """Attention of heads [B, H, S, D] whose cache is what was before and what is new."""
    if op.kwarg("causal") is not True:
        raise b.refused("attention to later tokens can't be computed step by step")
    steps: Steps = b.facts["steps"]
    dtype = b.wanted(op)
    q, k, v = (b.arg(a, dtype) for a in op.args[:3])
    shapes = [b.program.type_of(a).shape for a in op.args[:3]]
    heads, kv_heads = _number(b, shapes[0][1]), _number(b, shapes[1][1])
    if shapes[2][1] != kv_heads:
        raise b.refused("keys and values have different numbers of heads")
    key_width, value_width = _number(b, shapes[1][3]), _number(b, shapes[2][3])
    slot, past_key, past_value = steps.slot(kv_heads, key_width, value_width, shared=False)
    window, sinks = op.kwarg("window"), op.kwarg("sinks")
    visible = steps.visible(window if isinstance(window, int) else None)
    names = [f"present.{slot.number}.key", f"present.{slot.number}.value"]
    if sinks is None:
        out, key, value = b.node(
            "Attention",
            [q, k, v, visible, past_key, past_value],
            {"scale": op.kwarg("scale"), "softcap": op.kwarg("softcap") or 0.0, "is_causal": 0},
            dtype=[dtype] * 3,
            names=["", *names],
        )
    else:
        key = b.node("Concat", [past_key, k], {"axis": 2}, names=names[:1])
        value = b.node("Concat", [past_value, v], {"axis": 2}, names=names[1:])
        extra = b.arg(sinks, dtype)
        out = _with_sinks(b, op, (q, key, value), (heads, kv_heads), visible, extra)
    steps.present(slot, key, value)
    return out


def _with_sinks(
    b: Builder,
    op: Op,
    tensors: tuple[ir.Value, ir.Value, ir.Value],
    heads: tuple[int, int],
    visible: ir.Value,
    sinks: ir.Value,
) -> ir.Value:
    """Softmax with one more score a head that no value answers to, in plain operations."""
    q, k, v = tensors
    dtype, times = b.wanted(op), heads[0] // heads[1]
    groups = b.ints(0, heads[1], times, -1, _number(b, b.program.type_of(op.arg(0)).shape[3]))
    scaled = b.node("Mul", [q, b.arg(op.kwarg("scale"), dtype)])
    apart = b.node("Reshape", [scaled, groups])
    turned = b.node("Transpose", [k], {"perm": [0, 1, 3, 2]})
    scores = b.node("MatMul", [apart, b.node("Unsqueeze", [turned, b.ints(2)])])
    softcap = op.kwarg("softcap")
    if softcap:
        cap = b.arg(softcap, dtype)
        scores = b.node("Mul", [b.node("Tanh", [b.node("Div", [scores, cap])]), cap])
    low = b.const(-65504.0 if dtype == "f16" else -1e38, dtype)
    mask = b.node("Unsqueeze", [visible, b.ints(2)])
    scores = b.node("Where", [mask, scores, low], dtype=dtype)
    sink = b.node("Reshape", [sinks, b.ints(1, heads[1], times, 1, 1)])
    # One more column, as high as the tallest row: it is dropped again after the softmax.
    column = b.node("ReduceMax", [scores, b.ints(4)], {"keepdims": 1})
    column = b.node("Add", [b.node("Mul", [column, b.const(0.0, dtype)]), sink])
    joined = b.node("Softmax", [b.node("Concat", [scores, column], {"axis": 4})], {"axis": 4})
    share = b.node("Slice", [joined, b.ints(0), b.ints(-1), b.ints(4)])
    out = b.node("MatMul", [share, b.node("Unsqueeze", [v, b.ints(2)])])
    return b.node("Reshape", [out, b.ints(0, heads[0], -1, _number(b, op.types[0].shape[3]))])
