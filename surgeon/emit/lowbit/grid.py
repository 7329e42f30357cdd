"""The levels that four-bit weights are rounded to, and how levels that are there are found again.

Neighbouring weights of a row share a step; a weight is one of -8 … 7 steps. A step has the eight
significant bits of bfloat16, so that its multiples are exact in fp32, and a group that lies on such
levels gives its step back: what a pass has rounded is packed without being rounded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

LOW, HIGH = -8, 7
"""The least and the largest number of steps."""

SMALLEST = 8
"""Weights that share a step, at least: with fewer, steps take as much room as what they save."""

SAME = 2.0**-20
"""Difference from a multiple of the step, in parts of the largest weight, that is fp32's own."""


def group_for(width: int, asked: int) -> int | None:
    """Returns the largest group up to `asked` that divides a row; None where it is too small."""
    fitting = (g for g in range(min(width, asked), SMALLEST - 1, -1) if width % g == 0)
    return next(fitting, None)


@dataclass(frozen=True)
class Rounded:
    """Weights as whole numbers of steps.

    Attributes:
        levels: [out, d], int8, from -8 to 7.
        steps: [out, d // group], fp32.
        found: whether all of them were on these levels before.
    """

    levels: Any
    steps: Any
    found: bool

    @property
    def values(self) -> Any:
        """What the weights are now, [out, d], fp32."""
        steps = self.steps.repeat_interleave(self.levels.shape[1] // self.steps.shape[1], dim=1)
        return self.levels.float() * steps


def step_of(weights: Any) -> Any:
    """Returns the step of each group [..., group]: no weight is over half a step from a level.

    The largest weight is at 7.5 steps or less, the least at -8.5 or more; one of both is there but
    for rounding the step up to eight bits.
    """
    import torch

    above, below = weights.amax(-1).float(), weights.amin(-1).float()
    wanted = torch.maximum(above / (HIGH + 0.5), below / (LOW - 0.5))
    short = wanted.bfloat16()
    up = torch.nextafter(short, torch.full_like(short, torch.inf))
    return torch.where(short.float() < wanted, up, short).float()


def levels_of(weights: Any, steps: Any) -> Any:
    """Returns the nearest level of each of [..., group] by the step of its group [...]."""
    safe = steps.masked_fill(steps == 0, 1.0)
    return (weights / safe[..., None]).round().clamp(LOW, HIGH)


def rounded(weights: Any, group: int) -> Rounded:
    """Returns weights [out, d] on their levels: those that they are on, or else the nearest.

    Args:
        weights: fp32.
        group: how many share a step; divides d.
    """
    import torch

    grouped = weights.float().unflatten(1, (-1, group))
    most = grouped.abs().amax(-1)
    steps = step_of(grouped)
    levels = levels_of(grouped, steps)
    missing = torch.ones_like(most, dtype=torch.bool)
    for largest in range(-LOW, 0, -1):
        guess = most / largest
        near = levels_of(grouped, guess)
        apart = (near * guess[..., None] - grouped).abs().amax(-1)
        take = missing & (apart <= SAME * most)
        steps = torch.where(take, guess, steps)
        levels = torch.where(take[..., None], near, levels)
        missing &= ~take
    return Rounded(levels.flatten(1).to(torch.int8), steps, not bool(missing.any()))
