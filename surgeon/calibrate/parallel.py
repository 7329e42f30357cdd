"""Several processes, each with its share of the windows, that come to the same statistics."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch

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

    def count(self, number: int) -> int:
        """Returns the sum of a whole number over all processes."""
        total = torch.tensor([number], dtype=torch.int64)
        self.add(total)
        return int(total)


def rank(env: Mapping[str, str] = os.environ) -> int:
    """Returns the number of this process; 0 is the one that writes what all came to."""
    return int(env["RANK"]) if all(name in env for name in LAUNCHED) else 0


def join(device: str = "cpu", env: Mapping[str, str] = os.environ) -> World:
    """Returns the processes that a launcher started, joined; or this one alone.

    Args:
        device: `cpu`, or `cuda` for the GPU of this process's local rank.
        env: the environment that the launcher set.
    """
    alone = not all(name in env for name in LAUNCHED) or int(env["WORLD_SIZE"]) == 1
    if alone:
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
