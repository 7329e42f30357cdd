"""Cutting by one plan and then by another is cutting by the two composed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.axes import Axes
from surgeon.axes.compose import compose
from surgeon.axes.plan import Cut, Plan, Selection, check, cut
from surgeon.axes.settle import analyse
from surgeon.axes.surgery import operate
from surgeon.errors import Code, SurgeonError
from surgeon.opening import open_model
from surgeon.runtime.apply import removed
from tests import models

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {"Llama": {}, "GPTNeoX": {}}
FFN = "model.layers.0.mlp/ffn"


@pytest.fixture(scope="module", params=MODELS)
def axes(request: pytest.FixtureRequest) -> Axes:
    return open_model(models.tiny(request.param, **MODELS[request.param])).axes


@st.composite
def plans(draw: st.DrawFn, axes: Axes) -> Plan:
    """A plan of some axes, each with a choice of its own for some of the axes around it."""
    cuts: list[Cut] = []
    for axis in axes.axes:
        if not axis.prunable or axis.size < 2 or not draw(st.booleans()):
            continue
        # A residual stream of one channel is no axis any more, and nothing leads back into it.
        kept = draw(st.integers(2 if axis.role == "hidden" else 1, axis.size))
        outer = tuple(name for name in axis.outer if draw(st.booleans()))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        sizes = [axes.by_name[name].size for name in outer]
        order = rng.permuted(np.broadcast_to(np.arange(axis.size), (*sizes, axis.size)), axis=-1)
        cuts.append(cut(axis, order[..., :kept], outer))
    branches = [b.name for b in axes.branches if draw(st.integers(0, 5)) == 0]
    return check(axes, Plan(tuple(cuts), tuple(branches[: max(0, len(axes.branches) - 1)])))


@settings(max_examples=12)
@given(data=st.data())
def test_one_after_the_other_is_both_at_once(axes: Axes, data: st.DataObject) -> None:
    first = data.draw(plans(axes))
    left = analyse(operate(axes, first))
    assert {a.name for a in left.axes} <= set(axes.by_name)
    second = data.draw(plans(left))
    both = check(axes, compose(axes, first, second))
    one, two, whole = Selection(axes, first), Selection(left, second), Selection(axes, both)
    after, at_once = operate(left, second), operate(axes, both)
    assert {p.name: p.type for p in after.params} == {p.name: p.type for p in at_once.params}
    for param in after.params:
        shape = tuple(int(s) for s in axes.program.param[param.name].type.shape)
        tensor = torch.arange(int(np.prod(shape))).reshape(shape)
        twice = removed(two, param.name, removed(one, param.name, tensor))
        assert torch.equal(twice, removed(whole, param.name, tensor)), param.name


@given(data=st.data())
@settings(max_examples=5)
def test_a_plan_of_nothing_changes_nothing(axes: Axes, data: st.DataObject) -> None:
    plan = data.draw(plans(axes))
    for composed in (compose(axes, plan, Plan()), compose(axes, Plan(), plan)):
        assert {c.axis: c for c in composed.cuts} == {c.axis: c for c in plan.cuts}
        assert composed.branches == plan.branches


def test_where_an_axis_around_it_was_cut_by_group_the_groups_tell_its_rows_apart() -> None:
    # No captured model has three axes within one another: told of sizes and names alone.
    nested = {
        "a": SimpleNamespace(name="a", size=3, outer=()),
        "b": SimpleNamespace(name="b", size=4, outer=("a",)),
        "c": SimpleNamespace(name="c", size=5, outer=("a", "b")),
    }
    axes: Any = SimpleNamespace(by_name=nested)
    first = Plan((Cut("b", 4, ((0, 3), (1, 2), (2, 3)), ("a",)),))
    second = Plan((Cut("c", 5, ((0, 1), (3, 4)), ("b",)),))
    found = compose(axes, first, second).by_axis["c"]
    assert found.outer == ("a", "b") and found.array.shape == (3, 4, 2)
    for a, kept in enumerate(first.cuts[0].array):
        for place, b in enumerate(kept):
            assert found.array[a, b].tolist() == list(second.cuts[0].kept[place])


def test_plans_that_do_not_follow_are_refused() -> None:
    axes = open_model(models.tiny("Llama")).axes
    axis = axes.get(FFN)
    first = Plan((cut(axis, range(40)),))
    for second in (
        Plan((cut(axis, range(20)),)),  # made for all 80
        Plan((Cut("nothing", 3, (0, 1)),)),
        Plan((Cut(FFN, 40, ((0, 1), (2, 3)), ("hidden",)),)),
    ):
        with pytest.raises(SurgeonError) as caught:
            compose(axes, first, second)
        assert caught.value.code is Code.PLAN_MISMATCH
