"""One point of each of many curves, so that enough is saved for the least loss in all.

A multiple-choice knapsack. Its linear relaxation takes the steps of the curves' lower convex hulls
in the order of loss for what is saved, and leaves one curve between two points: that one is settled
among all of its points, by branching on both sides of the gap where none comes near enough. Curves
that are far from convex can be solved by dynamic programming over the budget instead.

Reference: Sinha and Zoltners, The Multiple-Choice Knapsack Problem, 1979 (the relaxation by hulls
and branching on its one fractional class); Dudziński and Walukiewicz, 1987 (dynamic programming);
Frantar and Alistarh, SPDY, 2022 (the latter over layers of a network).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

NODES = 64
"""Branches looked at; each is bounded from below, and most problems need two or three."""

GAP = 1e-4
"""Share of the predicted loss that is not worth looking further for."""

BINS = 2000
"""Parts that dynamic programming divides the budget into."""


@dataclass(frozen=True)
class Points:
    """What one part may save and lose: a curve, both ascending.

    Attributes:
        saved: of the measure.
        loss: predicted.
        origin: which of the part's combinations each point is.
    """

    saved: Floats
    loss: Floats
    origin: Ints

    @classmethod
    def of(cls, saved: Floats, loss: Floats) -> Points:
        """Returns the combinations that no other beats: none saves as much and loses less."""
        order = np.lexsort((loss, -saved))
        best = np.minimum.accumulate(loss[order])
        # A point that saves less for the same loss stays: a small budget may want it.
        stay = loss[order] <= best
        stay[1:] &= saved[order][1:] != saved[order][:-1]
        kept = order[stay][::-1]
        return cls(saved[kept], loss[kept], kept)

    @cached_property
    def hull(self) -> Ints:
        """The points of the lower convex hull."""
        found = np.arange(len(self.saved))
        while len(found) > 2:
            slope = np.diff(self.loss[found]) / np.diff(self.saved[found])
            # What lies above the line between its neighbours is not on the hull.
            above = np.concatenate([[False], slope[1:] < slope[:-1], [False]])
            if not above.any():
                break
            found = found[~above]
        return found

    @property
    def step(self) -> float:
        """What lies between two points, as a rule."""
        return float(np.median(np.diff(self.saved))) if len(self.saved) > 1 else np.inf

    def nearest(self, saved: float) -> int:
        """Returns the point that saves most nearly so much."""
        right = int(np.searchsorted(self.saved, saved))
        if right == 0:
            return 0
        if right == len(self.saved):
            return right - 1
        return right if self.saved[right] - saved < saved - self.saved[right - 1] else right - 1


@dataclass(frozen=True)
class Choice:
    """A point of each curve.

    Attributes:
        points: by curve.
        saved: in all.
        loss: in all.
    """

    points: tuple[int, ...]
    saved: float
    loss: float


def choose(curves: Sequence[Points], goal: float, *, convex: bool = True) -> Choice:
    """Returns the points of least loss that save most nearly as much as is wanted.

    Near enough is half a step of the curve with the smallest steps.

    Args:
        curves: at least one.
        goal: what is to be saved.
        convex: go by the curves' convex hulls; else by dynamic programming.
    """
    step = min(c.step for c in curves)
    tolerance = step / 2 if np.isfinite(step) else 0.0
    found = _Search(curves, goal, tolerance)
    if convex:
        return found.branched()
    return min((found.branched(), found.programmed()), key=found.rank)


class _Search:
    def __init__(self, curves: Sequence[Points], goal: float, tolerance: float) -> None:
        self.curves, self.goal, self.tolerance = curves, goal, tolerance
        hulls = [c.hull for c in curves]
        self.low = np.zeros(len(curves), dtype=np.int64)
        self.high = np.array([len(h) - 1 for h in hulls])
        self.hulls = hulls
        self.saved_at = [c.saved[h] for c, h in zip(curves, hulls, strict=True)]
        self.loss_at = [c.loss[h] for c, h in zip(curves, hulls, strict=True)]
        part = np.repeat(np.arange(len(curves)), self.high)
        place = np.concatenate([np.arange(n) for n in self.high])
        saved = np.concatenate([np.diff(s) for s in self.saved_at])
        loss = np.concatenate([np.diff(s) for s in self.loss_at])
        order = np.argsort(loss / saved, kind="stable")
        self.part, self.place = part[order], place[order]
        self.saved, self.loss = saved[order], loss[order]

    def choice(self, points: Sequence[int]) -> Choice:
        chosen = tuple(int(p) for p in points)
        pairs = list(zip(self.curves, chosen, strict=True))
        saved = sum(float(c.saved[p]) for c, p in pairs)
        return Choice(chosen, saved, sum(float(c.loss[p]) for c, p in pairs))

    def rank(self, choice: Choice) -> tuple[float, float]:
        """Orders choices: by how far they are from the goal, unless near enough; then by loss."""
        off = abs(choice.saved - self.goal)
        return (0.0 if off <= self.tolerance else off, choice.loss)

    # --- branching on hulls ----------------------------------------------------------------------

    def branched(self) -> Choice:
        """Returns the best choice that branching finds."""
        number = count()
        bound, vertex, part = self.relaxed(self.low, self.high)
        queue = [(bound, next(number), self.low, self.high, vertex, part)]
        best: Choice | None = None
        for _ in range(NODES):
            if not queue:
                break
            bound, _, low, high, vertex, part = heapq.heappop(queue)
            if best is not None and self.rank(best)[0] == 0 and bound >= best.loss * (1 - GAP):
                break
            found = self.closed(self.settled(vertex, part))
            best = found if best is None else min(best, found, key=self.rank)
            if part < 0:
                continue
            at = vertex[part]
            for below in (True, False):
                ends = (low.copy(), high.copy())
                ends[1 if below else 0][part] = at if below else at + 1
                bound, new, next_part = self.relaxed(*ends)
                heapq.heappush(queue, (bound, next(number), *ends, new, next_part))
        assert best is not None
        return best

    def relaxed(self, low: Ints, high: Ints) -> tuple[float, Ints, int]:
        """Returns the relaxation between such hull points.

        That is its loss, the hull point of each curve, and which curve lies between that one and
        the next; none (-1) where all lie at one end or the other.
        """
        inside = (self.place >= low[self.part]) & (self.place < high[self.part])
        steps = np.flatnonzero(inside)
        saved = sum(float(s[i]) for s, i in zip(self.saved_at, low, strict=True))
        loss = sum(float(s[i]) for s, i in zip(self.loss_at, low, strict=True))
        sums = saved + np.cumsum(self.saved[steps])
        # Beyond the goal already: nothing more is taken, which bounds from below all the same.
        taken = int(np.searchsorted(sums, self.goal)) if saved < self.goal else 0
        vertex = low + np.bincount(self.part[steps[:taken]], minlength=len(low))
        loss += float(self.loss[steps[:taken]].sum())
        if saved >= self.goal or taken == len(steps):
            return loss, vertex, -1
        last = steps[taken]
        before = float(sums[taken - 1]) if taken else saved
        loss += float(self.loss[last] * (self.goal - before) / self.saved[last])
        return loss, vertex, int(self.part[last])

    def settled(self, vertex: Ints, part: int) -> Choice:
        """Returns the hull points, the curve between two of them put where it fits best."""
        points = [int(h[i]) for h, i in zip(self.hulls, vertex, strict=True)]
        if part >= 0:
            rest = self.choice(points).saved - float(self.curves[part].saved[points[part]])
            points[part] = self.curves[part].nearest(self.goal - rest)
        return self.choice(points)

    def closed(self, choice: Choice) -> Choice:
        """Returns a choice with one curve moved so that the goal is met, if it isn't."""
        if abs(choice.saved - self.goal) <= self.tolerance:
            return choice
        best = choice
        for part, curve in enumerate(self.curves):
            now = choice.points[part]
            new = curve.nearest(self.goal - choice.saved + float(curve.saved[now]))
            moved = Choice(
                (*choice.points[:part], new, *choice.points[part + 1 :]),
                choice.saved + float(curve.saved[new] - curve.saved[now]),
                choice.loss + float(curve.loss[new] - curve.loss[now]),
            )
            best = min(best, moved, key=self.rank)
        return best

    # --- dynamic programming ---------------------------------------------------------------------

    def programmed(self) -> Choice:
        """Returns the best choice on a grid of budgets."""
        unit = max(self.goal, 1e-300) / BINS
        best = np.full(BINS + 1, np.inf)
        best[0] = 0.0
        taken: list[Ints] = []
        for curve in self.curves:
            bins = self._bins(curve.saved, unit)
            # Of those that save as much on the grid the first loses least.
            _, first = np.unique(bins, return_index=True)
            new = np.full(BINS + 1, np.inf)
            pick = np.zeros(BINS + 1, dtype=np.int64)
            for point in first:
                offset = int(bins[point])
                # To have saved at least so much, what came before saved that less this.
                shifted = np.concatenate([np.full(offset, best[0]), best[: BINS + 1 - offset]])
                trial = shifted + curve.loss[point]
                better = trial < new
                new[better], pick[better] = trial[better], point
            taken.append(pick)
            best = new
        at, points = BINS, [0] * len(self.curves)
        if not np.isfinite(best[BINS]):
            return self.closed(self.choice([len(c.saved) - 1 for c in self.curves]))
        for part in range(len(self.curves) - 1, -1, -1):
            points[part] = int(taken[part][at])
            curve = self.curves[part]
            at = max(at - int(self._bins(curve.saved[points[part]], unit)), 0)
        return self.closed(self.choice(points))

    def _bins(self, saved: Any, unit: float) -> Any:
        """Returns savings on the grid, rounded up: what meets the goal does so there too."""
        return np.minimum(np.ceil(saved / unit - 1e-9), BINS).astype(np.int64)
