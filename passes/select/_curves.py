"""What a part of a model would lose and save, for every combination of its counts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.plugin import Axes, Axis, Code, Context, Part, SurgeonError, consumers, ending

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LARGEST = 4_000_000
"""Combinations of one part's counts."""


@dataclass(frozen=True)
class Curve:
    """What an axis loses, by how many of its indices go.

    Attributes:
        axis: the axis.
        outer: the enclosing axes, if each of their indices has scores of its own.
        kept: counts that it may keep, most first.
        lost: [*outer sizes, size + 1]: the loss when so many of the cheapest go.
        rank: [*outer sizes, size]: at which place each index goes.
    """

    axis: Axis
    outer: tuple[str, ...]
    kept: Ints
    lost: Floats
    rank: Ints

    @classmethod
    def of(cls, axis: Axis, costs: Floats, score: Floats, kept: Ints) -> Curve:
        """Returns the curve of an axis whose indices go in the order of their scores.

        Args:
            axis: the axis.
            costs: what each index costs, [*outer sizes or none, size].
            score: of the same shape.
            kept: counts that it may keep.
        """
        # As plans choose: the lowest score goes first, and of equal ones the last.
        order = np.argsort(-score, axis=-1, kind="stable")[..., ::-1]
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(axis.size), order.shape), axis=-1)
        sums = np.cumsum(np.take_along_axis(costs, order, axis=-1), axis=-1)
        lost = np.concatenate([np.zeros_like(sums[..., :1]), sums], axis=-1)
        return cls(axis, axis.outer if score.ndim > 1 else (), kept, lost, rank)

    def scaled(self, factor: float) -> Curve:
        """Returns the curve with losses times a factor."""
        return Curve(self.axis, self.outer, self.kept, self.lost * factor, self.rank)

    def at(self, kept: int) -> float:
        """Returns the loss in all when each enclosing index keeps so many."""
        return float(self.lost[..., self.axis.size - kept].sum())

    @property
    def whole(self) -> float:
        """The loss when every index goes."""
        return float(self.lost[..., -1].sum())


@dataclass(frozen=True)
class Grid:
    """Every combination of a part's counts, with some of its branches dropped.

    Attributes:
        axes: names, in the order of the arrays' dimensions.
        counts: by axis, the counts along its dimension.
        dropped: branches.
        saved: of the measure, by combination.
        loss: predicted, likewise.
    """

    axes: tuple[str, ...]
    counts: Mapping[str, Ints]
    dropped: tuple[str, ...]
    saved: Floats
    loss: Floats

    def kept(self, flat: int) -> dict[str, int]:
        """Returns the counts of a combination, by its place in the raveled arrays."""
        if not self.axes:
            return {}
        places = np.unravel_index(flat, self.saved.shape)
        return {n: int(self.counts[n][p]) for n, p in zip(self.axes, places, strict=True)}

    @property
    def like(self) -> tuple[Any, ...]:
        """What parts have in common whose axes can all keep the same counts."""
        return tuple(tuple(self.counts[n].tolist()) for n in self.axes)


