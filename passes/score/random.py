"""Scores channels at random: the baseline that any score must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgeon.plugin import Context, ScorePass


@dataclass(frozen=True)
class Random(ScorePass):
    """Uniform random numbers, the same for the same seed and axis name."""

    def score(self, context: Context) -> dict[str, Any]:
        """Returns float64 numbers in [0, 1)."""
        out: dict[str, Any] = {}
        for name in context.targets:
            draw = np.random.default_rng([context.seed, zlib.crc32(name.encode())])
            axis = context.axes.by_name.get(name)
            if axis is None:
                out[name] = np.asarray(draw.random())
                continue
            outer = (context.axes.by_name[o].size for o in axis.outer)
            out[name] = draw.random((*outer, axis.size))
        return out
