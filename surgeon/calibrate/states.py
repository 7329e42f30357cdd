"""What is kept between pieces: one tensor a batch, in memory or in files of a folder."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from surgeon.errors import Code, SurgeonError

_NUMBERS = itertools.count()


class States:
    """A tensor for each batch: the residual stream after a piece, say.

    Args:
        count: batches.
        folder: where they are kept as mapped files; in memory without it.
    """

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self._held: list[torch.Tensor | None] = [None] * count
        self._folder, self._number = folder, next(_NUMBERS)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, batch: int) -> torch.Tensor | None:
        return self._held[batch]

    def __setitem__(self, batch: int, tensor: torch.Tensor | None) -> None:
        if tensor is None or self._folder is None:
            self._held[batch] = None if tensor is None else tensor.detach().cpu()
            return
        old = self._held[batch]
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            old = _mapped(self._folder / f"{self._number}-{batch}", tensor)
            self._held[batch] = old
        old.copy_(tensor.detach())

    def clear(self) -> None:
        """Lets go of all of them, and of their files."""
        self._held = [None] * len(self._held)
        if self._folder is not None:
            for path in self._folder.glob(f"{self._number}-*"):
                path.unlink()


def by_window(states: States) -> list[torch.Tensor]:
    """Returns what is kept, by window, in memory of its own."""
    held = (states[batch] for batch in range(len(states)))
    return [row.clone() for state in held if state is not None for row in state]


def _mapped(path: Path, like: torch.Tensor) -> torch.Tensor:
    """Returns a tensor whose values lie in a file."""
    size = max(1, like.numel() * like.element_size())
    try:
        with path.open("wb") as file:
            # Room is taken now: a full disk under a mapping would end the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise SurgeonError(
            Code.DISK_FULL if full else Code.BAD_OUTPUT,
            "states can't be kept on the disk",
            at=str(path.parent),
            why=error.strerror or str(error),
            try_="another folder for --offload, or fewer --samples",
        ) from error
    flat = torch.from_file(str(path), shared=True, size=like.numel(), dtype=like.dtype)
    return flat.reshape(like.shape)


@contextmanager
def scratch(offload: Path | None) -> Generator[Path | None]:
    """Yields a folder for states that is gone afterwards; None where they stay in memory.

    Raises:
        SurgeonError: `bad-output` where there can't be one.
    """
    if offload is None:
        yield None
        return
    try:
        offload.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(
            dir=offload, prefix=".states-", ignore_cleanup_errors=True
        )
    except OSError as error:
        raise SurgeonError(
            Code.BAD_OUTPUT,
            "states can't be kept on the disk",
            at=str(offload),
            why=error.strerror or str(error),
            try_="another folder for --offload",
        ) from error
    with made as name:
        yield Path(name)
