"""Several processes, each with its share of the windows, that come to the same statistics."""

from __future__ import annotations

import atexit
import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch

from surgeon.errors import Code, SurgeonError

LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `torchrun` and `accelerate launch` set in the environment of each process."""

_PATIENCE = timedelta(hours=2)
"""A rank waits so long for another: shares of a large model's windows take unequal times."""


@dataclass(frozen=True)
class World:
    """The processes that share the windows; one alone unless a launcher started several.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: where this process computes, such as `cuda:1`.
        meeting: where sums are when they are added up: `cpu` with gloo, a GPU with nccl.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    meeting: str = "cpu"

    def share(self, windows: torch.Tensor) -> torch.Tensor:
        """Returns every `size`-th window, from the `rank`-th on; it may be none."""
        return windows[self.rank :: self.size]

    def add(self, *sums: torch.Tensor) -> None:
        """Adds up each of these over all processes, in place. All must call it in one order."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for total in sums:
            moved = total.to(self.meeting).contiguous()
            dist.all_reduce(moved)
            total.copy_(moved)

    def each(self, values: Mapping[int, float], count: int) -> list[float]:
        """Returns a number for each window, of which every process knows those of its share.

        They are in the order of windows, so that a sum of them is one process's, bit for bit.
        """
        every = torch.zeros(count, dtype=torch.float64)
        for window, value in values.items():
            every[window] = value
        self.add(every)
        return every.tolist()

    def agree(self, fault: SurgeonError | None) -> None:
        """Returns if no process has met with a fault; otherwise all of them raise the same one.

        Who raises by itself leaves the others waiting for its numbers.

        Raises:
            SurgeonError: that of the lowest process that has one.
        """
        if self.size == 1:
            if fault is not None:
                raise fault
            return
        text = b"" if fault is None else json.dumps(_parts(fault)).encode()
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(text)
        self.add(lengths)
        if not lengths.any():
            return
        rows = torch.zeros((self.size, int(lengths.max())), dtype=torch.int64)
        rows[self.rank, : len(text)] = torch.tensor(list(text), dtype=torch.int64)
        self.add(rows)
        lowest = int(lengths.nonzero()[0])
        told = bytes(rows[lowest, : int(lengths[lowest])].tolist())
        raise _refusal(json.loads(told)) from fault

    def count(self, number: int) -> int:
        """Returns the sum of a whole number over all processes."""
        total = torch.tensor([number], dtype=torch.int64)
        self.add(total)
        return int(total)


_WRITTEN: Counter[str] = Counter()


def by_first(what: str, write: Callable[[], str]) -> str:
    """Returns what `write` returns, run by the first process alone, on every one that calls this.

    The first process doesn't wait for the others, which wait until it is through; so it may be
    called by the first one only, too.

    Args:
        what: what is written, such as its path: the same words on all processes.
        write: writes, and returns a text that tells of it.

    Raises:
        SurgeonError: what `write` raised, on all processes; `runtime-failed` on the others where
            it was something else.
    """
    if not launched():
        return write()
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    place = os.environ
    if place.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        join()  # then the first process has the store, not the launcher
    first = rank() == 0
    _WRITTEN[what] += 1
    # What all of a group do together, all wait for; a message in the store waits for its reader.
    key = f"surgeon/{_WRITTEN[what]}/{what}"
    store = TCPStore(
        place["MASTER_ADDR"], int(place["MASTER_PORT"]), is_master=False, timeout=_PATIENCE
    )
    if not first:
        return _told(store.get(key).decode())
    try:
        text = write()
    except SurgeonError as error:
        store.set(key, json.dumps({"refused": _parts(error)}))
        raise
    except BaseException as error:
        store.set(key, json.dumps({"failed": f"{type(error).__name__}: {error}"}))
        raise
    store.set(key, json.dumps({"text": text}))
    return text


def _told(message: str) -> str:
    """Returns what the first process came to."""
    found = json.loads(message)
    if "refused" in found:
        raise _refusal(found["refused"])
    if "failed" in found:
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            "the first process could not write the result",
            at="process 0",
            why=found["failed"],
            try_="see what that process says",
        )
    return str(found["text"])


def _parts(error: SurgeonError) -> list[str]:
    return [error.code.value, error.what, error.at, error.why, error.try_]


def _refusal(parts: Sequence[str]) -> SurgeonError:
    code, what, at, why, try_ = parts
    return SurgeonError(Code(code), what, at=at, why=why, try_=try_)


def launched(env: Mapping[str, str] = os.environ) -> bool:
    """Tells whether this process is one of several that a launcher started."""
    return all(name in env for name in LAUNCHED) and int(env["WORLD_SIZE"]) > 1


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Returns the number of this process; 0 is the one that writes what all came to."""
    return int(env["RANK"]) if all(name in env for name in LAUNCHED) else 0


def join(device: str = "cpu", env: Mapping[str, str] = os.environ) -> World:
    """Returns the processes that a launcher started, joined; or this one alone.

    Args:
        device: `cpu`, or `cuda` for the GPU of this process's local rank.
        env: the environment that the launcher set.
    """
    if not launched(env):
        return World(device=device)
    import torch.distributed as dist

    if device == "cuda":
        device = f"cuda:{env.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=_PATIENCE)
        atexit.register(_leave)
    meeting = f"cuda:{env.get('LOCAL_RANK', '0')}" if dist.get_backend() == "nccl" else "cpu"
    return World(dist.get_rank(), dist.get_world_size(), device, meeting)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
