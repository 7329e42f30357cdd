"""How far a model's predictions are from another's, on the same windows, exactly.

The models are not in memory together: the first one's logits wait in files, in single precision,
which holds any half precision as it is.
"""

from __future__ import annotations

import errno
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    import torch

    from surgeon.calibrate.parallel import World

_ROWS = 128
"""Positions compared at a time, as for perplexity."""


@dataclass(frozen=True)
class Agreement:
    """How often and how closely a model predicts what another one does.

    Attributes:
        top1: share of the positions where both think the same token likeliest.
        kl: mean over the positions of KL(reference ‖ model), in nats.
        tokens: positions compared: those whose next token is in the window.
    """

    top1: float
    kl: float
    tokens: int


class Kept:
    """The logits of a reference in a scratch folder, a file for each window.

    Args:
        folder: an existing folder, for as long as models are compared.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, text: int, window: int, logits: Any) -> None:
        """Stores the logits [1, window, vocab] of a window.

        Raises:
            SurgeonError: `disk-full`.
        """
        rows = _rows(logits).cpu().numpy()
        free = shutil.disk_usage(self._folder).free
        if rows.nbytes > free:
            raise self._full(rows.nbytes, free)
        try:
            np.save(self._file(text, window), rows)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise self._full(rows.nbytes, shutil.disk_usage(self._folder).free) from error

    def load(self, text: int, window: int) -> torch.Tensor:
        """Returns what was kept of a window, [window − 1, vocab]."""
        import torch

        return torch.from_numpy(np.load(self._file(text, window), allow_pickle=False))

    def _file(self, text: int, window: int) -> Path:
        return self._folder / f"{text}-{window}.npy"

    def _full(self, need: int, free: int) -> SurgeonError:
        return SurgeonError(
            Code.DISK_FULL,
            "there is too little room to keep the first model's predictions",
            at=str(self._folder),
            why=f"a window takes {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free",
            try_="fewer --agreement-windows, a smaller --window, or TMPDIR on another disk",
            data={"need_bytes": need, "free_bytes": free},
        )


class Differences:
    """The differences of a model from what was kept, added up window by window."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[float, float, float]] = {}

    def add(self, reference: torch.Tensor, logits: Any, window: int | None = None) -> None:
        """Adds a window.

        Args:
            reference: what was kept of it, [window − 1, vocab].
            logits: the model's, [1, window, vocab].
            window: its number among those of all processes; the next one without it.
        """
        own = _rows(logits)
        same, kl = 0, 0.0
        for first in range(0, len(own), _ROWS):
            ours = own[first : first + _ROWS]
            theirs = reference[first : first + _ROWS].to(ours.device)
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            kl += divergence(theirs, ours)
        self._found[len(self._found) if window is None else window] = (same, kl, len(own))

    def result(self, world: World | None = None, windows: int = 0) -> Agreement:
        """Returns the means over everything that was added.

        Args:
            world: processes that have each added their windows; all return the same, bit for bit.
            windows: of all of them.
        """
        columns = [{w: found[i] for w, found in self._found.items()} for i in range(3)]
        each = [list(c.values()) if world is None else world.each(c, windows) for c in columns]
        same, kl, tokens = (math.fsum(values) for values in each)
        return Agreement(same / tokens, kl / tokens, int(tokens))


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Returns the sum over the rows of KL(reference ‖ model), in nats; never below 0.

    Args:
        reference: logits [rows, vocab], in single precision.
        logits: the model's, of the same shape.
    """
    import torch

    # In double precision: near agreement the terms nearly cancel.
    p, q = (torch.log_softmax(x.double(), dim=-1) for x in (reference, logits))
    # A token that the reference excludes adds nothing, whatever the model thinks of it.
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return max(0.0, float(terms.sum()))


def vocabulary(logits: Any) -> int:
    """Returns how many tokens logits [1, window, vocab] are about."""
    return int(logits.shape[-1])


def _rows(logits: Any) -> torch.Tensor:
    """Returns the logits that predict a token of the window, [window − 1, vocab]."""
    import torch

    return torch.as_tensor(logits)[0, :-1].float()
