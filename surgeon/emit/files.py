"""Outputs that are complete or absent: written beside, then renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    pass

MARKER = "surgeon.json"
"""The report in every folder that Surgeon writes: what may be overwritten has one."""

_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_OWNER = re.compile(rf"{_HOST}-(\d+)-[0-9a-f]{{8}}")
_OPEN: set[Path] = set()


@contextmanager
def output_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False, need_bytes: int | None = None
) -> Generator[Path, None, None]:
    """Yields an empty temporary folder that becomes `path` when the block ends without error.

    Until then `path` is what it was, and after an error it still is.

    Args:
        path: where the result goes. It may be missing or an empty folder.
        overwrite: replace a folder that an earlier run wrote; nobody else's is touched.
        need_bytes: how much the caller is going to write.

    Raises:
        SurgeonError: `bad-output` where `path` can't be written or holds something else,
            `disk-full` where the disk has too little room, before or while writing.
    """
    target = _target(path)
    partial = _sibling(target, "partial")
    with _reported(target):
        _check_folder(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        _recover(target)
        _check_folder(target, overwrite)  # an old result may have come back
        partial.mkdir()
    _OPEN.add(partial)
    try:
        with _reported(target):
            _check_room(target, need_bytes)
            yield partial
            _sync_tree(partial)
            _check_folder(target, overwrite)
            _swap(partial, target)
    finally:
        _OPEN.discard(partial)
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def output_file(
    path: str | os.PathLike[str], *, overwrite: bool = False, need_bytes: int | None = None
) -> Generator[Path, None, None]:
    """Yields the name of a temporary file that becomes `path` when the block ends without error.

    Args:
        path: where the result goes. It may be missing or an empty file.
        overwrite: replace an existing file.
        need_bytes: how much the caller is going to write.

    Raises:
        SurgeonError: `bad-output` or `disk-full`, as for `output_folder`.
    """
    target = _target(path)
    partial = _sibling(target, "partial")
    _OPEN.add(partial)
    try:
        with _reported(target):
            _check_file(target, overwrite)
            target.parent.mkdir(parents=True, exist_ok=True)
            _recover(target)
            partial.touch()
            _check_room(target, need_bytes)
            yield partial
            _sync(partial)
            _check_file(target, overwrite)
            partial.replace(target)
            _sync(target.parent)
    finally:
        _OPEN.discard(partial)
        with suppress(OSError):  # whatever made it fail has been reported
            partial.unlink(missing_ok=True)


def check_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuses a folder that `output_folder` would refuse, before any work is done.

    Raises:
        SurgeonError: `bad-output`.
    """
    target = _target(path)
    with _reported(target):
        _check_folder(target, overwrite)
        _check_parent(target)


