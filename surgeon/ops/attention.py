"""Attention: the relation of query heads, key/value heads and their widths."""

from __future__ import annotations

from dataclasses import replace

from surgeon.axes.space import Expr
from surgeon.ir.program import Op, ParamRef, Ref
from surgeon.ops.linear import BOTH_LIVE
from surgeon.ops.rule import Atoms, Context, Flow, Gauge, Rebuild, rule, vanishing, wherever


def _vanish(f: Flow) -> Atoms:
    """The result vanishes where values do: attention weights never are zero of themselves."""
    q, k, v = f.op.arg(0), f.op.arg(1), f.op.arg(2)
    f.inexact(f.at(q, -1) - f.zero(q) - f.zero(k), BOTH_LIVE)
    f.inexact((f.at(k, -2) | f.at(q, -2)), "softmax normalises over it")
    rank = len(f.out())
    return wherever(f, [Atoms() if d == -2 else vanishing(f, v, d) for d in range(-rank, 0)])


Operands = tuple[tuple[Expr, ...], ...]
"""Expressions of query, key, value and result."""


def _common(c: Context) -> Operands:
    q, k, v, out = (*(c.dims(c.op.arg(i)) for i in range(3)), c.out())
    c.equate(q[-1], k[-1])
    c.equate(out[-1], v[-1])
    c.equate(out[-2], q[-2])
    c.equate(k[-2], v[-2])
    for expr in (q[0], k[0], v[0]):
        c.equate(expr, out[0])
    c.use(q[-1], "contract", Gauge.ANY)
    c.use(v[-1], "batch", Gauge.ANY)
    c.use(k[-2], "normalise", Gauge.PERMUTATION)
    c.use(k[-3], "batch", Gauge.PERMUTATION)
    c.use(q[-3], "batch", Gauge.PERMUTATION)
    c.tag(q[-1], "qk")
    c.tag(v[-1], "v")
    c.tag(q[-3], "q_heads")
    c.tag(k[-3], "kv_heads")
    return q, k, v, out


ATTENTION = "surgeon.attention"

APART = "query heads are dealt out to key/value heads by their numbers"
"""Why neither can be cut by itself where they are told apart."""


@rule(ATTENTION, vanish=_vanish)
def attention(c: Context) -> None:
    """Query heads are key/value heads times their repetition; widths contract or pass."""
    dims = _common(c)
    q, k = dims[:2]
    heads, kv_heads = c.shape(c.op.arg(0))[1], c.shape(c.op.arg(1))[1]
    assert isinstance(heads, int) and isinstance(kv_heads, int)
    repeat = c.fresh(heads // kv_heads, "repeat")
    c.tag(repeat, "repeated")
    c.equate(q[1], k[1] + repeat)
    _rest(c, dims)


def attention_apart(c: Context) -> None:
    """Query heads and key/value heads are axes of their own, for who gives them another ratio."""
    dims = _common(c)
    q, k = dims[:2]
    c.pin(q[1], APART)
    c.pin(k[1], APART)
    _rest(c, dims)


def _rest(c: Context, operands: Operands) -> None:
    """What heads have to do with the rest, whether or not both kinds are told apart."""
    q, k, v, out = operands
    c.equate(k[1], v[1])
    c.equate(out[1], q[1])
    padding, sinks = c.op.arg(3), c.op.kwarg("sinks")
    if isinstance(padding, Ref | ParamRef):
        dims = c.dims(padding)
        if len(dims) == 2:
            c.equate(dims[0], q[0])
            c.equate(dims[1], k[2])
        else:
            for dim in dims:
                c.pin(dim, "it belongs to an attention mask")
    if isinstance(sinks, Ref | ParamRef):
        # A head that is masked has no values, whatever share its sink takes of the attention.
        c.equate(c.dims(sinks)[0], q[1])


def _keep_scale(r: Rebuild) -> Op:
    """The default scale is derived from the width: once that shrinks it must be a literal."""
    width = r.program.type_of(r.op.arg(0)).shape[-1]
    if r.op.kwarg("scale") is not None or r.operand(r.op.arg(0))[-1] == width:
        return r.op
    assert isinstance(width, int)
    rest = tuple((key, value) for key, value in r.op.kwargs if key != "scale")
    return replace(r.op, kwargs=(*rest, ("scale", float(width) ** -0.5)))


@rule("aten.scaled_dot_product_attention.default", vanish=_vanish, rebuild=_keep_scale)
def scaled_dot_product_attention(c: Context) -> None:
    """Torch's own attention: heads match one to one, repetition was spelled out before."""
    q, k, v, out = _common(c)
    for left in (k, v, out):
        for a, b in zip(left[1:-2], q[1:-2], strict=True):
            c.equate(a, b)
    mask = c.op.arg(3)
    if isinstance(mask, Ref | ParamRef):
        shape, dims = c.shape(mask), c.dims(mask)
        whole = (*q[:-1], k[-2])
        for i in range(1, len(dims) + 1):
            if shape[-i] != 1:
                c.equate(dims[-i], whole[-i])
    if c.op.kwarg("enable_gqa") is True:
        c.pin(q[1], "enable_gqa has no axis rule")
