"""What a training is told, and what it comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Settings(Protocol):
    """The options of a training; the pass `recover` documents them."""

    @property
    def method(self) -> str: ...  # noqa: D102
    @property
    def steps(self) -> int: ...  # noqa: D102
    @property
    def batch(self) -> int: ...  # noqa: D102
    @property
    def length(self) -> int: ...  # noqa: D102
    @property
    def rate(self) -> float: ...  # noqa: D102
    @property
    def warmup(self) -> float: ...  # noqa: D102
    @property
    def decay(self) -> float: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def distill(self) -> str: ...  # noqa: D102
    @property
    def temperature(self) -> float: ...  # noqa: D102
    @property
    def weight(self) -> float: ...  # noqa: D102
    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def dropout(self) -> float: ...  # noqa: D102
    @property
    def keep_zeros(self) -> bool: ...  # noqa: D102
    @property
    def precision(self) -> str: ...  # noqa: D102
    @property
    def accumulate(self) -> int: ...  # noqa: D102
    @property
    def checkpointing(self) -> bool: ...  # noqa: D102
    @property
    def checkpoints(self) -> str: ...  # noqa: D102
    @property
    def save_every(self) -> int: ...  # noqa: D102
    @property
    def fsdp(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class Trained:
    """What a training came to.

    Attributes:
        state: the model's tensors by its own names, adapters merged, on the CPU.
        curve: step and loss, as the trainer logged them.
        steps: that were taken in all.
        tokens: that were seen in all.
        resumed: the step that it went on from; 0 for the beginning.
        seconds: of this run.
    """

    state: Mapping[str, Any]
    curve: tuple[tuple[int, float], ...]
    steps: int
    tokens: int
    resumed: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns the figures, as a report keeps them."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "resumed": self.resumed,
            "training_seconds": self.seconds,
            "curve": [list(point) for point in self.curve],
        }
