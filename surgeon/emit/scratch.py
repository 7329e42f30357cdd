"""Scratch folders that are gone afterwards, if not after this run then with the next one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from surgeon.emit.files import owned, owner

_PREFIX = "surgeon-scratch-"


@contextmanager
def scratch() -> Generator[Path]:
    """Yields an empty folder where temporary files go (`TMPDIR`).

    What runs left there when they were killed is removed first.

    Raises:
        OSError: there is no room, or no leave to write.
    """
    place = Path(tempfile.gettempdir())
    _sweep(place)
    folder = place / f"{_PREFIX}{owner()}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(place: Path) -> None:
    for path in place.glob(f"{_PREFIX}*"):
        if not owned(path.name.removeprefix(_PREFIX)):
            with suppress(OSError):  # somebody else's, on a machine that several people use
                shutil.rmtree(path)
