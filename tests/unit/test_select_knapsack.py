"""One point of each of many curves: against all combinations."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.select._knapsack import Points, choose


def curve(losses: list[float], saved: list[float] | None = None) -> Points:
    """A curve whose steps lose so much each, saving one unit each unless said otherwise."""
    steps = np.concatenate([[0.0], np.cumsum(losses)])
    place = np.arange(len(steps)) if saved is None else np.concatenate([[0.0], np.cumsum(saved)])
    return Points.of(place.astype(np.float64), steps)


def least(curves: list[Points], goal: float) -> float:
    """The least loss of all combinations that save just so much."""
    found = [
        sum(c.loss[p] for c, p in zip(curves, points, strict=True))
        for points in product(*(range(len(c.saved)) for c in curves))
        if sum(c.saved[p] for c, p in zip(curves, points, strict=True)) == goal
    ]
    return float(min(found))


def test_points_that_another_beats_are_left_out() -> None:
    saved = np.array([0.0, 2.0, 1.0, 3.0, 3.0])
    loss = np.array([0.0, 1.0, 5.0, 4.0, 3.0])
    found = Points.of(saved, loss)
    assert found.origin.tolist() == [0, 1, 4]
    assert found.saved.tolist() == [0, 2, 3] and found.loss.tolist() == [0, 1, 3]


def test_what_costs_nothing_needn_t_all_go() -> None:
    free = curve([0.0] * 10)
    assert len(free.saved) == 11
    assert choose([free, curve([1.0] * 10)], 3).saved == 3


def test_the_hull_lies_below_every_point() -> None:
    rng = np.random.default_rng(0)
    points = curve(list(rng.random(200) ** 3))
    x, y = points.saved[points.hull], points.loss[points.hull]
    assert (np.diff(np.diff(y) / np.diff(x)) >= 0).all()
    assert (np.interp(points.saved, x, y) <= points.loss + 1e-12).all()
    assert {0, len(points.saved) - 1} <= set(points.hull.tolist())


STEPS = st.lists(st.integers(0, 50), min_size=1, max_size=5)


@given(st.lists(STEPS, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_of_convex_curves_the_best_combination_is_found(
    steps: list[list[int]], data: st.DataObject
):
    curves = [curve(sorted(float(s) for s in own)) for own in steps]
    goal = data.draw(st.integers(0, sum(map(len, steps))))
    found = choose(curves, goal)
    assert found.saved == goal
    assert found.loss == pytest.approx(least(curves, goal), rel=1e-3)


def test_what_just_meets_the_goal_does_so_on_the_grid_of_budgets() -> None:
    """Three, three and five elevenths of two thousand, each rounded, are less than that."""
    curves = [curve([0.0] * 5), curve([0.0, 0, 3, 4]), curve([0.0, 0, 3, 4, 0])]
    assert choose(curves, 11, convex=False).loss == 6


@given(st.lists(STEPS, min_size=1, max_size=4), st.data())
@settings(max_examples=60, deadline=None)
def test_of_any_curves_dynamic_programming_finds_it(steps: list[list[int]], data: st.DataObject):
    curves = [curve([float(s) for s in own]) for own in steps]
    goal = data.draw(st.integers(0, sum(map(len, steps))))
    found = choose(curves, goal, convex=False)
    assert found.saved == goal
    assert found.loss <= least(curves, goal) + 1e-9


@given(st.lists(STEPS, min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_more_saved_is_never_less_lost(steps: list[list[int]]) -> None:
    curves = [curve(sorted(float(s) for s in own)) for own in steps]
    losses = [choose(curves, goal).loss for goal in range(sum(map(len, steps)) + 1)]
    assert losses == sorted(losses)


def test_a_coarse_curve_leaves_the_rest_to_a_fine_one() -> None:
    """The relaxation would take half of the coarse step, which there isn't."""
    coarse, fine = curve([5.0], [10.0]), curve([0.3, 0.4] + [1.0] * 10)
    for goal in range(13):
        found = choose([coarse, fine], goal)
        assert found.saved == goal
        assert found.loss == pytest.approx(least([coarse, fine], goal))


def test_loss_counts_for_what_it_saves() -> None:
    """The first curve loses more a step, and less for what is saved."""
    wide = [curve([2.0 + i / 10, 3.0], [10.0, 10.0]) for i in range(8)]
    narrow = [curve([1.0] * 20) for _ in range(8)]
    assert choose([*wide, *narrow], 50).points == (*[1] * 5, *[0] * 11)


def test_where_nothing_is_fine_the_nearest_is_taken() -> None:
    curves = [curve([1.0], [10.0]), curve([2.0], [7.0])]
    assert choose(curves, 5).saved == 7
    assert choose(curves, 8).saved == 10  # both within half of the smaller step: what loses less
    assert choose([curve([1.0], [10.0])], 4).saved == 0
    assert choose([curve([1.0], [10.0])], 6).saved == 10
