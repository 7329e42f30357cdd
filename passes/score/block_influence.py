"""Scores branches by how much they turn the residual stream: one less the cosine.

Reference: Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect,
2024, eq. 1 (block influence, of whole layers; here of attention and MLP alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from surgeon.plugin import Context, ScorePass


@dataclass(frozen=True)
class BlockInfluence(ScorePass):
    """One less the mean cosine of the residual stream before and after a branch."""

    needs: ClassVar[frozenset[str]] = frozenset({"activations: similarity"})

    def score(self, context: Context) -> dict[str, Any]:
        """Returns the influence of each branch, float64 []; axes are refused."""
        for name in context.targets:
            if name in context.axes.by_name:
                raise context.unable(name, "block influence is of whole branches (role layers)")
        found = context.similarity(context.targets)
        return {name: np.asarray(1.0 - float(found[name])) for name in context.targets}
