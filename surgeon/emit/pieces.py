"""A parameter as a checkpoint stores it, made in blocks of rows: no tensor is held as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch

from surgeon.axes.plan import Selection
from surgeon.capture.blocks import Buffers, Reader, extent, spans, stream, take
from surgeon.emit.scales import Scale
from surgeon.runtime.apply import removed

BEHIND = 3
"""Pieces that whoever writes may be behind: one is written, one waits, one is being made."""


class Room:
    """The memory that all tensors of a checkpoint pass through, one after the other.

    Args:
        size: bytes of a block.
    """

    def __init__(self, size: int) -> None:
        # A block may be handed on as it was read, while the next waits and one is being read.
        self.read = Buffers(BEHIND + 3, size)
        self.made = Buffers(BEHIND + 1, size)
        self.halfway = Buffers(1, size)


def full_shape(selection: Selection, name: str) -> tuple[int, ...]:
    """Returns a parameter's shape before anything was removed; of one of two, its own."""
    half = selection.halves.get(name)
    if half is not None:
        expr = selection.axes.param_dims(half.param)[half.dim]
        return half.sized(selection.full_width(expr))
    return tuple(selection.full_width(e) for e in selection.axes.param_dims(name))


def pieces(
    selection: Selection,
    scales: Sequence[Scale],
    read: Reader,
    name: str,
    dtype: torch.dtype,
    full: tuple[int, ...],
    room: Room,
) -> Iterator[torch.Tensor]:
    """Yields a parameter's rows: sliced, folded, then rounded once.

    Each is good until `BEHIND` more have been asked for.

    What is only sliced keeps its bits. Rows that go are not read where a run of them is long, and
    columns that go are not copied.

    Args:
        selection: the plan's arithmetic.
        scales: what is folded into this parameter.
        read: reads the parameter in full size, rewrites applied.
        name: the parameter.
        dtype: the element type that it is stored in.
        full: its shape before anything was removed.
        room: where blocks are read and made.
    """
    size = room.read.size
    cuts = selection.cuts_into(name)
    rows, row_bytes = extent(full, max(dtype.itemsize, 4 if scales else 0))
    if cuts and not selection.separable(name):
        # What is kept of a row depends on the row: such tensors are experts', read one by one.
        wanted = [(0, rows)]
        for _, _, tensor in stream(read, [(name, wanted)], prod(full) * dtype.itemsize):
            yield _stored(removed(selection, name, tensor), scales, dtype)
        return
    kept = (
        [None if k is None else torch.from_numpy(k) for k in selection.kept(name)] if cuts else []
    )
    first = kept[0] if kept else None
    wanted = spans(rows, row_bytes, size, None if first is None else first.numpy())
    for _, start, block in stream(read, [(name, wanted)], size, room.read):
        part, columns = block, [(d, k) for d, k in enumerate(kept) if d and k is not None]
        if first is not None:
            stop = start + len(block)
            a, b = torch.searchsorted(first, torch.tensor([start, stop])).tolist()
            if a == b:
                # Read because a seek costs more. Who writes passes over pieces without rows, so
                # one would take a turn of the memory that a piece still to be written lies in.
                continue
            part = take(part, 0, first[a:b] - start, room.halfway if columns else room.made)
        for number, (dim, indices) in enumerate(columns, start=1):
            last = number == len(columns)
            part = take(part, dim, indices, room.made if last else Buffers(1, size))
        yield _stored(part, scales, dtype)


def _stored(tensor: torch.Tensor, scales: Sequence[Scale], dtype: torch.dtype) -> torch.Tensor:
    if scales and tensor.is_floating_point():
        tensor = tensor.float()
    for scale in scales:
        tensor = scale.apply(tensor)
    return tensor.to(dtype).contiguous()
