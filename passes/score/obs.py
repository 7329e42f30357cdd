"""Scores channels by what losing them costs the maps that read them, at best.

Every map that is summed over the axis is asked how much its output would change, on calibration
data, if channels went and its other weights made up for them as well as they can (optimal brain
surgeon). Channels are eliminated one small group after the other, the inverse second moment brought
up to date in between; an index's score is the cost of the step in which it went, so that the order
of elimination is the order of the scores.

The change of an output is measured by its square, or by how much the loss grows with it. The latter
takes the second moment of the loss's gradients at the outputs for the other Kronecker factor of the
Hessian; scores of different maps and roles are then comparable.

Reference: Hassibi and Stork, Second order derivatives for network pruning: Optimal Brain Surgeon,
1993; Kurtić et al., ZipLM, 2023 (whole structures, batched over a layer's outputs); Frantar and
Alistarh, SparseGPT, 2023 (the second moment of a layer's input as its Hessian); Singh and Alistarh,
WoodFisher, 2020 (the Fisher matrix as the Hessian); Martens and Grosse, Optimizing Neural Networks
with Kronecker-factored Approximate Curvature, 2015 (its factors).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from passes.score._reading import added, matrix, readers
from surgeon.plugin import Context, ScorePass

_TURNS = 64
"""An axis's indices are eliminated in at least so many steps, or one by one."""

_SPARSE = 0.75
"""Columns are taken out for good once so large a share of those that are held is left."""


@dataclass(frozen=True)
class OptimalBrainSurgeon(ScorePass):
    """The error that is left when the best remaining weights have made up for a channel."""

    cumulative: ClassVar[bool] = True

    damping: float = 0.01
    """Added to the second moment's diagonal, as a share of its mean; a singular one has no inverse.
    """

    batch: int = 16
    """Indices eliminated at a time, fewer on an axis with few; 1 is the exact greedy order."""

    weigh: Literal["outputs", "loss"] = "outputs"
    """Measure what is lost by the outputs' squared change, or by the growth of the loss."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}, it has to be above 0")
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}, it has to be 1 or more")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What it looks at, which depends on how outputs are weighed."""
        found = frozenset({"weights", "activations: second moment"})
        return found | {"gradients: outputs"} if self.weigh == "loss" else found

    @property
    def unit(self) -> Literal["role", "loss"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Growth of the loss, if that is what outputs are weighed by."""
        return "loss" if self.weigh == "loss" else "role"

    def score(self, context: Context) -> dict[str, Any]:
        """Returns cumulative errors, float64, one axis at a time."""
        maps = {name: readers(context, name) for name in context.targets}
        # All at once: what is gathered for one of them would be gathered for others besides.
        every = list(dict.fromkeys(c.param for found in maps.values() for c in found))
        context.moments(every)
        if self.weigh == "loss":
            context.fisher(every)
        return {name: added(context, name, found, self._one) for name, found in maps.items()}

    def _one(self, context: Context, consumer: Any) -> Any:
        """Returns scores [*outer, size] of one map."""
        import torch

        moments = context.moments([consumer.param])[consumer.param]
        weight = matrix(context, consumer.param, consumer.dim)
        if self.weigh == "loss":
            weight = _root(context.fisher([consumer.param])[consumer.param].second / 2) @ weight
        second = moments.second.double()
        eye = torch.eye(len(second), dtype=torch.float64)
        # Inputs that are always zero have no inverse, and cost nothing.
        size = max(float(second.diagonal().mean()), 1e-30)
        damped = second + self.damping * size * eye
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        groups = torch.from_numpy(consumer.groups.reshape(-1, consumer.groups.shape[-1]))
        # Of an axis with few indices each has to have its own turn.
        batch = min(self.batch, max(1, len(groups) // _TURNS))
        scores = _eliminate(weight, inverse, groups, batch)
        return scores.reshape(consumer.groups.shape[:-1]).numpy()


def _root(matrix: Any) -> Any:
    """Returns a float64 [out, out] whose square, transposed times itself, is a Fisher matrix."""
    import torch

    values, vectors = torch.linalg.eigh(matrix.double())
    return values.clamp(min=0).sqrt()[:, None] * vectors.T


def _eliminate(weight: Any, inverse: Any, groups: Any, batch: int) -> Any:
    """Returns the cost at which each group of columns went, ever higher.

    Args:
        weight: [out, d].
        inverse: [d, d], of the input's second moment.
        groups: [n, g], the columns that go together.
        batch: groups at a time.
    """
    import torch

    count, width = groups.shape
    weight, inverse = weight.clone(), inverse.clone()
    alive = torch.arange(count)
    columns = groups  # where the columns of those alive are among those held
    scores = torch.zeros(count, dtype=torch.float64)
    total = 0.0
    while len(alive):
        if width == 1:
            errors = weight.square().sum(0)[columns[:, 0]] / inverse.diagonal()[columns[:, 0]]
        else:
            blocks = inverse[columns[:, :, None], columns[:, None, :]]
            own = weight[:, columns].permute(1, 2, 0)
            # LU factors of several matrices at once hang in builds of MKL that have threads.
            roots = torch.linalg.cholesky(blocks)
            errors = torch.linalg.solve_triangular(roots, own, upper=False).square().sum((1, 2))
        order = errors.argsort()[: min(batch, len(alive))]
        total += float(errors[order].sum())
        # A little more for each: within a batch the order is that of the errors.
        step = torch.arange(len(order), dtype=torch.float64) / max(1, len(order))
        scores[alive[order]] = total * (1 + 1e-9 * step)
        gone = columns[order].reshape(-1)
        rows = inverse[gone]
        told = torch.linalg.solve(rows[:, gone], rows)
        weight.addmm_(weight[:, gone], told, alpha=-1)
        inverse.addmm_(rows.T, told, alpha=-1)
        keep = torch.ones(len(alive), dtype=torch.bool)
        keep[order] = False
        alive, columns = alive[keep], columns[keep]
        # To copy what is left after every step would take longer than the steps do.
        # Columns of no group are never eliminated, and nothing depends on them.
        if columns.numel() < _SPARSE * len(inverse):
            left = columns.reshape(-1).sort().values
            weight, inverse = weight[:, left], inverse[left][:, left]
            columns = torch.searchsorted(left, columns)
    return scores
