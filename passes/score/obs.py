"""Scores channels by what losing them costs the maps that read them, at best.

Every map that is summed over the axis is asked how much its output would change, on calibration
data, if channels went and its other weights made up for them as well as they can (optimal brain
surgeon). Channels are eliminated one small group after the other, the inverse second moment brought
up to date in between; an index's score is the cost of the step in which it went, so that the order
of elimination is the order of the scores.

Reference: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon,
1993; Kurtić et al., ZipLM, 2023 (whole structures, batched over a layer's outputs); Frantar and
Alistarh, SparseGPT, 2023 (the second moment of a layer's input as its Hessian).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from surgeon.plugin import Context, ScorePass, consumers


@dataclass(frozen=True)
class OptimalBrainSurgeon(ScorePass):
    """The error that is left when the best remaining weights have made up for a channel."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: second moment"})
    cumulative: ClassVar[bool] = True

    damping: float = 0.01
    """Added to the second moment's diagonal, as a share of its mean; a singular one has no inverse.
    """

    batch: int = 16
    """Indices eliminated at a time; 1 is the exact greedy order."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}, it has to be above 0")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, it has to be 1 or more")

    def score(self, context: Context) -> dict[str, Any]:
        """Returns cumulative errors, float64, one axis at a time."""
        axes = context.axes
        out: dict[str, Any] = {}
        for name in context.targets:
            axis = axes.by_name.get(name)
            if axis is None:
                raise context.unable(name, "a branch is not read by one map: score it otherwise")
            read = consumers(axes, axis)
            if not read:
                raise context.unable(name, "no map is summed over it")
            parts = [self._one(context, consumer) for consumer in read]
            size = tuple(axes.by_name[n].size for n in axis.outer)
            out[name] = np.broadcast_to(sum(parts), (*size, axis.size)).copy()
        return out

    def _one(self, context: Context, consumer: Any) -> Any:
        """Returns scores [*outer, size] of one map."""
        import torch

        moments = context.moments([consumer.param])[consumer.param]
        weight = context.weights(consumer.param).double()
        weight = weight if consumer.dim == 1 else weight.T
        second = moments.second.double()
        eye = torch.eye(len(second), dtype=torch.float64)
        inverse = torch.linalg.inv(second + self.damping * second.diagonal().mean() * eye)
        groups = torch.from_numpy(consumer.groups.reshape(-1, consumer.groups.shape[-1]))
        scores = _eliminate(weight, inverse, groups, self.batch)
        return scores.reshape(consumer.groups.shape[:-1]).numpy()


def _eliminate(weight: Any, inverse: Any, groups: Any, batch: int) -> Any:
    """Returns the cost at which each group of columns went, ever higher.

    Args:
        weight: [out, d].
        inverse: [d, d], of the input's second moment.
        groups: [n, g], the columns that go together.
        batch: groups at a time.
    """
    import torch

    count = len(groups)
    alive = torch.arange(count)
    at = torch.arange(weight.shape[1])  # where a column of the whole is in what is left
    scores = torch.zeros(count, dtype=torch.float64)
    total = 0.0
    while len(alive):
        columns = at[groups[alive]]
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        own = weight[:, columns].permute(1, 2, 0)
        errors = (own * torch.linalg.solve(blocks, own)).sum((1, 2))
        order = errors.argsort()[: min(batch, len(alive))]
        total += float(errors[order].sum())
        # A little more for each: within a batch the order is that of the errors.
        step = torch.arange(len(order), dtype=torch.float64) / max(1, len(order))
        scores[alive[order]] = total * (1 + 1e-9 * step)
        gone = columns[order].reshape(-1)
        held = torch.linalg.solve(inverse[gone][:, gone], inverse[gone])
        weight = weight - weight[:, gone] @ held
        inverse = inverse - inverse[:, gone] @ held
        left = torch.ones(len(inverse), dtype=torch.bool)
        left[gone] = False
        weight, inverse = weight[:, left], inverse[left][:, left]
        moved = torch.full((len(left),), -1)
        moved[left] = torch.arange(int(left.sum()))
        at = torch.where(at >= 0, moved[at.clamp(min=0)], at)
        keep = torch.ones(len(alive), dtype=torch.bool)
        keep[order] = False
        alive = alive[keep]
    return scores
