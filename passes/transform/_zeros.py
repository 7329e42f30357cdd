"""Which weights are set to zero: the lowest of their row, of their matrix, or of a few neighbours.

Scores are [rows, runs, d]: `d` values that are multiplied with inputs next to each other, `runs` of
them in a row. A linear map has one run; a convolution has one for each place of its kernel.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal, Self

Group = Literal["row", "layer"]


@dataclass(frozen=True)
class Pattern:
    """At most `kept` of every `of` weights along the inputs are not zero."""

    kept: int
    of: int

    @classmethod
    def read(cls, text: str) -> Self:
        """Returns the pattern that a text such as `2:4` spells.

        Raises:
            ValueError: for another text.
        """
        found = re.fullmatch(r"([0-9]{1,3}):([0-9]{1,3})", text)
        kept, of = map(int, found.groups()) if found else (0, 0)
        if not 0 < kept < of:
            raise ValueError(f"pattern is {text!r}, it has to be N:M with N below M, such as 2:4")
        return cls(kept, of)

    def __str__(self) -> str:
        """Spells it as it is read."""
        return f"{self.kept}:{self.of}"


def unread(value: Any) -> Any:
    """Returns the text of a pattern that YAML read as a number to the base of sixty: 2:4 as 124."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return f"{value // 60}:{value % 60}" if whole and value > 60 else value


def lowest(scores: Any, count: int) -> Any:
    """Returns where the lowest `count` of each [..., n] stand, of equal ones the first."""
    import torch

    out = torch.zeros(scores.shape, dtype=torch.bool)
    return out.scatter_(-1, scores.argsort(stable=True, dim=-1)[..., :count], True)


def of_pattern(scores: Any, pattern: Pattern) -> Any:
    """Returns where zeros go for no more than N of every M of [..., d] to be left.

    A last group of fewer than M loses only what it has over N.
    """
    import torch

    *lead, d = scores.shape
    missing = -d % pattern.of
    # What isn't there takes the first places among the zeros.
    padded = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    groups = padded.reshape(*lead, -1, pattern.of)
    return lowest(groups, pattern.of - pattern.kept).reshape(*lead, -1)[..., :d]


def of_share(scores: Any, share: float, group: Group) -> Any:
    """Returns where zeros go for this share of each row, or of the whole, to be zero."""
    rows = scores.flatten(1) if group == "row" else scores.flatten()[None]
    return lowest(rows, round(share * rows.shape[1])).reshape(scores.shape)


def below(every: list[Any], share: float) -> list[Any]:
    """Returns where zeros go for this share of all scores together to be zero."""
    import torch

    flat = torch.cat([scores.flatten() for scores in every])
    mask = lowest(flat[None], round(share * flat.numel()))[0]
    parts = mask.split([scores.numel() for scores in every])
    return [part.reshape(scores.shape) for part, scores in zip(parts, every, strict=True)]
