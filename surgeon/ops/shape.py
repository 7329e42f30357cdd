"""Operations that only rearrange dimensions."""

from __future__ import annotations

from dataclasses import replace

from surgeon.axes.space import Expr, Extent
from surgeon.ir.program import Arg, Op, Size, Sym
from surgeon.ops.rule import (
    Atoms,
    Context,
    Flow,
    Gauge,
    Rebuild,
    axis_of,
    rule,
    vanishing,
    wherever,
)


def keeps(f: Flow) -> Atoms:
    """A rearranged value vanishes where the original does."""
    return f.zero(f.op.arg(0))


def _equate_all(c: Context, left: tuple[Expr, ...], right: tuple[Expr, ...]) -> None:
    for a, b in zip(left, right, strict=True):
        c.equate(a, b)


def segments(a: tuple[Size, ...], b: tuple[Size, ...]) -> list[tuple[range, range]]:
    """Cuts two shapes of the same elements into the shortest runs of the same size each."""
    found: list[tuple[range, range]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        start_i, start_j = i, j
        left, right = Extent(1), Extent(1)
        while True:
            if i < len(a) and (left.over(right) is None or left == right or j == len(b)):
                if left == right and i > start_i and j > start_j:
                    break
                left, i = left.times(Extent.of(a[i])), i + 1
            elif j < len(b):
                right, j = right.times(Extent.of(b[j])), j + 1
            else:
                break
            if left == right and i > start_i and j > start_j:
                break
        found.append((range(start_i, i), range(start_j, j)))
    return found


def literal_shape(target: Arg, new: tuple[Size, ...], old: tuple[Size, ...]) -> Arg:
    """Returns a shape argument with its numbers replaced where the sizes changed."""
    assert isinstance(target, tuple)
    out: list[Arg] = []
    for given, size, before in zip(target, new, old, strict=True):
        changed = given != -1 and size != before
        out.append((Sym(size) if isinstance(size, str) else size) if changed else given)
    return tuple(out)


def _rebuild_shape(r: Rebuild) -> Op:
    shape = literal_shape(r.op.arg(1), r.shape(), r.op.types[0].shape)
    return replace(r.op, args=(r.op.args[0], shape, *r.op.args[2:]))


@rule(
    *("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default"),
    vanish=keeps,
    rebuild=_rebuild_shape,
)
def view(c: Context) -> None:
    """Couples the row-major products of both shapes, run by run."""
    x, out = c.dims(c.op.arg(0)), c.out()
    for left, right in segments(c.shape(c.op.arg(0)), c.op.types[0].shape):
        a: Expr = tuple(f for i in left for f in x[i])
        b: Expr = tuple(f for i in right for f in out[i])
        c.equate(a, b)


@rule("aten.flatten.using_ints", vanish=keeps)
def flatten(c: Context) -> None:
    """Couples flattened dimensions like a view."""
    view(c)


@rule("aten.transpose.int", vanish=keeps)
def transpose(c: Context) -> None:
    """Swaps two dimensions."""
    x = list(c.dims(c.op.arg(0)))
    i, j = axis_of(c.op.arg(1), len(x)), axis_of(c.op.arg(2), len(x))
    x[i], x[j] = x[j], x[i]
    _equate_all(c, tuple(x), c.out())


@rule("aten.t.default", "aten.numpy_T.default", vanish=keeps)
def reverse(c: Context) -> None:
    """Reverses the dimensions."""
    _equate_all(c, tuple(reversed(c.dims(c.op.arg(0)))), c.out())


@rule("aten.permute.default", vanish=keeps)
def permute(c: Context) -> None:
    """Reorders the dimensions."""
    x, order = c.dims(c.op.arg(0)), c.op.arg(1)
    assert isinstance(order, tuple)
    _equate_all(c, tuple(x[axis_of(d, len(x))] for d in order), c.out())


@rule("aten.unsqueeze.default", vanish=keeps)
def unsqueeze(c: Context) -> None:
    """Adds a dimension of size one."""
    out = list(c.out())
    del out[axis_of(c.op.arg(1), len(out))]
    _equate_all(c, c.dims(c.op.arg(0)), tuple(out))


@rule("aten.squeeze.dim", "aten.squeeze.dims", vanish=keeps)
def squeeze(c: Context) -> None:
    """Drops dimensions of size one."""
    x, out = list(c.dims(c.op.arg(0))), c.out()
    given = c.op.arg(1)
    dims = given if isinstance(given, tuple) else (given,)
    shape = c.shape(c.op.arg(0))
    drop = {d for d in (axis_of(d, len(x)) for d in dims) if shape[d] == 1}
    _equate_all(c, tuple(e for i, e in enumerate(x) if i not in drop), out)


def _expand_vanish(f: Flow) -> Atoms:
    """What is repeated does not vanish along the repetition."""
    x = f.op.arg(0)
    rank = len(f.out())
    return wherever(f, [vanishing(f, x, d) for d in range(-rank, 0)])


@rule("aten.expand.default", vanish=_expand_vanish, rebuild=_rebuild_shape)
def expand(c: Context) -> None:
    """Repeats dimensions of size one: the repetition is an axis of its own."""
    x, out = c.dims(c.op.arg(0)), c.out()
    shape = c.shape(c.op.arg(0))
    offset = len(out) - len(x)
    for i, dim in enumerate(out):
        size = shape[i - offset] if i >= offset else 1
        if size == c.op.types[0].shape[i]:
            if i >= offset:
                c.equate(x[i - offset], dim)
        else:
            c.tag(dim, "repeated")
            c.use(dim, "map", Gauge.PERMUTATION)
