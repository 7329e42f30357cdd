"""Which rank each map gets: by energy, by its own size, or so that all together save enough."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Costs:
    """What a map takes and loses by its rank.

    Attributes:
        rows: of the map.
        columns: of the map.
        energies: [k], its squared singular values, largest first, on a scale that all maps share.
        step: ranks are multiples of this.
    """

    rows: int
    columns: int
    energies: Values
    step: int = 1

    @property
    def size(self) -> int:
        """Its parameters as one."""
        return self.rows * self.columns

    @property
    def unit(self) -> int:
        """Parameters of a rank of 1."""
        return self.rows + self.columns

    def saved(self, rank: int | None) -> int:
        """Returns how many parameters fewer it takes as two; none where it stays one."""
        return 0 if rank is None else self.size - rank * self.unit

    def ranks(self) -> NDArray[np.int64]:
        """Returns the ranks that save parameters, ascending."""
        return np.arange(self.step, (self.size - 1) // self.unit + 1, self.step)

    def lost(self, ranks: NDArray[np.int64]) -> Values:
        """Returns the energy that is lost at each of these ranks."""
        tail = np.concatenate([[0.0], np.cumsum(self.energies[::-1])])[::-1]
        return tail[np.minimum(ranks, len(self.energies))]

    def by_energy(self, share: float) -> int:
        """Returns the least rank that keeps this share of the energy."""
        total = self.energies.sum()
        least = int(np.searchsorted(np.cumsum(self.energies), share * total * (1 - 1e-12))) + 1
        return -(-least // self.step) * self.step

    def by_ratio(self, ratio: float) -> int:
        """Returns the largest rank at which the map loses this share of its parameters."""
        rank = int((1 - ratio) * self.size / self.unit + 1e-9)
        return max(rank // self.step, 1) * self.step


def spread(maps: Sequence[Costs], goal: int) -> list[int | None] | None:
    """Returns the rank of each map, None where it stays one, so that all together save the goal.

    The energy lost is the least at some price of a parameter, which is found by halving; what is
    saved beyond the goal is then given back, step by step, where a parameter is worth most.

    Returns:
        The ranks, or None where the lowest ranks don't save as much.

    Reference: Everett, Generalized Lagrange Multiplier Method, 1963.
    """
    ranks = [found.ranks() for found in maps]
    losses = [found.lost(r) for found, r in zip(maps, ranks, strict=True)]
    savings = [found.size - r * found.unit for found, r in zip(maps, ranks, strict=True)]

    def at(price: float) -> list[int | None]:
        out: list[int | None] = []
        for own, lost, saved in zip(ranks, losses, savings, strict=True):
            worth = price * saved - lost
            best = int(worth.argmax()) if len(worth) else -1
            out.append(int(own[best]) if best >= 0 and worth[best] > 0 else None)
        return out

    def total(chosen: Sequence[int | None]) -> int:
        return sum(found.saved(rank) for found, rank in zip(maps, chosen, strict=True))

    if sum(int(saved[0]) for saved in savings if len(saved)) < goal:
        return None
    energy = sum(float(found.energies.sum()) for found in maps)
    low, high = 0.0, max(energy, 1e-30) / max(found.size for found in maps)
    while total(at(high)) < goal:
        low, high = high, high * 2
    for _ in range(60):
        price = (low + high) / 2
        low, high = (low, price) if total(at(price)) >= goal else (price, high)
    chosen = at(high)
    _give_back(maps, chosen, total(chosen) - goal)
    return chosen


def _give_back(maps: Sequence[Costs], chosen: list[int | None], spare: int) -> None:
    """Raises ranks while parameters are left to spend, best first."""

    def moves(index: int) -> Iterator[tuple[float, int, int | None, int]]:
        found, rank = maps[index], chosen[index]
        if rank is None:
            return
        higher = rank + found.step
        then = higher if found.saved(higher) > 0 else None
        price = found.saved(rank) - found.saved(then)
        lost, less = found.lost(np.array([rank, higher]))
        gain = lost - (less if then is not None else 0.0)
        yield -gain / price, index, then, price

    heap = [move for index in range(len(maps)) for move in moves(index)]
    heapq.heapify(heap)
    while heap:
        _, index, then, price = heapq.heappop(heap)
        if price <= spare:
            chosen[index] = then
            spare -= price
            for move in moves(index):
                heapq.heappush(heap, move)
