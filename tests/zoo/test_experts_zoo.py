"""Mixtures of experts: their axes, masked against removed, and what is written of them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from surgeon.axes import Axis
from surgeon.axes.plan import Plan, cut
from tests import mixtures
from tests.exactness import Subject, difference, prunable, random_cut, subject_of

pytestmark = pytest.mark.zoo
every = pytest.mark.parametrize("name", mixtures.MIXTURES)


@cache
def subject(name: str) -> Subject:
    return subject_of(mixtures.tiny(name))


def of_role(name: str, role: str) -> list[Axis]:
    return [a for a in prunable(subject(name).axes) if a.role == role]


def equal(name: str, plan: Plan) -> None:
    """Asserts that removal is masking, and that what is removed mattered."""
    made = subject(name)
    found = made.masked(plan)
    assert difference(found, made.original) > 1e-3, "the cut is too small to show a mistake"
    assert difference(made.removed(plan), found) <= 1e-5


@every
def test_experts_and_their_widths_are_axes(name: str):
    axes = subject(name).axes
    pinned = {a.name: a.pins for a in axes.axes if a.pins and a.role not in ("vocab", "pair")}
    assert not pinned
    widths = [a for a in of_role(name, "ffn") if a.outer]
    for width in widths:
        assert {axes.get(o).role for o in width.outer} == {"experts"} and width.exact
        router = [m for m in axes.get(width.outer[-1]).members if "gate" in m.param]
        assert len({m.param for m in axes.get(width.outer[-1]).members}) >= 3, router
    assert len(widths) == sum("experts.down_proj" in p.name for p in axes.program.params) - sum(
        "experts.down_proj_bias" in p.name for p in axes.program.params
    )


@every
def test_each_axis_alone(name: str):
    rng = np.random.default_rng(0)
    axes = subject(name).axes
    for axis in prunable(axes):
        keep = max(axis.least, int(axis.size * 0.6))
        equal(name, Plan((random_cut(axes, axis, rng, keep=keep),)))


@every
def test_all_axes_at_once(name: str):
    rng = np.random.default_rng(1)
    axes = subject(name).axes
    sizes = {a: max(a.least, a.size - 1) for a in prunable(axes)}
    equal(name, Plan(tuple(random_cut(axes, a, rng, keep=n) for a, n in sizes.items())))
