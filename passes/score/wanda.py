"""Scores channels by their weights times the size of what these are multiplied with.

Of every map that is summed over the axis: |W| · ‖x‖, summed over the outputs and over the inputs
that go with an index, where ‖x‖ is the root mean square of an input over calibration tokens.

Reference: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024,
eq. 1 (of single weights); An et al., Fluctuation-based Adaptive Structured Pruning, 2024
(summed over structures, as a baseline).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from passes.score._reading import added, grouped, matrix, readers
from surgeon.plugin import Context, ScorePass


@dataclass(frozen=True)
class Wanda(ScorePass):
    """Absolute weights times the norms of their inputs, summed over the channel."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: norms"})

    def score(self, context: Context) -> dict[str, Any]:
        """Returns the sums, float64; branches are refused."""
        return {n: added(context, n, readers(context, n), self._map) for n in context.targets}

    def _map(self, context: Context, consumer: Any) -> Any:
        weight = matrix(context, consumer.param, consumer.dim)
        square = context.norms([consumer.param])[consumer.param].square.double()
        return grouped(consumer, weight.abs().sum(0) * square.clamp(min=0).sqrt())
