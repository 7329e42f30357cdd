"""The headers of safetensors files, read and checked; and files that stay what they were."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from surgeon.errors import Code, SurgeonError

STORED_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Element types of safetensors files."""

LONGEST = 100_000_000
"""Bytes of a safetensors header: the format's own limit."""


def bad_checkpoint(
    what: str, *, at: str, why: str, try_: str, data: Mapping[str, Any] | None = None
) -> SurgeonError:
    """Returns the error for weights that can't be used."""
    return SurgeonError(Code.BAD_CHECKPOINT, what, at=at, why=why, try_=try_, data=data)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a safetensors file."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int
    stamp: tuple[int, ...]
    """What the file was when its header was read."""


@contextmanager
def opened(entry: Entry) -> Generator[FileIO]:
    """Yields the file of a tensor, which at the end must be what it was when its header was read.

    Raises:
        SurgeonError: `bad-checkpoint` where it has changed, `missing-file` where it can't be read.
    """
    try:
        with entry.file.open("rb", buffering=0) as file:
            yield file
            same = _stamp(os.fstat(file.fileno())) == entry.stamp
    except OSError as error:
        raise _unreadable(entry.file, error) from error
    if not same:
        raise _changed(entry.file)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    """Returns what tells a file from what it was: which one it is, its size, its last change."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _changed(path: Path) -> SurgeonError:
    """Returns the error for a file that is no more what it was when its header was read."""
    return bad_checkpoint(
        f"{path.name} has changed while it was read",
        at=str(path),
        why="its size, time or place on the disk is another than when its header was read",
        try_="wait until whatever writes it is through, and run again",
    )


def _unreadable(path: Path, error: OSError) -> SurgeonError:
    """Returns the error for a file that was there when its header was read."""
    return SurgeonError(
        Code.MISSING_FILE,
        f"{path.name} can't be read any more",
        at=str(path),
        why=error.strerror or str(error),
        try_="see that the file stays where it is, and that its disk is sound",
    )


def header(path: Path) -> dict[str, Entry]:
    """Reads and checks a file's header, so that a damaged file is known before any work."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            first = file.read(8)
            length = int.from_bytes(first, "little")
            _check_length(path, first, length, found.st_size)
            text = file.read(length)
    except OSError as error:
        raise _unreadable(path, error) from error
    size = found.st_size
    try:
        found_in = json.loads(text)
        found_in.pop("__metadata__", None)
        out = {
            key: _entry(path, key, value, 8 + length, _stamp(found))
            for key, value in found_in.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise bad_checkpoint(
            f"the header of {path.name} can't be read",
            at=str(path),
            why=f"{type(error).__name__}: {error}",
            try_="fetch this file again; files for other quantised formats can't be pruned",
        ) from error
    expected = max((e.stop for e in out.values()), default=8 + length)
    if expected != size:
        raise truncated(path, expected, size)
    at = 8 + length
    for e in sorted(out.values(), key=lambda e: (e.start, e.stop)):
        if e.stop - e.start != e.dtype.itemsize * math.prod(e.shape):
            raise _contradicts(e, f"{e.stop - e.start} bytes for {e.dtype} {list(e.shape)}")
        if e.start != at:
            raise _contradicts(e, f"it begins at byte {e.start}, and what is before ends at {at}")
        at = e.stop
    return out


def _check_length(path: Path, first: bytes, length: int, size: int) -> None:
    """Refuses a file whose first 8 bytes are no length of a header that it can hold."""
    pointer = first == b"version "
    if pointer or len(first) < 8:
        raise bad_checkpoint(
            f"{path.name} is no safetensors file",
            at=str(path),
            why="it is a Git LFS pointer to the real file"
            if pointer
            else f"at least 8 bytes expected, {size} found",
            try_="run `git lfs pull`" if pointer else "fetch this file again",
        )
    if 8 + length > size:
        raise truncated(path, 8 + length, size)
    if length > LONGEST:
        raise bad_checkpoint(
            f"the header of {path.name} can't be read",
            at=str(path),
            why=f"it has {length:,} bytes, and the format allows {LONGEST:,}",
            try_="fetch this file again",
        )


def _entry(path: Path, key: str, value: Any, begin: int, stamp: tuple[int, ...]) -> Entry:
    """Returns where a tensor lies, of whole numbers that are not negative."""
    start, stop = value["data_offsets"]
    for number in (start, stop, *value["shape"]):
        if type(number) is not int or number < 0:
            raise ValueError(f"{key}: {number!r} is neither a size nor a place")
    dtype, shape = STORED_DTYPES[value["dtype"]], tuple(value["shape"])
    return Entry(path, key, dtype, shape, begin + start, begin + stop, stamp)


def _contradicts(entry: Entry, why: str) -> SurgeonError:
    return bad_checkpoint(
        f"the header of {entry.file.name} contradicts itself",
        at=f"{entry.file}, tensor {entry.key}",
        why=why,
        try_="fetch this file again",
    )


def truncated(path: Path, expected: int, found: int) -> SurgeonError:
    """Returns the error for a file that has another size than its header says, in bytes."""
    return bad_checkpoint(
        f"{path.name} is {'truncated' if found < expected else 'longer than its header says'}",
        at=str(path),
        why=f"{expected} bytes expected, {found} found",
        try_="fetch this file again",
        data={"expected_bytes": expected, "found_bytes": found},
    )
