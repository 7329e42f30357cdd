"""How much memory a run may take: as asked for, or a share of what is free."""

from __future__ import annotations

import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from surgeon.errors import Code, SurgeonError

SHARE = 0.5
"""Of what is free, how much a run takes that is told nothing."""

LEAST = 64 * 2**20
"""Bytes that blocks are read, sliced and written in."""

START = 256 * 2**20
"""Bytes that a run takes once its model is open: such blocks, and what describes the result."""

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def give_back() -> None:
    """Gives memory that was freed, and is held for the next who asks, back to the system.

    The C library holds what lies between blocks that are in use; of stages that each take much, in
    blocks of their own sizes, one would come on top of the other. Where it knows no such call
    (anything but glibc) nothing happens.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@dataclass(frozen=True)
class Memory:
    """The most bytes that the process may hold in memory, libraries included.

    Attributes:
        limit: in bytes.
        asked: whether the user named it; a limit that nobody named refuses nothing.
    """

    limit: int
    asked: bool = False

    @classmethod
    def of(cls, given: str | int | Memory | None) -> Memory:
        """Returns the limit that is meant: `2GB`, `1.5 GiB`, bytes, or a share of what is free.

        Raises:
            SurgeonError: `bad-option` for what is no size.
        """
        if isinstance(given, Memory):
            return given
        if given is None:
            return cls(resident() + int(SHARE * available()))
        match = _SIZE.fullmatch(str(given))
        unit = None if match is None else _UNITS.get(match[2].upper())
        if match is None or unit is None or float(match[1]) * unit < 1:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{given!r} is no amount of memory",
                at="--memory",
                why="it is a number of bytes, or one with a unit: KB, MB, GB, or KiB, MiB, GiB",
                try_="--memory 2GB",
            )
        return cls(int(float(match[1]) * unit), True)

    def fits(self, need: int) -> bool:
        """Whether so many bytes fit in beside what the process holds now."""
        return resident() + need <= self.limit

    def check(self, need: int, what: str, try_: str = "") -> None:
        """Refuses, where the user set the limit, what takes more than is left.

        Args:
            need: bytes, beside what the process holds now.
            what: takes them.
            try_: what else may be done; a larger limit is named in any case.

        Raises:
            SurgeonError: `bad-option`, with the number that is needed.
        """
        if not self.asked or self.fits(need):
            return
        whole = resident() + need
        more = f"--memory {-(-whole // 10**7) / 100:.2f}GB"
        raise SurgeonError(
            Code.BAD_OPTION,
            "the memory is too small for this",
            at=f"--memory {self.limit / 1e9:.2f}GB",
            why=f"{what}, which takes {need / 1e9:.2f} GB beside {resident() / 1e9:.2f} GB that "
            "libraries and the program hold",
            try_=f"{more}; {try_}" if try_ else more,
            data={"limit_bytes": self.limit, "need_bytes": whole},
        )

    def block(self) -> int:
        """Returns the bytes of one block that tensors are read in, of which a few are held.

        Raises:
            SurgeonError: `bad-option` where there is no room for any.
        """
        self.check(LEAST, "tensors are read, sliced and written in blocks")
        return min(max((self.limit - resident()) // 24, 2**20), 2**25)


def resident() -> int:
    """Returns the bytes that this process holds in memory."""
    return int(psutil.Process().memory_info().rss)


def available() -> int:
    """Returns the bytes that can be had: of the machine, or of the control group it runs in."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most = (group / "memory.max").read_text().strip()
        held = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free  # no control groups of version 2 here
    if most == "max":
        return free
    return min(free, max(0, int(most) - held + int(stat.get("inactive_file", 0))))
