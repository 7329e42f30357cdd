"""Scores an expert by how often the router sends tokens to it.

Reference: Chen et al., Task-Specific Expert Pruning for Sparse Mixture-of-Experts, 2022
(arXiv:2206.00277); Muzio, Sun and He, SEER-MoE: Sparse Expert Efficiency through Regularization
for Mixture-of-Experts, 2024 (arXiv:2404.05089), whose counts of hard decisions these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from passes.score._routing import by_expert
from surgeon.plugin import Context, ScorePass


@dataclass(frozen=True)
class RoutingFrequency(ScorePass):
    """The share of calibration tokens that are sent to an expert."""

    needs: ClassVar[frozenset[str]] = frozenset({"activations: routing"})

    def score(self, context: Context) -> dict[str, Any]:
        """Returns the shares, float64; only axes of experts, or of groups of them, have one."""
        return {n: by_expert(context, n, lambda found: found.sent) for n in context.targets}
