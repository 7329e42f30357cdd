"""A prune that stops at every step of its writing, for tests that kill it there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, redirect_stderr, redirect_stdout
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import surgeon.saving as saving
from surgeon.cli import main
from surgeon.emit import files, safetensors_file

# Each run is forked from a server that has imported all it needs: that takes seconds, forking none.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.slow_prune", "tests.warmed"])


def run(pipe: Connection, args: tuple[str, ...]) -> None:
    """Runs the command, waiting for leave before and after each step of the writing."""
    # As in a terminal: what a shell runs in the background is started with interruptions ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def step(name: str) -> None:
        pipe.send(name)
        pipe.recv()

    def stepped(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            step(f"before {name}")
            found = function(*args, **kwargs)
            step(f"after {name}")
            return found

        return run

    # Blocks are made in a thread of their own, but written in this one.
    made = safetensors_file.ahead

    def watched(items: Iterable[Any]) -> Iterator[Any]:
        with closing(made(items)) as blocks:
            for block in blocks:
                step("before a block")
                yield block

    safetensors_file.ahead = watched
    for name in ("_sync", "_swap", "_sync_tree"):
        setattr(files, name, stepped(name, getattr(files, name)))
    for name in ("rename", "write_text"):
        setattr(Path, name, stepped(name, getattr(Path, name)))
    begin = files.output_folder

    def announced(*args: Any, **kwargs: Any) -> AbstractContextManager[Path]:
        step("begin")
        return begin(*args, **kwargs)

    saving.output_folder = announced
    sys.argv = ["surgeon", *args]
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        main()


def kill_at(number: int | None, *args: object, sig: int = signal.SIGKILL) -> list[str]:
    """Runs the command up to a step of its writing, or to its end; returns the steps taken."""
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=run, args=(there, tuple(map(str, args))))
    process.start()
    there.close()
    steps: list[str] = []
    try:
        while True:
            try:
                steps.append(here.recv())
            except EOFError:
                break
            if len(steps) - 1 == number:
                assert process.pid is not None
                os.kill(process.pid, sig)
                break
            here.send(True)
        process.join(60)
        assert steps, "it ended before it wrote"
        assert (process.exitcode == 0) == (number is None or number >= len(steps))
        return steps
    finally:
        process.kill()
        here.close()
