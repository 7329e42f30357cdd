"""Views along one axis, against a decoder that takes every element by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.axes import Axes, Axis, analyse
from surgeon.axes.channels import occurrences
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.axes.space import Expr, Sum
from surgeon.axes.space import occurrences as found_in
from surgeon.capture.model import capture_model
from surgeon.ir import Param, Program, TensorType
from surgeon.runtime.apply import masked
from tests import models

pytestmark = pytest.mark.slow

SIZES = (2, 3, 2, 3, 4)
Places = list[tuple[int, dict[int, int], int]]


def width(expr: Expr, sizes: Any) -> int:
    return prod(
        sum(width(part, sizes) for part in f.parts) if isinstance(f, Sum) else sizes[f]
        for f in expr
    )


def decode(expr: Expr, index: int, sizes: Any, outer: dict[int, int]) -> Places:
    """Each axis at one element: (axis, digits of the axes around it, its own digit)."""
    out: Places = []
    around = dict(outer)
    rest = width(expr, sizes)
    for factor in expr:
        rest //= width((factor,), sizes)
        here, index = divmod(index, rest)
        if isinstance(factor, Sum):
            for part in factor.parts:
                if here < (size := width(part, sizes)):
                    out += decode(part, here, sizes, around)
                    break
                here -= size
        else:
            out.append((factor, dict(around), here))
            around[factor] = here
    return out


def by_element(axes: Axes, axis: Axis, param: str, tensor: np.ndarray) -> np.ndarray:
    """The sum of every element at each index of an axis, element by element."""
    outer = [axes.number[name] for name in axis.outer]
    out = np.zeros((*(axes.by_name[n].size for n in axis.outer), axis.size))
    whole = tuple(f for expr in axes.param_dims(param) for f in expr)
    for index, value in enumerate(tensor.reshape(-1)):
        for number, around, digit in decode(whole, index, axes.sizes, {}):
            if number == axes.number[axis.name]:
                out[(*(around[o] for o in outer), digit)] += value
    return out


def by_views(axes: Axes, axis: Axis, param: str, tensor: Any) -> np.ndarray:
    total: Any = 0.0
    for view in occurrences(axes, axis, param, tensor):
        assert tuple(view.shape[:-1]) == (
            *(axes.by_name[name].size for name in axis.outer),
            axis.size,
        )
        total = total + np.asarray(view.sum(-1))
    return total


@cache
def analysed(name: str) -> Axes:
    return analyse(capture_model(models.tiny(name)).program)


def expressions(depth: int = 2) -> st.SearchStrategy[Expr]:
    """Random products and sums; no axis lies within itself."""

    @st.composite
    def draw_expr(draw: Any, free: frozenset[int], left: int) -> Expr:
        out: list[Any] = []
        for _ in range(draw(st.integers(1, 2 if left else 1))):
            if left and draw(st.booleans()):
                parts = draw(st.lists(draw_expr(free, left - 1), min_size=2, max_size=3))
                out.append(Sum(tuple(parts)))
                free -= {a for part in parts for a, _ in found_in(part)}
            elif free:
                atom = draw(st.sampled_from(sorted(free)))
                out.append(atom)
                free -= {atom}
        return tuple(out)

    return draw_expr(frozenset(range(len(SIZES))), depth)


def axes_of(dims: tuple[Expr, ...]) -> Axes:
    """Axes of a program of one parameter, enclosed as they are there."""
    shape = tuple(width(expr, SIZES) for expr in dims)
    program = Program(params=(Param("w", TensorType("f32", shape), "parameter"),))
    around: dict[int, tuple[int, ...]] = {}
    for atom, outer in found_in(tuple(f for expr in dims for f in expr)):
        once = tuple(o for o in outer if outer.count(o) == 1 and o != atom)
        around[atom] = tuple(o for o in around.get(atom, once) if o in once)
    named = {n: f"x{n}" for n in around}
    axes = {
        n: Axis(named[n], "x", SIZES[n], "", (), tuple(named[o] for o in outer))
        for n, outer in around.items()
    }
    return replace(
        analyse(program),
        axes=tuple(axes.values()),
        dims={"$w": dims},
        numbered=axes,
        sizes=dict(enumerate(SIZES)),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(expressions(), min_size=1, max_size=2))
def test_views_hold_each_element_once_for_each_index_it_is_at(dims: list[Expr]):
    shape = [width(expr, SIZES) for expr in dims]
    if prod(shape) > 3000:
        dims, shape = dims[:1], shape[:1]
    axes = axes_of(tuple(dims))
    tensor = torch.rand(shape, dtype=torch.float64)
    for axis in axes.axes:
        wanted = by_element(axes, axis, "w", tensor.numpy())
        np.testing.assert_allclose(by_views(axes, axis, "w", tensor), wanted)
        np.testing.assert_allclose(by_views(axes, axis, "w", tensor.numpy()), wanted)


def cuts(axes: Axes, axis: Axis) -> Iterator[tuple[tuple[int, ...], Any]]:
    """For each index (in each place, where places choose for themselves) its own removal."""
    outer = tuple(axes.by_name[n].size for n in axis.outer)
    for place in np.ndindex(*outer):
        for index in range(axis.size):
            kept = np.array([[j for j in range(axis.size) if j != 0]] * prod(outer))
            kept = kept.reshape(*outer, axis.size - 1)
            kept[place] = [j for j in range(axis.size) if j != index]
            yield (*place, index), cut(axis, kept, axis.outer)


@pytest.mark.parametrize("role", ["kv_heads", "q_per_kv", "v", "rotary", "ffn"])
def test_a_view_is_what_removing_the_index_would_zero(role: str):
    """The same from the other side: against what a plan masks, on fused and plain weights."""
    for name in ("Llama", "Phi3"):
        axes = analysed(name)
        axis = axes.of_role(role)[0]
        for param in dict.fromkeys(m.param for m in axis.members):
            if not param.endswith(("proj.weight", "inv_freq")):
                continue
            shape = axes.program.param[param].type.shape
            tensor = torch.randint(0, 99, shape).double()
            found = by_views(axes, axis, param, tensor)
            everywhere = found[..., 0].sum()
            for where, one in cuts(axes, axis):
                left = masked(Selection(axes, Plan((one,))), param, tensor).sum()
                elsewhere = everywhere - found[(*where[:-1], 0)]
                assert tensor.sum() - left == found[where] + elsewhere


def test_a_parameter_without_the_axis_has_no_view():
    axes = analysed("Llama")
    (first, _) = axes.of_role("ffn")
    assert not list(occurrences(axes, first, "model.norm.weight", torch.rand(48)))


def test_views_share_the_memory_of_numpy_and_torch_alike():
    axes = analysed("Phi3")
    axis = axes.of_role("ffn")[0]
    name = next(m.param for m in axis.members if "gate_up" in m.param)
    tensor = torch.randn(axes.program.param[name].type.shape)
    gate, up = occurrences(axes, axis, name, tensor)
    half = tensor.shape[0] // 2
    assert torch.equal(gate, tensor[:half]) and torch.equal(up, tensor[half:])
    for ours, theirs in zip(occurrences(axes, axis, name, tensor.numpy()), (gate, up), strict=True):
        assert isinstance(ours, np.ndarray) and np.array_equal(ours, theirs.numpy())
