"""Calls in processes of their own, with a limit of time."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any


def _child(call: Callable[[str], Any], name: str, end: Connection) -> None:
    try:
        end.send((True, call(name)))
    except Exception as error:  # noqa: BLE001 (the parent says what went wrong)
        where = traceback.extract_tb(error.__traceback__)[-1]
        end.send((False, f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"))
    finally:
        end.close()


def each(
    call: Callable[[str], Any], names: Sequence[str], *, jobs: int = 1, seconds: float = 300
) -> Iterator[tuple[str, bool, Any]]:
    """Yields, for every name, whether the call came back, and its result or what went wrong.

    What a call does to its process (a crash, a signal, memory) is its own matter.
    """
    context = multiprocessing.get_context("fork")
    waiting, running = list(names), dict[Any, tuple[str, Any, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            mine, other = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(call, name, other))
            process.start()
            other.close()
            running[mine] = (name, process, time.monotonic())
        ready = wait(list(running), timeout=1)
        for end, (name, process, start) in list(running.items()):
            if end in ready:
                try:
                    found: tuple[bool, Any] = end.recv()
                except EOFError:
                    process.join()
                    found = (False, f"the process ended with {process.exitcode}")
            elif time.monotonic() - start > seconds:
                found = (False, f"it took more than {seconds:.0f} s")
                process.kill()
            else:
                continue
            process.join()
            end.close()
            del running[end]
            yield (name, *found)
