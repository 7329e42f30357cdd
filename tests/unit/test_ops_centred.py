"""LayerNorm spelled out: what is centred is averaged over the channels that are there."""

from __future__ import annotations

from surgeon.axes.plan import Plan, cut
from tests.exactness import difference
from tests.unit.test_ops_interleave import carrying, subject

SPELLED = """
input %x: f32[batch, 8]
parameter $a: f32[6, 8]
parameter $w: f32[6]
parameter $b: f32[8, 6]
%1: f32[batch, 6] = aten.linear.default(%x, $a)
%m: f32[batch, 1] = aten.mean.dim(%1, [-1], True)
%c: f32[batch, 6] = aten.sub.Tensor(%1, %m)
%s: f32[batch, 6] = aten.pow.Tensor_Scalar(%c, 2)
%v: f32[batch, 1] = aten.mean.dim(%s, [-1], True)
%e: f32[batch, 1] = aten.add.Tensor(%v, 0.1)
%q: f32[batch, 1] = aten.rsqrt.default(%e)
%n: f32[batch, 6] = aten.mul.Tensor(%c, %q)
%2: f32[batch, 6] = aten.mul.Tensor(%n, $w)
%3: f32[batch, 8] = aten.linear.default(%2, $b)
return %3
"""


def test_removal_gives_the_norm_of_what_is_left_as_the_fused_one_does():
    made = subject(SPELLED)
    (axis,) = carrying(made.axes, "w")
    assert axis.prunable and not axis.exact
    plan = Plan((cut(axis, [0, 2, 3]),))
    assert made.difference(plan) < 1e-5
    # Against norms that see zeros it differs, by as much as LayerNorm's mean makes.
    assert difference(made.removed(plan), made.masked(plan, kept_norms=False)) > 1e-3
    program, _ = made.small(plan)
    assert not any("_of_all" in name for op in program.ops for name in op.outputs)