def check_output_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Refuses a file that `output_file` would refuse, before any work is done.

    Raises:
        SurgeonError: `bad-output`.
    """
    target = _target(path)
    with _reported(target):
        _check_file(target, overwrite)
        _check_parent(target)


def _check_parent(target: Path) -> None:
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir():
        raise _refused(target, f"{parent} is a file", "name another place")
    if not os.access(parent, os.W_OK):
        raise _refused(target, f"{parent} can't be written to", "name another place")


def _target(path: str | os.PathLike[str]) -> Path:
    """A link is followed, so that what it leads to is replaced and not the link."""
    try:
        target = Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, or no name at all
        raise _refused(Path(path), f"it is no path: {error}", "name another place") from error
    if not target.name:
        raise _refused(target, "it is the root of the file system", "name a folder in it")
    return target


def _refused(target: Path, why: str, try_: str, what: str = "can't write here") -> SurgeonError:
    return SurgeonError(Code.BAD_OUTPUT, what, at=str(target), why=why, try_=try_)


def _check_folder(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise _refused(target, "it is a file", "name a folder that doesn't exist yet")
    if target.is_mount():
        why = "it is a mount point, so a finished result can't be renamed to it"
        raise _refused(target, why, "name a folder in it")
    if next(target.iterdir(), None) is None:
        return
    if not (target / MARKER).is_file():
        raise _refused(
            target,
            f"the folder is not empty and has no {MARKER}, so it isn't a result of Surgeon",
            "name an empty folder or one that doesn't exist yet",
        )
    if not overwrite:
        raise _refused(
            target,
            "the folder holds an earlier result",
            "ask to overwrite it, or name another folder",
        )


def _check_file(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise _refused(target, "it is a folder", "name a file in it")
    if not overwrite and target.exists() and target.stat().st_size:
        raise _refused(target, "the file exists", "ask to overwrite it, or name another file")


def _check_room(target: Path, need_bytes: int | None) -> None:
    free = shutil.disk_usage(target.parent).free
    if need_bytes is not None and need_bytes > free:
        raise _full(target, f"{_gb(need_bytes)} are needed and {_gb(free)} are free", need_bytes)


def _full(target: Path, why: str, need: int | None = None) -> SurgeonError:
    return SurgeonError(
        Code.DISK_FULL,
        "the disk has too little room",
        at=str(target),
        why=why,
        try_="make room, or write to another disk",
        data={"need_bytes": need, "free_bytes": shutil.disk_usage(target.parent).free},
    )


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


@contextmanager
def _reported(target: Path) -> Generator[None, None, None]:
    """What the file system refuses under the target's own folder becomes a four-part error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(target.parent).free
            what = "a file grew too large" if error.errno == errno.EFBIG else "it ran full"
            raise _full(target, f"{what} while writing, {_gb(free)} are free") from error
        about = [Path(os.fsdecode(f)) for f in (error.filename, error.filename2) if f is not None]
        ours = [f for f in about if _is_ours(f, target)]
        if not ours:
            raise  # the caller failed to read something else
        why = f"{error.strerror or error} ({', '.join(map(str, ours))})"
        raise _refused(target, why, "write to a folder that you may write to") from error


def _is_ours(path: Path, target: Path) -> bool:
    if target.is_relative_to(path):
        return True
    inside = path.parts[len(target.parent.parts) : len(target.parent.parts) + 1]
    return path.is_relative_to(target.parent) and inside[0].startswith(f".{target.name}.")


def _swap(partial: Path, target: Path) -> None:
    """Puts `partial` in `target`'s place; the old result is kept until the new one is there."""
    old: Path | None = None
    if target.exists():
        old = _sibling(target, "replaced")
        _OPEN.add(old)
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if old is not None:
            old.rename(target)
        raise
    finally:
        if old is not None:
            _OPEN.discard(old)
    _sync(target.parent)
    if old is not None:
        shutil.rmtree(old)


# --- what killed runs leave ----------------------------------------------------------------------


def _sibling(target: Path, kind: str) -> Path:
    """A name on the same file system that says whose it is: machine, process, and a random part."""
    return target.with_name(f".{target.name}.{kind}-{owner()}")


def owner() -> str:
    """Returns a name that no other has, and that says which process made it."""
    return f"{_HOST}-{os.getpid()}-{secrets.token_hex(4)}"


def owned(name: str) -> bool:
    """Tells whether the process that made a name may still run; one of another machine may."""
    match = _OWNER.fullmatch(name)
    return match is None or int(match[1]) == os.getpid() or _alive(int(match[1]))


def _recover(target: Path) -> None:
    """Removes what runs on this path left when they were killed; a result set aside comes back.

    A library that is told a temporary name may write beside it, under one made of it: onnx-ir puts
    a dot before it and something random behind it.
    """
    own = rf"\.{re.escape(target.name)}\.(partial|replaced)-{_HOST}-(\d+)-[0-9a-f]{{8}}"
    pattern = re.compile(rf"({own})|\.({own})\.\w+")
    for path in sorted(target.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        name, kind, pid = (
            a or b for a, b in zip(match.groups()[:3], match.groups()[3:], strict=True)
        )
        if path.with_name(name) in _OPEN or _alive(int(pid)):
            continue
        if path.name == name and kind == "replaced" and not target.exists():
            path.rename(target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # an earlier process had this number: what is ours now is in _OPEN
    if sys.platform == "win32":
        return True  # signal 0 is no question there, so leftovers stay
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            _sync(Path(root) / name)
        _sync(Path(root))


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return  # folders can't be opened there
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
