"""Mixtures of experts on programs written by hand: routing, choice within groups, what stays."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from surgeon.axes import analyse
from surgeon.axes.budget import Budget
from surgeon.axes.plan import Plan, check, cut
from surgeon.calibrate.routing import Route, routes
from surgeon.capture.pieces import joined
from surgeon.errors import Code, SurgeonError
from surgeon.ir import parse, to_text, verify
from surgeon.runtime.lower import dispatch
from tests.exactness import Subject, difference, prunable, random_cut

HEAD = """surgeon.program 1
symbol batch
input %x: f32[batch, 10]
parameter $router: f32[12, 10]
parameter $bias: f32[12]
parameter $fused: f32[12, 14, 10]
parameter $down: f32[12, 10, 7]
%logits: f32[batch, 12] = aten.linear.default(%x, $router)
"""

SOFTMAX = """
%p: f32[batch, 12] = aten.softmax.int(%logits, -1)
%w: f32[batch, 3], %i: i64[batch, 3] = aten.topk.default(%p, 3)
"""

GROUPS = """
%p: f32[batch, 12] = aten.sigmoid.default(%logits)
%b: f32[batch, 12] = aten.add.Tensor(%p, $bias)
%v: f32[batch, 3, 4] = aten.view.default(%b, [-1, 3, 4])
%t: f32[batch, 3, 2], %ti: i64[batch, 3, 2] = aten.topk.default(%v, 2)
%g: f32[batch, 3] = aten.sum.dim_IntList(%t, [-1])
%gt: f32[batch, 2], %gi: i64[batch, 2] = aten.topk.default(%g, 2)
%z: f32[batch, 3] = aten.zeros_like.default(%g)
%m: f32[batch, 3] = aten.scatter.value(%z, 1, %gi, 1)
%mu: f32[batch, 3, 1] = aten.unsqueeze.default(%m, -1)
%me: f32[batch, 3, 4] = aten.expand.default(%mu, [-1, 3, 4])
%mr: f32[batch, 12] = aten.view.default(%me, [-1, 12])
%mb: bool[batch, 12] = aten.to.dtype(%mr, #bool)
%mn: bool[batch, 12] = aten.bitwise_not.default(%mb)
%c: f32[batch, 12] = aten.masked_fill.Scalar(%b, %mn, -100.0)
%cw: f32[batch, 3], %i: i64[batch, 3] = aten.topk.default(%c, 3)
%w: f32[batch, 3] = aten.gather.default(%p, 1, %i)
"""

TAIL = """
%s: f32[batch, 1] = aten.sum.dim_IntList(%w, [-1], True)
%n: f32[batch, 3] = aten.div.Tensor(%w, %s)
%d: f32[batch, 12] = surgeon.dispatch(%i, %n, 12)
%dt: f32[12, batch] = aten.transpose.int(%d, 0, 1)
%du: f32[12, batch, 1] = aten.unsqueeze.default(%dt, -1)
%xu: f32[1, batch, 10] = aten.unsqueeze.default(%x, 0)
%ft: f32[12, 10, 14] = aten.transpose.int($fused, -1, -2)
%h: f32[12, batch, 14] = aten.matmul.default(%xu, %ft)
%h0: f32[12, batch, 7], %h1: f32[12, batch, 7] = aten.split.Tensor(%h, 7, -1)
%a: f32[12, batch, 7] = aten.silu.default(%h0)
%u: f32[12, batch, 7] = aten.mul.Tensor(%a, %h1)
%uw: f32[12, batch, 7] = aten.mul.Tensor(%u, %du)
%dn: f32[12, 7, 10] = aten.transpose.int($down, -1, -2)
%y: f32[12, batch, 10] = aten.matmul.default(%uw, %dn)
%o: f32[batch, 10] = aten.sum.dim_IntList(%y, [0])
%r: f32[batch, 10] = aten.add.Tensor(%x, %o)
return %r
"""

ROUTERS = {"softmax": SOFTMAX, "groups": GROUPS}
every = pytest.mark.parametrize("router", ROUTERS)


@cache
def mixture(router: str) -> Subject:
    program = verify(parse(HEAD + ROUTERS[router].strip() + TAIL))
    draw = torch.Generator().manual_seed(0)
    sizes = {p.name: [s for s in p.type.shape if isinstance(s, int)] for p in program.params}
    weights = {name: torch.randn(shape, generator=draw) for name, shape in sizes.items()}
    weights["bias"] = weights["bias"] * 0.1
    return Subject(analyse(program), weights, (torch.randn(64, 10, generator=draw),))


@every
def test_an_expert_is_its_router_row_and_a_slice_of_each_tensor(router: str):
    axes = mixture(router).axes
    (experts,) = axes.of_role("experts")
    wanted = {("router", 0), ("fused", 0), ("down", 0)}
    wanted |= {("bias", 0)} if router == "groups" else set()
    assert set(axes.carriers(experts)) == wanted
    assert experts.prunable and not experts.exact and experts.gauge.text == "permutation"


@every
def test_each_expert_chooses_its_own_channels(router: str):
    axes = mixture(router).axes
    (width,) = axes.of_role("ffn")
    assert width.size == 7 and width.exact and width.prunable
    assert [axes.get(o).role for o in width.outer][-1] == "experts"
    assert axes.text(axes.param_dims("fused")[1]).count("ffn:7") == 2


@every
def test_masked_is_removed_where_the_router_sees_kept_experts_only(router: str):
    made = mixture(router)
    rng = np.random.default_rng(0)
    every = [a for a in prunable(made.axes) if a.role != "width"]
    assert {a.role for a in every} >= {"experts", "ffn"}
    plans = [Plan((random_cut(made.axes, a, rng, keep=a.size - 1),)) for a in every]
    least = {a: max(a.least, a.size // 2) for a in every}
    plans += [Plan((random_cut(made.axes, a, rng, keep=n),)) for a, n in least.items()]
    plans.append(Plan(tuple(random_cut(made.axes, a, rng, keep=n) for a, n in least.items())))
    for plan in plans:
        found = made.masked(plan)
        assert difference(found, made.original) > 1e-3
        assert difference(made.removed(plan), found) < 1e-5, plan.cuts[0].axis
    (experts,) = made.axes.of_role("experts")
    plan = Plan((random_cut(made.axes, experts, rng, keep=experts.least),))
    # Zeros alone are something else: a masked router row still takes part in the choice.
    assert difference(made.removed(plan), made.masked(plan, kept_norms=False)) > 1e-3


def test_no_fewer_are_left_than_are_chosen_at_once():
    axes = mixture("softmax").axes
    (experts,) = axes.of_role("experts")
    assert experts.least == 3
    with pytest.raises(SurgeonError) as caught:
        check(axes, Plan((cut(experts, [0, 1]),)))
    assert caught.value.code is Code.BAD_PLAN and "3 of its indices" in caught.value.why
    budget = Budget(roles={"experts": 0.9}, axes=frozenset({experts.name}))
    assert budget.kept(experts).min() == 3


def test_groups_that_are_chosen_hold_what_is_chosen_in_them():
    axes = mixture("groups").axes
    (groups,), (within,) = axes.of_role("expert_groups"), axes.of_role("experts")
    # 2 of 3 groups by the sum of their best two, then 3 experts of those.
    assert (groups.size, groups.least) == (3, 2) and (within.size, within.least) == (4, 2)
    assert within.outer == (groups.name,) and groups.prunable


def test_numbers_that_no_top_k_made_pin_what_they_count():
    text = HEAD + SOFTMAX.strip() + TAIL
    text = text.replace("surgeon.dispatch(%i,", "surgeon.dispatch(%j,")
    text = text.replace("%d: f32", "%j: i64[batch, 3] = aten.mul.Tensor(%i, 1)\n%d: f32", 1)
    axes = analyse(verify(parse(text)))
    found = {a.role: [r.why for r in a.pins] for a in axes.axes if ("down", 0) in axes.carriers(a)}
    assert found == {"experts": ["rows are picked by numbers that come from data"]}


def test_a_mixture_is_found_with_what_its_experts_add():
    assert routes(mixture("softmax").axes.program) == {"d": Route("d", "y")}


def test_weights_are_spread_over_all_experts():
    found = dispatch(torch.tensor([[2, 0], [1, 2]]), torch.tensor([[0.5, 1.0], [2.0, 3.0]]), 4)
    assert found.tolist() == [[1.0, 0.0, 0.5, 0.0], [0.0, 2.0, 3.0, 0.0]]


FILLED = """surgeon.program 1
symbol batch
input %a: f32[batch, 3]
input %b: f32[batch, 2]
%e: f32[batch, 5] = aten.new_empty.default(%a, [{batch}, 5])
%p: f32[batch, 3] = aten.slice.Tensor(%e, 1, 0, 3)
%q: f32[batch, 3] = aten.copy.default(%p, %a)
%f: f32[batch, 5] = aten.slice_scatter.default(%e, %q, 1, 0, 3)
%g: f32[batch, 2] = aten.slice.Tensor(%f, 1, 3, 9223372036854775807)
%h: f32[batch, 2] = aten.copy.default(%g, %b)
%i: f32[batch, 5] = aten.slice_scatter.default(%f, %h, 1, 3, 9223372036854775807)
return %i
"""


def test_an_empty_tensor_that_is_filled_is_its_pieces_joined():
    (op,) = joined(verify(parse(FILLED))).ops
    assert "%i: f32[batch, 5] = aten.cat.default([%a, %b], 1)" in to_text(
        joined(verify(parse(FILLED)))
    )
    assert op.target == "aten.cat.default"


def test_a_tensor_that_is_filled_in_part_stays_as_it_is():
    part = FILLED.replace("%i, 1, 3", "%i, 1, 4").replace("(%f, %h, 1, 3,", "(%f, %h, 1, 2,")
    assert "slice_scatter" in to_text(joined(parse(part)))
