"""The distribution of a value over tokens: mean, squares, and products between channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgeon.calibrate.parallel import World


@dataclass(frozen=True)
class Moments:
    """The distribution of a value's last dimension, of width d, over tokens.

    Attributes:
        count: tokens.
        mean: [d], fp32.
        second: [d, d], the mean of x·xᵀ (not centred), fp32; None where only norms were asked for.
        square: [d], its diagonal.
    """

    count: int
    mean: torch.Tensor
    square: torch.Tensor
    second: torch.Tensor | None = None

    @property
    def variance(self) -> torch.Tensor:
        """[d], the mean square less the squared mean, fp32."""
        spread = self.square.double() - self.mean.double().square()
        return spread.clamp(min=0).float()

    @property
    def norm(self) -> torch.Tensor:
        """[d], the root of the mean square, fp32."""
        return self.square.sqrt()


def together(found: Sequence[Moments]) -> Moments:
    """Returns the moments over the tokens of all of these: of a map that is used several times."""
    if len(found) == 1:
        return found[0]
    count = sum(m.count for m in found)
    shares = [m.count / max(1, count) for m in found]

    def mixed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = [share * t.double() for share, t in zip(shares, tensors, strict=True)]
        return torch.stack(parts).sum(0).float()

    seconds = [m.second for m in found if m.second is not None]
    return Moments(
        count,
        mixed([m.mean for m in found]),
        mixed([m.square for m in found]),
        mixed(seconds) if len(seconds) == len(found) else None,
    )


class Sums:
    """Moments in the making. Sums are fp64: thousands of tokens would eat fp32's digits."""

    def __init__(self, width: int, full: bool) -> None:
        self.count = 0
        self.first = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.second = torch.zeros(width, width, dtype=torch.float64) if full else None

    def add(self, x: torch.Tensor) -> None:
        """Takes more tokens, [..., width]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if rows.device != self.first.device:
            self.to(rows.device)
        self.count += len(rows)
        self.first += _over_rows(rows)
        self.squares += _over_rows(rows.square())
        if self.second is not None:
            self.second += gram(rows)

    def to(self, device: torch.device | str) -> None:
        """Keeps the sums there: on the device while a piece runs, in memory in between."""
        self.first, self.squares = self.first.to(device), self.squares.to(device)
        self.second = None if self.second is None else self.second.to(device)

    def done(self, world: World) -> Moments:
        """Returns the moments over the tokens of all processes."""
        self.to("cpu")
        count = world.count(self.count)
        world.add(self.first, self.squares, *(() if self.second is None else (self.second,)))
        over = max(1, count)
        second = None if self.second is None else (self.second / over).float()
        mean, square = self.first / over, self.squares / over
        return Moments(count, mean.float(), square.float(), second)


_NARROW = 256
"""Columns whose products are taken at once: in smaller blocks they take as long as in whole ones.
"""


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Returns xᵀ·x [width, width] of x [rows, width]; what lies below the diagonal mirrors it."""
    width = rows.shape[1]
    if width <= _NARROW:
        return rows.T @ rows
    left, right = rows[:, : width // 2], rows[:, width // 2 :]
    corner = left.T @ right
    top = torch.cat([gram(left), corner], dim=1)
    return torch.cat([top, torch.cat([corner.T, gram(right)], dim=1)])


_RUN = 64
"""Rows added up in fp32 before their sum goes on in fp64, which is ten times as fast as fp64 alone.
"""


def _over_rows(rows: torch.Tensor) -> torch.Tensor:
    """Returns the sum over the first dimension, fp64."""
    whole = len(rows) // _RUN * _RUN
    runs = rows[:whole].reshape(-1, _RUN, rows.shape[-1]).sum(1)
    return runs.double().sum(0) + rows[whole:].double().sum(0)
