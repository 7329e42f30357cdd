"""An iterator that works ahead in a thread of its own."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar, cast

T = TypeVar("T")

_POLL = 0.1
"""Seconds after which a thread that waits looks whether it is still wanted."""


def ahead(items: Iterable[T], depth: int = 1) -> Generator[T, None, None]:
    """Yields what `items` yields, made in another thread while the caller works on the last one.

    At any time `depth` items wait, one is with the caller and one is being made: buffers that are
    used in turn must be `depth + 2`. An exception of `items` is raised here, in its place. When
    the caller leaves, the thread ends after the item that it is making.

    Args:
        items: what is to be made.
        depth: how many may wait.
    """
    queue: Queue[tuple[str, Any]] = Queue(depth)
    left = Event()

    def put(kind: str, item: Any) -> bool:
        while not left.is_set():
            try:
                queue.put((kind, item), timeout=_POLL)
                return True
            except Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # noqa: BLE001  (raised where the item is waited for)
            put("error", error)
        finally:
            if isinstance(items, Generator):
                items.close()

    thread = Thread(target=work, name="surgeon-ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, found = queue.get(timeout=_POLL)
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise cast(BaseException, found)
            yield cast(T, found)
            del found  # so that it isn't held while the next is waited for
    finally:
        left.set()
        thread.join()
