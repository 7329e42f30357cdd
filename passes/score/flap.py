"""Scores channels by how much they fluctuate, times the weights that read them.

A channel that hardly varies can be replaced by its mean, which goes into the bias of the map that
reads it (compensate/bias). What is lost is the variance of the input times the squared norm of its
column: the weighted input feature variance. Standardised within each axis, scores can be compared
over layers.

Reference: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, 2024
(WIFV, and the standardisation of its adaptive search).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from passes.score._reading import added, grouped, matrix, readers
from surgeon.plugin import Context, ScorePass


@dataclass(frozen=True)
class Flap(ScorePass):
    """The variance of a channel times the squared norm of the weights that read it."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: norms"})

    standardise: bool = True
    """Subtract the mean of an axis's scores and divide by their deviation."""

    def score(self, context: Context) -> dict[str, Any]:
        """Returns the fluctuations, float64; branches are refused."""
        out: dict[str, Any] = {}
        for name in context.targets:
            scores = added(context, name, readers(context, name), self._map)
            if self.standardise:
                # Equal scores have no deviation; they are all as far from their mean: not at all.
                scores = (scores - scores.mean()) / (scores.std() or 1.0)
            out[name] = scores
        return out

    def _map(self, context: Context, consumer: Any) -> Any:
        weight = matrix(context, consumer.param, consumer.dim)
        moments = context.norms([consumer.param])[consumer.param]
        variance = (moments.square.double() - moments.mean.double().square()).clamp(min=0)
        # The unbiased estimate, as in the paper.
        variance = variance * (moments.count / max(1, moments.count - 1))
        return grouped(consumer, weight.square().sum(0) * variance)
