"""Channels taken in turns, as pairs of a rotary embedding may be: still axes, and exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from surgeon.axes import Axes, Axis, analyse
from surgeon.axes.plan import Plan, cut
from surgeon.ir import parse, verify
from tests.exactness import Subject, difference

ENDS = "9223372036854775807"


def subject(body: str) -> Subject:
    program = verify(parse("surgeon.program 1\nsymbol batch\n" + body.strip() + "\n"))
    draw = torch.Generator().manual_seed(0)

    def drawn(type_: Any) -> torch.Tensor:
        return torch.randn([5 if s == "batch" else s for s in type_.shape], generator=draw)

    weights: Mapping[str, Any] = {p.name: drawn(p.type) for p in program.params}
    return Subject(analyse(program), weights, tuple(drawn(i.type) for i in program.inputs))


def carrying(axes: Axes, param: str, dim: int = 0) -> list[Axis]:
    return [a for a in axes.axes if (param, dim) in axes.carriers(a)]


def exact(made: Subject, axis: Axis, kept: list[int]) -> None:
    plan = Plan((cut(axis, kept),))
    assert axis.prunable and axis.exact
    assert difference(made.masked(plan), made.original) > 1e-2
    assert made.difference(plan) < 1e-5


TURNED = f"""
input %x: f32[batch, 8]
parameter $a: f32[12, 8]
parameter $b: f32[8, 12]
parameter $angles: f32[6]
%1: f32[batch, 12] = aten.linear.default(%x, $a)
%even: f32[batch, 6] = aten.slice.Tensor(%1, 1, 0, {ENDS}, 2)
%odd: f32[batch, 6] = aten.slice.Tensor(%1, 1, 1, {ENDS}, 2)
%minus: f32[batch, 6] = aten.neg.default(%odd)
%pairs: f32[batch, 6, 2] = aten.stack.default([%minus, %even], -1)
%turned: f32[batch, 12] = aten.flatten.using_ints(%pairs, -2)
%table: f32[12] = aten.repeat_interleave.self_int($angles, 2, 0)
%sin: f32[12] = aten.sin.default(%table)
%2: f32[batch, 12] = aten.mul.Tensor(%turned, %sin)
%3: f32[batch, 8] = aten.linear.default(%2, $b)
return %3
"""


def test_pairs_of_neighbours_go_with_their_angle():
    made = subject(TURNED)
    (pairs,) = carrying(made.axes, "angles")
    assert set(made.axes.carriers(pairs)) == {("a", 0), ("b", 1), ("angles", 0)}
    assert pairs.size == 6
    two = [a for a in carrying(made.axes, "a") if a is not pairs]
    assert [(a.role, a.size, a.prunable) for a in two] == [("pair", 2, False)]
    exact(made, pairs, [0, 3, 4])


COMPLEX = """
input %x: f32[batch, 8]
parameter $a: f32[12, 8]
parameter $b: f32[8, 12]
parameter $angles: f32[6]
%1: f32[batch, 12] = aten.linear.default(%x, $a)
%2: f32[batch, 6, 2] = aten.view.default(%1, [-1, 6, 2])
%3: c64[batch, 6] = aten.view_as_complex.default(%2)
%one: f32[6] = aten.mul.Tensor($angles, $angles)
%turn: c64[6] = aten.polar.default(%one, $angles)
%4: c64[batch, 6] = aten.mul.Tensor(%3, %turn)
%5: f32[batch, 6, 2] = aten.view_as_real.default(%4)
%6: f32[batch, 12] = aten.flatten.using_ints(%5, 1)
%7: f32[batch, 8] = aten.linear.default(%6, $b)
return %7
"""


def test_pairs_turned_as_complex_numbers_go_with_their_angle():
    made = subject(COMPLEX)
    (pairs,) = carrying(made.axes, "angles")
    assert set(made.axes.carriers(pairs)) == {("a", 0), ("b", 1), ("angles", 0)}
    exact(made, pairs, [1, 2])


REPEATED = """
input %x: f32[batch, 8]
parameter $a: f32[3, 8]
parameter $b: f32[8, 6]
parameter $w: f32[6]
%1: f32[batch, 3] = aten.linear.default(%x, $a)
%2: f32[batch, 6] = {repeat}
%3: f32[batch, 6] = aten.mul.Tensor(%2, $w)
%4: f32[batch, 8] = aten.linear.default(%3, $b)
return %4
"""


@pytest.mark.parametrize(
    "repeat",
    ["aten.repeat_interleave.self_int(%1, 2, 1)", "aten.repeat.default(%1, [1, 2])"],
    ids=["each in place", "end to end"],
)
def test_what_is_repeated_and_how_often_are_two_axes(repeat: str):
    made = subject(REPEATED.format(repeat=repeat))
    (channels,) = carrying(made.axes, "a")
    (times,) = (a for a in carrying(made.axes, "b", 1) if a is not channels)
    assert (channels.size, times.size) == (3, 2)
    exact(made, channels, [0, 2])
    exact(made, times, [1])
