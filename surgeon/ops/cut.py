"""Cutting a dimension into pieces, and joining pieces into a dimension."""

from __future__ import annotations

from dataclasses import replace

from surgeon.axes.space import Expr, Sum
from surgeon.ir.program import Arg, Op, ParamRef, Ref, Size
from surgeon.ops.interleave import in_turns
from surgeon.ops.rule import Atoms, Context, Flow, Rebuild, axis_of, rule
from surgeon.ops.shape import keeps


def _bound(given: Arg, size: int, default: int) -> int | None:
    if given is None:
        return default
    if not isinstance(given, int):
        return None
    return min(max(given + size if given < 0 else given, 0), size)


def _rest(c: Context, dim: int) -> None:
    x = c.dims(c.op.arg(0))
    for k in range(len(c.op.outputs)):
        for i, (a, b) in enumerate(zip(x, c.out(k), strict=True)):
            if i != dim:
                c.equate(a, b)


def _pieces(c: Context, dim: int, sizes: list[int]) -> None:
    """Couples a dimension with the concatenation of its pieces, one for each result."""
    parts: list[Expr] = []
    for k, size in enumerate(sizes):
        part = c.fresh(size, f"part{k}")
        parts.append(part)
        c.equate(part, c.out(k)[dim])
    c.equate(c.dims(c.op.arg(0))[dim], (Sum(tuple(parts)),))
    _rest(c, dim)


def _rebuild_slice(r: Rebuild) -> Op:
    dim = axis_of(r.op.arg(1, 0), len(r.operand(r.op.arg(0))))
    # Where the end is counted from the back, a piece moves though it keeps its size.
    if r.operand(r.op.arg(0))[dim] == r.program.type_of(r.op.arg(0)).shape[dim]:
        return r.op
    if r.op.arg(4, 1) != 1:  # every n-th channel of all, however many there are
        args = (r.op.args[0], dim, r.op.args[2], None, *r.op.args[4:])
        return replace(r.op, args=args)
    start = r.label("before")
    end = start + r.label("piece")
    args = (r.op.args[0], dim, start, end, *r.op.args[4:])
    return replace(r.op, args=args)


def _covers(size: Size, start: int | None, end: int | None, step: Arg) -> bool:
    """Whether a slice takes one channel of every `step`, from the first of them to the last."""
    if not isinstance(size, int) or not isinstance(step, int) or step < 2 or size % step:
        return False
    return start is not None and start < step and end is not None and end > size - step + start


@rule("aten.slice.Tensor", vanish=keeps, rebuild=_rebuild_slice)
def slice_(c: Context) -> None:
    """Cuts a dimension at the slice's ends, or takes every n-th channel of all.

    Any other strided slice, and one at a dynamic place, couples nothing.
    """
    x = c.dims(c.op.arg(0))
    shape = c.shape(c.op.arg(0))
    dim = axis_of(c.op.arg(1, 0), len(x))
    size = shape[dim]
    out_size = c.op.types[0].shape[dim]
    _rest(c, dim)
    if size == out_size:
        c.fresh(0, "before")
        c.equate(c.fresh(size, "piece"), x[dim])
        c.equate(x[dim], c.out()[dim])
        return
    start = _bound(c.op.arg(2), size, 0) if isinstance(size, int) else None
    end = _bound(c.op.arg(3), size, size) if isinstance(size, int) else None
    step = c.op.arg(4, 1)
    if _covers(size, start, end, step):
        assert isinstance(step, int)
        c.equate(in_turns(c, dim, step), c.out()[dim])
        return
    if not isinstance(size, int) or start is None or end is None or step != 1:
        why = (
            "a strided slice picks channels by number"
            if step != 1
            else "a slice at a dynamic place"
        )
        c.pin(x[dim], why)
        c.pin(c.out()[dim], why)
        return
    before, piece = c.fresh(start, "before"), c.fresh(end - start, "piece")
    after = c.fresh(size - end, "after")
    parts = [p for p, n in ((before, start), (piece, end - start), (after, size - end)) if n]
    c.equate(x[dim], (Sum(tuple(parts)),))
    c.equate(piece, c.out()[dim])


