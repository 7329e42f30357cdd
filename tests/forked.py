"""The command in forked processes: to its end, or as far as where it is about to write."""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


def start(arguments: tuple[str, ...], place: Path, park: Callable[[], None] | None = None) -> int:
    """Forks a process that runs the command in a folder; returns its number.

    Args:
        arguments: of the command.
        place: where it runs.
        park: called in the process when it is about to write for the first time.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.chdir(place)
        log = os.open(place / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TMPDIR"] = str(place / "tmp")
        tempfile.tempdir = None
        sys.argv = ["surgeon", *arguments]
        if park is not None:
            _stop_before_writing(park)
        code = _main()
        (place / "modules.json").write_text(json.dumps(sorted(sys.modules)))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _stop_before_writing(park: Callable[[], None]) -> None:
    """Has `park` called when a temporary name is first chosen."""
    from surgeon.emit import files

    name = files._sibling

    def first(target: Path, kind: str) -> Path:
        files._sibling = name
        park()
        return name(target, kind)

    files._sibling = first


class Parked:
    """A run that has done all but write, and is forked as often as it is to write."""

    def __init__(self, arguments: tuple[str, ...], place: Path) -> None:
        asks, self._ask = os.pipe()
        self._answer, answers = os.pipe()

        def park() -> None:
            for descriptor in (self._ask, self._answer):
                os.close(descriptor)
            while os.read(asks, 1):
                pid = os.fork()
                if pid == 0:
                    return
                os.write(answers, b"%d\n" % pid)
                os.write(answers, b"%d\n" % os.waitpid(pid, 0)[1])
            os._exit(0)

        self._pid = start(arguments, place, park)
        os.close(asks)
        os.close(answers)
        self._lines = os.fdopen(self._answer, "rb", buffering=0)

    def fork(self) -> int:
        """Lets it write; returns the number of the process that does."""
        os.write(self._ask, b"x")
        return int(self._lines.readline())

    def ended(self, seconds: float | None = None) -> int | None:
        """Returns how the last one ended, None where it still runs after so many seconds."""
        if not select.select([self._lines], [], [], seconds)[0]:
            return None
        return os.waitstatus_to_exitcode(int(self._lines.readline()))

    def close(self) -> None:
        os.close(self._ask)
        os.waitpid(self._pid, 0)
        self._lines.close()


def _main() -> int:
    from surgeon.cli import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def finish(pid: int, place: Path) -> None:
    """Waits for a run that must succeed."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise RuntimeError(f"exit code {code}: {(place / 'log.txt').read_text()[-2000:]}")
