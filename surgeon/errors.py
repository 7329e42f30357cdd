"""The one error type of Surgeon: always four parts, always a code of a closed list."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any


class Code(StrEnum):
    """The closed list of error codes. Scripts may match on them; they don't change meaning."""

    NOT_A_MODEL = "not-a-model"
    MISSING_FILE = "missing-file"
    BAD_CHECKPOINT = "bad-checkpoint"
    MISSING_EXTRA = "missing-extra"
    REMOTE_CODE = "remote-code"
    CAPTURE_FAILED = "capture-failed"
    DATA_DEPENDENT = "data-dependent"
    NO_OP_RULE = "no-op-rule"
    BAD_PROGRAM = "bad-program"
    BAD_TEXT = "bad-text"
    BAD_RATIO = "bad-ratio"
    EMPTY_AXIS = "empty-axis"
    NO_SUCH_ROLE = "no-such-role"
    NO_SUCH_AXIS = "no-such-axis"
    NO_SUCH_PASS = "no-such-pass"
    BAD_PASS = "bad-pass"
    BAD_OPTION = "bad-option"
    BAD_RECIPE = "bad-recipe"
    PINNED = "pinned"
    BAD_PLAN = "bad-plan"
    PLAN_MISMATCH = "plan-mismatch"
    TARGET_REFUSED = "target-refused"
    BAD_OUTPUT = "bad-output"
    DISK_FULL = "disk-full"
    VERIFY_FAILED = "verify-failed"
    BAD_TEXT_INPUT = "bad-text-input"
    RUNTIME_FAILED = "runtime-failed"


class SurgeonError(Exception):
    """A refusal that says what, where, why and what to try, with its reason as data.

    Args:
        code: one of the closed list.
        what: the fault in one line.
        at: where it was found: a file, an axis, an operation with its source line.
        why: the reason, in words a user can act on.
        try_: what to do about it.
        data: the same reason as plain data, for callers that are programs.
    """

    def __init__(
        self,
        code: Code,
        what: str,
        *,
        at: str,
        why: str,
        try_: str,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.code = code
        self.what = what
        self.at = at
        self.why = why
        self.try_ = try_
        self.data: dict[str, Any] = dict(data or {})
        super().__init__(str(self))

    def __str__(self) -> str:
        return (
            f"[{self.code.value}] {self.what}\n  at  {self.at}\n  why {self.why}\n  try {self.try_}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (self.code, self.what, self.at, self.why, self.try_, self.data))


def _rebuild(
    code: Code, what: str, at: str, why: str, try_: str, data: Mapping[str, Any]
) -> SurgeonError:
    return SurgeonError(code, what, at=at, why=why, try_=try_, data=data)


def near(name: str, known: Iterable[str]) -> str:
    """Returns the known names nearest to `name`, or all of them, as one line of text."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return "did you mean " + ", ".join(close) + "?" if close else "one of: " + ", ".join(known)


def no_weights(where: str) -> SurgeonError:
    """Returns the refusal of anything that needs values where there is only a configuration."""
    return SurgeonError(
        Code.MISSING_FILE,
        "there are no weights to read",
        at=where,
        why="only a configuration was given, which is enough to inspect and to plan sizes",
        try_="a checkpoint, a GGUF file or a hub id; to plan sizes, --score random --dry-run",
    )


def refused_by_system(error: OSError) -> SurgeonError:
    """Returns what the operating system refuses, a read or a write that nothing else tells of."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    names = [
        os.fsdecode(f) for f in (error.filename, error.filename2) if isinstance(f, str | bytes)
    ]
    return SurgeonError(
        Code.DISK_FULL if full else Code.MISSING_FILE,
        "the disk has too little room" if full else "the system refuses a file",
        at=", ".join(names) or "a file that it doesn't name",
        why=error.strerror or str(error) or type(error).__name__,
        try_="make room; scratch files go where TMPDIR says"
        if full
        else "see that the file is there, may be read or written, and that its disk is sound",
    )
