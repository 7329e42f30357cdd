"""Large files written past the system's page cache."""

from __future__ import annotations

import errno
import mmap
import os
from contextlib import suppress
from types import TracebackType

BLOCK = 2**23
"""Bytes that are written at once, a multiple of `ALIGNED`."""

ALIGNED = 4096
"""What places, lengths and memory are a multiple of: the largest block of today's disks."""

_DIRECT: int = getattr(os, "O_DIRECT", 0)


class UnbufferedFile:
    """A new file, written in order and past the page cache where the system can.

    What goes through the page cache is copied by the kernel, displaces what others have there,
    and is then waited for; a checkpoint of 10 GB took twice as long. Where a file system, or its
    device, refuses, the rest goes through the cache as usual: the bytes are the same.

    Args:
        path: the file; what is there is overwritten.
        block: bytes that are gathered before they are written, a multiple of `ALIGNED`.

    Reference:
        open(2), O_DIRECT.
    """

    def __init__(self, path: str | os.PathLike[str], block: int = BLOCK) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        # Memory of its own pages, which is therefore aligned.
        self._memory = memoryview(mmap.mmap(-1, block))
        self._held = 0
        self._direct = False
        # After opening, so that a refusal is told from a file that can't be made.
        with suppress(OSError):
            self._set(True)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes.

        Raises:
            OSError: as for any file.
        """
        left = memoryview(data).cast("B")
        while left:
            part = left[: len(self._memory) - self._held]
            self._memory[self._held : self._held + len(part)] = part
            self._held += len(part)
            left = left[len(part) :]
            if self._held == len(self._memory):
                self._flush()

    def _flush(self) -> None:
        left = self._memory[: self._held]
        while left:
            try:
                left = left[os.write(self._file, left) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._set(False)
        self._held = 0

    def _set(self, direct: bool) -> None:
        """Has the system pass by the cache from now on, or not."""
        if not _DIRECT:
            return
        import fcntl  # which not every system has

        flags = fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags | _DIRECT if direct else flags)
        self._direct = direct

    def __enter__(self) -> UnbufferedFile:
        """Returns the file."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Writes what is held, unless something went wrong, and closes the file."""
        try:
            if kind is None and self._held:
                if self._held % ALIGNED:  # the end of a file
                    self._set(False)
                self._flush()
        finally:
            os.close(self._file)
