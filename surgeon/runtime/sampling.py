"""How the next token is drawn from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import Code, SurgeonError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. At temperature 0 the likeliest one is taken (greedy)."""

    temperature: float = 0.0
    """0 for greedy; above 0 the logits are divided by it before one is drawn."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities add up to this."""
    seed: int = 0
    """Row `i` of a batch is drawn as it would be alone with `seed + i`."""

    def __post_init__(self) -> None:
        """Refuses settings that mean nothing."""
        wrong = (
            ("temperature", self.temperature, "0 or more")
            if not (math.isfinite(self.temperature) and self.temperature >= 0)
            else ("top_k", self.top_k, "1 or more")
            if self.top_k is not None and self.top_k < 1
            else ("top_p", self.top_p, "above 0 and at most 1")
            if self.top_p is not None and not 0 < self.top_p <= 1
            else ("seed", self.seed, "0 or more")
            if self.seed < 0
            else None
        )
        if wrong is not None:
            name, value, need = wrong
            raise bad_option(name, value, f"it has to be {need}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            name = "top_k" if self.top_k is not None else "top_p"
            raise bad_option(
                name, getattr(self, name), "at temperature 0 nothing is drawn, so it has no effect"
            )


GREEDY = Sampling()


class Sampler:
    """Draws one token at a time, each row of a batch from random numbers of its own."""

    def __init__(self, sampling: Sampling, rows: int) -> None:
        self._sampling = sampling
        self._draws = [np.random.default_rng(sampling.seed + row) for row in range(rows)]

    def __call__(self, logits: NDArray[np.floating[Any]], row: int) -> int:
        """Returns the next token of a row from its logits [vocab]."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        return next_token(logits.astype(np.float64), self._sampling, self._draws[row])


def next_token(logits: NDArray[np.float64], sampling: Sampling, draw: np.random.Generator) -> int:
    """Returns one token drawn from logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: sampling.top_k]
    scaled = logits[order] / sampling.temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    if sampling.top_p is not None:
        # The token that crosses the line belongs to the set, so at least one always stays.
        kept = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
    return int(draw.choice(order, p=weights))


def bad_option(name: str, value: Any, why: str) -> SurgeonError:
    """Returns the refusal of a setting of generation."""
    return SurgeonError(
        Code.BAD_OPTION,
        f"{name} can't be {value}",
        at=f"option {name}",
        why=why,
        try_="leave it out for greedy text of 64 tokens",
        data={"option": name},
    )
