"""Contractions: linear layers and matrix products."""

from __future__ import annotations

from surgeon.ir.program import Arg, Op, ParamRef, Ref
from surgeon.ops.rule import Atoms, Context, Flow, Gauge, rule, vanishing, wherever

SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
PRODUCTS = ("aten.matmul.default", "aten.bmm.default", "aten.baddbmm.default")
MAPS = tuple(
    f"aten.{name}"
    for name in (
        *("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar", "add.Tensor", "tanh.default"),
        *("to.dtype", "dropout.default", "masked_fill.Scalar", "expand.default", "view.default"),
    )
)
"""What may stand between the products of spelled-out attention and its softmax."""
REORDERED = ("aten.transpose.int", "aten.permute.default", "aten.t.default")
BOTH_LIVE = "it is summed over in a product of two activations that don't vanish when masked"


def _is_tensor(arg: Arg) -> bool:
    return isinstance(arg, Ref | ParamRef)


def contracted(f: Flow, left: Atoms, a: Arg, b: Arg) -> None:
    """Records the axes summed over on which neither operand vanishes."""
    f.inexact(left - f.zero(a) - f.zero(b), BOTH_LIVE)


def _linear_vanish(f: Flow) -> Atoms:
    x, w, bias = f.op.arg(0), f.op.arg(1), f.op.arg(2)
    contracted(f, f.at(w, -1), x, w)
    if f.rank(w) != 2:
        return frozenset()
    # A bias has no batch, so that a batch that vanished does so no longer.
    batch = (vanishing(f, x, d) for d in range(f.rank(x) - 1))
    rows = vanishing(f, w, 0)
    if not _is_tensor(bias):
        return wherever(f, (*batch, rows))
    return wherever(f, (*(Atoms() for _ in batch), rows & vanishing(f, bias, -1)))


@rule("aten.linear.default", vanish=_linear_vanish)
def linear(c: Context) -> None:
    """Couples the input's last dimension with the weight's columns, rows with the result."""
    x, w, bias = c.op.arg(0), c.op.arg(1), c.op.arg(2)
    xs, ws, out = c.dims(x), c.dims(w), c.out()
    if len(ws) != 2:
        for dim in (*xs, *ws, *out):
            c.pin(dim, "a product with a vector has no axis rule")
        return
    c.equate(xs[-1], ws[1])
    c.equate(out[-1], ws[0])
    for a, b in zip(xs[:-1], out[:-1], strict=True):
        c.equate(a, b)
        c.use(b, "batch", Gauge.ANY)
    if _is_tensor(bias):
        c.equate(c.dims(bias)[0], ws[0])
    c.use(ws[1], "contract", Gauge.ANY)
    c.use(ws[0], "produce", Gauge.ANY)


def _addmm_vanish(f: Flow) -> Atoms:
    bias, x, w = f.op.arg(0), f.op.arg(1), f.op.arg(2)
    contracted(f, f.at(w, 0), x, w)
    return wherever(
        f,
        (
            vanishing(f, x, 0) & vanishing(f, bias, -2),
            vanishing(f, w, 1) & vanishing(f, bias, -1),
        ),
    )


@rule("aten.addmm.default", vanish=_addmm_vanish)
def addmm(c: Context) -> None:
    """Couples a bias plus a matrix product: the weight is stored input by output."""
    bias, x, w = c.dims(c.op.arg(0)), c.dims(c.op.arg(1)), c.dims(c.op.arg(2))
    out = c.out()
    c.equate(x[1], w[0])
    c.equate(out[1], w[1])
    c.equate(out[0], x[0])
    for k in range(1, len(bias) + 1):
        if c.shape(c.op.arg(0))[-k] != 1 or c.op.types[0].shape[-k] == 1:
            c.equate(bias[-k], out[-k])
    c.use(w[0], "contract", Gauge.ANY)
    c.use(w[1], "produce", Gauge.ANY)
    c.use(x[0], "batch", Gauge.ANY)


def _matmul_vanish(f: Flow) -> Atoms:
    a, b = f.op.arg(0), f.op.arg(1)
    contracted(f, f.at(a, -1), a, b)
    if f.rank(a) < 2 or f.rank(b) < 2:
        return frozenset()
    rank = len(f.out())
    batch = (vanishing(f, a, d) | vanishing(f, b, d) for d in range(-rank, -2))
    return wherever(f, (*batch, vanishing(f, a, -2), vanishing(f, b, -1)))