def _out_sizes(c: Context, dim: int) -> list[int] | None:
    sizes = [t.shape[dim] for t in c.op.types]
    numbers = [size for size in sizes if isinstance(size, int)]
    return numbers if len(numbers) == len(sizes) else None


def _rebuild_split(r: Rebuild) -> Op:
    """After pruning the pieces may differ: they are then split by their own sizes."""
    given = r.op.arg(2, 0)
    dim = axis_of(given, len(r.shape()))
    if all(r.shape(k) == r.op.types[k].shape for k in range(len(r.op.outputs))):
        return r.op
    sizes = tuple(r.label(f"part{k}") for k in range(len(r.op.outputs)))
    return replace(
        r.op, target="aten.split_with_sizes.default", args=(r.op.args[0], sizes, dim), kwargs=()
    )


@rule(
    *("aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes"),
    "aten.chunk.default",
    vanish=keeps,
    rebuild=_rebuild_split,
)
def split(c: Context) -> None:
    """Cuts a dimension into the pieces that the results are."""
    dim = axis_of(c.op.arg(2, 0), len(c.dims(c.op.arg(0))))
    sizes = _out_sizes(c, dim)
    if sizes is None:
        for dims in (c.dims(c.op.arg(0)), *(c.out(k) for k in range(len(c.op.outputs)))):
            c.pin(dims[dim], "a split at a place known only at run time")
        return
    _pieces(c, dim, sizes)


@rule("aten.unbind.int", vanish=keeps)
def unbind(c: Context) -> None:
    """Takes a dimension apart: its indices become separate results, so it must stay."""
    x = c.dims(c.op.arg(0))
    dim = axis_of(c.op.arg(1, 0), len(x))
    c.pin(x[dim], "each of its channels becomes a value of its own")
    for k in range(len(c.op.outputs)):
        for a, b in zip((*x[:dim], *x[dim + 1 :]), c.out(k), strict=True):
            c.equate(a, b)


@rule("aten.select.int", vanish=keeps)
def select(c: Context) -> None:
    """Picks one channel by number, so that dimension must stay."""
    x = c.dims(c.op.arg(0))
    dim = axis_of(c.op.arg(1), len(x))
    c.pin(x[dim], "one of its channels is picked by number")
    for a, b in zip((*x[:dim], *x[dim + 1 :]), c.out(), strict=True):
        c.equate(a, b)


def _operands(op: Op) -> tuple[Ref | ParamRef, ...]:
    given = op.arg(0)
    assert isinstance(given, tuple)
    return tuple(arg for arg in given if isinstance(arg, Ref | ParamRef))


def _cat_vanish(f: Flow) -> Atoms:
    """A concatenation vanishes on an axis where every piece that carries it does."""
    carried: Atoms = frozenset()
    broken: Atoms = frozenset()
    for arg in _operands(f.op):
        carried |= f.zero(arg)
        broken |= f.carried(arg) - f.zero(arg)
    return carried - broken


@rule("aten.cat.default", "aten.concat.default", vanish=_cat_vanish)
def cat(c: Context) -> None:
    """Joins dimensions into a sum; the others are the same for every piece."""
    out = c.out()
    dim = axis_of(c.op.arg(1, 0), len(out))
    parts: list[Expr] = []
    sizes: list[Size] = []
    for operand in _operands(c.op):
        dims = c.dims(operand)
        if len(dims) != len(out):
            continue  # torch accepts a legacy empty vector among the pieces
        parts.append(dims[dim])
        sizes.append(c.shape(operand)[dim])
        for i, (a, b) in enumerate(zip(dims, out, strict=True)):
            if i != dim:
                c.equate(a, b)
    if all(isinstance(size, int) for size in sizes):
        c.equate(out[dim], (Sum(tuple(parts)),))
        return
    for part in (*parts, out[dim]):
        c.pin(part, "it is joined with a piece whose size is known only at run time")
