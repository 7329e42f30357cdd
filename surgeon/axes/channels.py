"""Views of a tensor in which one axis is a dimension of its own."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.space import Expr, Factor, Sum, leaves

Layout = list[Factor]


def occurrences(axes: Axes, axis: Axis, param: str, tensor: Any) -> Iterator[Any]:
    """Yields, for every place where a parameter carries an axis, a view of that place.

    Each view has shape `[*outer sizes, size, rest]`: the enclosing axes of `axis.outer` (1 where
    the parameter doesn't carry one), the axis itself, and everything else flattened.

    Args:
        axes: the axes of the program.
        axis: the axis to isolate.
        param: the parameter's name.
        tensor: its values; anything with `reshape`, `permute` (or `transpose`) and slicing.
    """
    selection = Selection(axes, Plan())
    layout: Layout = [factor for expr in axes.param_dims(param) for factor in expr]
    view = tensor.reshape([selection.full_width((factor,)) for factor in layout] or [1])
    walk = _Walk(axes, selection, axis)
    yield from walk.places(view, layout, range(len(layout)))


def marginals(axes: Axes, axis: Axis, param: str) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Returns by dimension that carries an axis those in which its indices are told apart.

    A sum or maximum over all other dimensions, which can be taken over blocks of rows, holds as
    much of each index as the whole tensor does: see `within`.
    """
    dims = [set(leaves(expr)) for expr in axes.param_dims(param)]
    number, outer = axes.number[axis.name], {axes.number[name] for name in axis.outer}
    return tuple(
        (at, (*(d for d in range(at) if dims[d] & outer), at))
        for at in range(len(dims))
        if number in dims[at]
    )


def within(
    axes: Axes, axis: Axis, param: str, at: int, dims: tuple[int, ...], marginal: Any
) -> Iterator[Any]:
    """Yields, for every place in one dimension where a parameter carries an axis, that place.

    Args:
        axes: the axes of the program.
        axis: the axis to isolate.
        param: the parameter's name.
        at: the dimension.
        dims: those that `marginal` has, `at` the last of them.
        marginal: what is left of the parameter's values.
    """
    selection = Selection(axes, Plan())
    exprs = [axes.param_dims(param)[dim] for dim in dims]
    layout: Layout = [factor for expr in exprs for factor in expr]
    view = marginal.reshape([selection.full_width((factor,)) for factor in layout] or [1])
    start = len(layout) - len(axes.param_dims(param)[at])
    yield from _Walk(axes, selection, axis).places(view, layout, range(start, len(layout)))


def along(axes: Axes, axis: Axis, expr: Expr) -> Iterator[NDArray[np.int64]]:
    """Yields, for every place where a dimension carries an axis, its indices there.

    Each array has shape `[*outer sizes, size, rest]` as in `occurrences` and holds places along
    the dimension that `expr` describes.
    """
    selection = Selection(axes, Plan())
    layout: Layout = list(expr)
    sizes = [selection.full_width((factor,)) for factor in layout]
    view = np.arange(prod(sizes)).reshape(sizes or [1])
    yield from _Walk(axes, selection, axis).places(view, layout, range(len(layout)))


class _Walk:
    def __init__(self, axes: Axes, selection: Selection, axis: Axis) -> None:
        self.axes, self.selection, self.axis = axes, selection, axis
        self.number = axes.number[axis.name]

    def places(self, view: Any, layout: Layout, within: range) -> Iterator[Any]:
        for place in within:
            factor = layout[place]
            if factor == self.number:
                yield _ordered(self.axes, self.axis, view, layout, place)
            elif isinstance(factor, Sum):
                yield from self.parts(view, layout, place, factor)

    def parts(self, view: Any, layout: Layout, place: int, total: Sum) -> Iterator[Any]:
        offset = 0
        for part in total.parts:
            width = self.selection.full_width(part)
            piece = view[(slice(None),) * place + (slice(offset, offset + width),)]
            offset += width
            sizes = [self.selection.full_width((factor,)) for factor in part]
            shape = [*view.shape[:place], *sizes, *view.shape[place + 1 :]]
            inner: Layout = [*layout[:place], *part, *layout[place + 1 :]]
            yield from self.places(piece.reshape(shape), inner, range(place, place + len(part)))


def _ordered(axes: Axes, axis: Axis, view: Any, layout: Layout, place: int) -> Any:
    outer = [axes.number[name] for name in axis.outer]
    # The nearest one before it: a parameter may carry the same axes in another dimension as well.
    places = [max((i for i in range(place) if layout[i] == o), default=-1) for o in outer]
    front = [p for p in places if p >= 0]
    rest = [i for i in range(len(layout)) if i != place and i not in front]
    moved = (
        view.permute(*front, place, *rest)
        if hasattr(view, "permute")
        else view.transpose(*front, place, *rest)
    )
    sizes = [axes.by_name[n].size if p >= 0 else 1 for n, p in zip(axis.outer, places, strict=True)]
    return moved.reshape([*sizes, axis.size, -1])