@rule("aten.matmul.default", "aten.mm.default", "aten.bmm.default", vanish=_matmul_vanish)
def matmul(c: Context) -> None:
    """Couples the last dimension of the left with the last but one of the right."""
    a, b = c.dims(c.op.arg(0)), c.dims(c.op.arg(1))
    out = c.out()
    if len(a) < 2 or len(b) < 2:
        for dim in (*a, *b, *out):
            c.pin(dim, "a matrix product with a vector has no axis rule")
        return
    c.equate(a[-1], b[-2])
    c.equate(out[-2], a[-2])
    c.equate(out[-1], b[-1])
    c.use(a[-1], "contract", Gauge.ANY)
    for arg, dims in ((c.op.arg(0), a), (c.op.arg(1), b)):
        shape = c.shape(arg)
        for k in range(3, len(dims) + 1):
            if shape[-k] != 1 or c.op.types[0].shape[-k] == 1:
                c.equate(out[-k], dims[-k])
    if _is_weight(c, c.op.arg(1)):
        c.use(b[-1], "produce", Gauge.ANY)
        out = out[:-1]
    for dim in out:
        c.use(dim, "batch", Gauge.ANY)
    scores = spelled_attention(c)
    if scores is not None:
        q, k = (c.dims(arg) for arg in _factors(scores))
        c.tag(q[-1], "qk")
        c.tag(b[-1], "v")
        # Of three dimensions the first is the batch times the heads.
        for dim in q[1:-2] or q[:1]:
            c.tag(dim, "q_heads")
        for dim in k[1:-2] or k[:1]:
            c.tag(dim, "kv_heads")


def _is_weight(c: Context, arg: Arg) -> bool:
    """Whether an operand is a parameter, its dimensions perhaps in another order."""
    while isinstance(arg, Ref) and arg.name in c.program.producer:
        op = c.program.ops[c.program.producer[arg.name]]
        if op.target not in REORDERED:
            return False
        arg = op.arg(0)
    return isinstance(arg, ParamRef)


def _factors(product: Op) -> tuple[Arg, Arg]:
    """Returns what a matrix product multiplies."""
    first = 1 if product.target == "aten.baddbmm.default" else 0
    return product.arg(first), product.arg(first + 1)


def _baddbmm_vanish(f: Flow) -> Atoms:
    plus, a, b = f.op.arg(0), f.op.arg(1), f.op.arg(2)
    contracted(f, f.at(a, -1), a, b)
    found = (
        vanishing(f, a, 0) | vanishing(f, b, 0),
        vanishing(f, a, -2),
        vanishing(f, b, -1),
    )
    if f.op.kwarg("beta") == 0:
        return wherever(f, found)
    return wherever(f, [z & vanishing(f, plus, d - 3) for d, z in enumerate(found)])


@rule("aten.baddbmm.default", vanish=_baddbmm_vanish)
def baddbmm(c: Context) -> None:
    """Couples something plus a product of batched matrices: left columns with right rows."""
    plus, a, b = (c.dims(c.op.arg(i)) for i in range(3))
    out, shape = c.out(), c.shape(c.op.arg(0))
    c.equate(a[-1], b[-2])
    for given, found in zip((a[0], b[0], a[1], b[2]), (out[0], out[0], *out[1:]), strict=True):
        c.equate(given, found)
    for k in range(1, len(plus) + 1):
        if shape[-k] != 1 or c.op.types[0].shape[-k] == 1:
            c.equate(plus[-k], out[-k])
    c.use(a[-1], "contract", Gauge.ANY)
    for dim in out:
        c.use(dim, "batch", Gauge.PERMUTATION)


def spelled_attention(c: Context) -> Op | None:
    """Returns the product of queries and keys, if this one weighs values by its softmax.

    Attention that is spelled out is a product, maps on it (scale, cap, mask), a softmax over its
    last dimension, and another product.
    """
    softmax = _upstream(c, c.op.arg(0), SOFTMAX)
    scores = _upstream(c, softmax.arg(0), PRODUCTS) if softmax else None
    if scores is None or not all(isinstance(a, Ref) for a in _factors(scores)):
        return None
    rank = len(c.dims(_factors(scores)[0]))
    # Heads may be folded into the batch for one of the two products.
    return scores if rank > 2 and len(c.out()) > 2 else None


def _upstream(c: Context, arg: Arg, wanted: tuple[str, ...]) -> Op | None:
    """Follows a value up through maps, along first operands, to one of the wanted operations."""
    while isinstance(arg, Ref) and arg.name in c.program.producer:
        op = c.program.ops[c.program.producer[arg.name]]
        if op.target in wanted:
            return op
        if op.target not in MAPS:
            return None
        arg = op.arg(0)
    return None
