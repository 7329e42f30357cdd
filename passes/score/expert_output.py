"""Scores an expert by the norm of what it adds: its output times the router's weight.

Reference: Lasby et al., REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression, 2025
(arXiv:2510.13999): the mean, over the tokens sent to an expert, of its weight times the norm of
its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from passes.score._routing import by_expert
from surgeon.plugin import Context, ScorePass


@dataclass(frozen=True)
class ExpertOutput(ScorePass):
    """The mean norm of what an expert adds to the residual stream, its routing weight included."""

    needs: ClassVar[frozenset[str]] = frozenset({"activations: routing"})

    over: Literal["sent", "all"] = "sent"
    """Average over the tokens that are sent to the expert, or over all of them: the latter also
    counts how often it is used."""

    def score(self, context: Context) -> dict[str, Any]:
        """Returns the means, float64; only axes of experts, or of groups of them, have one."""
        return {name: by_expert(context, name, self._mean) for name in context.targets}

    def _mean(self, found: Any) -> Any:
        # An expert that no token reached adds nothing.
        return found.norm if self.over == "all" else found.norm / found.sent.clamp(min=1e-12)