@dataclass(frozen=True)
class Maker:
    """Makes the grids of parts.

    Attributes:
        axes: of the model.
        curves: by axis; those of axes that enclose others but have a fixed count have that one.
        drops: by branch that may be dropped, what that loses.
        owned: by branch, the axes that lie in it.
    """

    axes: Axes
    curves: Mapping[str, Curve]
    drops: Mapping[str, float]
    owned: Mapping[str, frozenset[str]] = field(default_factory=dict[str, frozenset[str]])

    def grids(self, part: Part) -> list[Grid]:
        """Returns the grids of a part: one for every set of its branches that may be dropped.

        Raises:
            SurgeonError: `bad-option` where there are too many combinations.
        """
        before = part.left({})
        return [self._grid(part, dropped, before) for dropped in self._subsets(part)]

    def _subsets(self, part: Part) -> Iterable[tuple[str, ...]]:
        may = [b for b in part.branches if b in self.drops]
        return chain.from_iterable(combinations(may, n) for n in range(len(may) + 1))

    def _grid(self, part: Part, dropped: tuple[str, ...], before: float) -> Grid:
        # What lies in a dropped branch goes with it, whatever its counts.
        moot = frozenset[str]().union(*(self.owned.get(b, frozenset()) for b in dropped))
        names = tuple(n for n in part.axes if n not in moot)
        counts = {n: self.curves[n].kept for n in names}
        shape = tuple(len(counts[n]) for n in names)
        if prod(shape) > LARGEST:
            raise _too_many(names, prod(shape))
        spread = {
            n: counts[n].reshape([-1 if m == n else 1 for m in names]).astype(np.float64)
            for n in names
        }
        left = np.broadcast_to(part.left(spread, dropped), shape)
        loss = np.full(shape, sum(self.drops[b] for b in dropped))
        for name in names:
            loss = loss + self._lost(name, names)
        return Grid(names, counts, dropped, before - left, loss)

    def _lost(self, name: str, names: Sequence[str]) -> Floats:
        """Returns what an axis loses, over the grid of some axes.

        Only those enclosing indices count that are kept themselves.
        """
        curve = self.curves[name]
        lost = curve.lost[..., curve.axis.size - curve.kept]
        there = self._there(curve)
        outer = len(curve.outer)
        lead = there.shape[:outer]
        found = there.reshape(prod(lead), -1) @ lost.reshape(-1, len(curve.kept))
        found = found.reshape(*lead, len(curve.kept))
        dims = [n for n in (*curve.outer, name) if n in names]
        found = found.reshape(
            [s for n, s in zip((*curve.outer, name), found.shape, strict=True) if n in names]
        )
        order = sorted(range(len(dims)), key=lambda i: names.index(dims[i]))
        found = found.transpose(order)
        held = [dims[i] for i in order]
        return found.reshape([found.shape[held.index(n)] if n in held else 1 for n in names])

    def _there(self, curve: Curve) -> Floats:
        """Returns which enclosing indices are kept: [*numbers of their counts, *their sizes]."""
        outer = curve.outer
        sizes = [self.axes.by_name[n].size for n in outer]
        found = np.ones((*([1] * len(outer)), *sizes))
        for at, name in enumerate(outer):
            own = self.curves.get(name)
            if own is None:
                continue
            gone = own.axis.size - own.kept
            kept = own.rank >= gone.reshape(-1, *([1] * own.rank.ndim))
            shape = [1] * (2 * len(outer))
            shape[at] = len(own.kept)
            for other, size in zip((*own.outer, name), own.rank.shape, strict=True):
                shape[len(outer) + outer.index(other)] = size
            found = found * kept.reshape(shape)
        return found


def _too_many(names: Sequence[str], number: int) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        "these axes can't be searched together",
        at=", ".join(names[:4]) + (", …" if len(names) > 4 else ""),
        why=f"what one saves depends on the others' counts: {number:,} combinations",
        try_="fewer roles, --role ROLE=SHARE for one that runs through the whole model, or a "
        "larger --multiple-of",
        data={"axes": list(names), "combinations": number},
    )


def owned(axes: Axes, branches: Collection[str]) -> dict[str, frozenset[str]]:
    """Returns by branch the axes that no parameter outside it carries."""
    out: dict[str, frozenset[str]] = {}
    for branch in axes.branches:
        if branch.name in branches:
            params = set(branch.params)
            inside = (a.name for a in axes.axes if all(m.param in params for m in a.members))
            out[branch.name] = frozenset(inside)
    return out


def silencing(context: Context, branch: str) -> tuple[str, ...]:
    """Returns the axes that a branch's last map is summed over.

    Without all indices of one of them the map adds nothing but its bias, as if the branch were
    dropped.
    """
    axes = context.axes
    (found,) = (b for b in axes.branches if b.name == branch)
    last = ending(axes, found)
    if last is None:
        return ()
    width = axes.program.param[last.param].type.shape[last.dim]
    out: list[str] = []
    for axis in axes.axes:
        if any((m.param, m.dim) == (last.param, last.dim) for m in axis.members):
            groups = [c.groups for c in consumers(axes, axis) if c.param == last.param]
            if any(np.unique(g).size == width for g in groups):
                out.append(axis.name)
    return tuple(out)
