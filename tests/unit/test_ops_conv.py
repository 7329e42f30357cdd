"""Channels of convolutions are axes; kernels and places of an image stay."""

from __future__ import annotations

from surgeon.axes import Axis
from surgeon.axes.plan import Plan, cut
from tests.exactness import Subject
from tests.unit.test_ops_interleave import carrying, exact, subject

NETWORK = """
input %x: f32[2, 3, 8, 8]
parameter $w: f32[6, 3, 3, 3]
parameter $bias: f32[6]
parameter $scale: f32[6]
parameter $shift: f32[6]
buffer $mean: f32[6]
buffer $var: f32[6]
parameter $deep: f32[6, 1, 3, 3]
parameter $head: f32[5, 96]
%1: f32[2, 6, 8, 8] = aten.conv2d.default(%x, $w, $bias, [1, 1], [1, 1], [1, 1], 1)
%2: f32[2, 6, 8, 8] = aten.batch_norm.default(%1, $scale, $shift, $mean, $var, False, 0.1, 0.1, True)
%3: f32[2, 6, 8, 8] = aten.relu.default(%2)
%4: f32[2, 6, 8, 8] = aten.conv2d.default(%3, $deep, None, [1, 1], [1, 1], [1, 1], 6)
%5: f32[2, 6, 4, 4] = aten.max_pool2d.default(%4, [2, 2])
%6: f32[2, 96] = aten.flatten.using_ints(%5, 1)
%7: f32[2, 5] = aten.linear.default(%6, $head)
return %7
"""  # noqa: E501


def positive(made: Subject) -> Subject:
    made.weights["var"].abs_()
    return made


def channels(made: Subject) -> Axis:
    (axis,) = (a for a in carrying(made.axes, "w") if a.role == "channels")
    return axis


def test_a_channel_goes_with_its_norm_its_depthwise_kernel_and_its_places_in_the_head():
    made = positive(subject(NETWORK))
    axis = channels(made)
    carried = {name for name, _ in made.axes.carriers(axis)}
    assert carried == {"w", "bias", "scale", "shift", "mean", "var", "deep", "head"}
    exact(made, axis, [0, 2, 5])
    program, weights = made.small(Plan((cut(axis, [0, 2, 5]),)))
    assert weights["head"].shape == (5, 48)
    assert [op.arg(6) for op in program.ops if "conv2d" in op.target] == [1, 3]


def test_kernels_places_and_the_image_stay():
    axes = positive(subject(NETWORK)).axes
    for dim in (1, 2, 3):
        assert all(not a.prunable for a in carrying(axes, "w", dim))
    assert {a.role for a in carrying(axes, "w", 2)} == {"kernel"}
    places = [a for a in carrying(axes, "head", 1) if a.role != "channels"]
    assert [a.size for a in places] == [4, 4] and not any(a.prunable for a in places)


GROUPED = """
input %x: f32[2, 3, 4, 4]
parameter $a: f32[6, 3, 1, 1]
parameter $b: f32[8, 3, 1, 1]
parameter $c: f32[5, 8, 1, 1]
%1: f32[2, 6, 4, 4] = aten.conv2d.default(%x, $a, None, [1, 1], [0, 0], [1, 1], 1)
%2: f32[2, 8, 4, 4] = aten.conv2d.default(%1, $b, None, [1, 1], [0, 0], [1, 1], 2)
%3: f32[2, 8, 4, 4] = aten.relu.default(%2)
%4: f32[2, 5, 4, 4] = aten.conv2d.default(%3, $c, None, [1, 1], [0, 0], [1, 1], 1)
return %4
"""


def test_groups_and_what_is_in_them_are_axes_of_their_own():
    made = subject(GROUPED)
    groups, inner = carrying(made.axes, "a")
    assert (groups.size, inner.size) == (2, 3)
    (outer,) = (a for a in carrying(made.axes, "c", 1) if a is not groups)
    assert outer.size == 4
    exact(made, groups, [1])
    exact(made, inner, [0, 2])
    exact(made, outer, [0, 1, 3])
