"""Rows of tensors, read block by block into buffers that are used again, ahead of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from surgeon.ahead import ahead

if TYPE_CHECKING:
    from surgeon.capture.weights import Weights

Span = tuple[int, int]
"""Rows from the first up to the second."""

GAP = 2**18
"""Bytes of rows that nobody wants which are read all the same: a seek costs more."""

Reader = Callable[[str, Sequence[Span], "Buffers"], Iterator[tuple[int, torch.Tensor]]]
"""Yields rows of a tensor, span by span, with the first row's number."""


class Buffers:
    """Memory that is handed out in turn: what is read into it is good for `count - 1` more reads.

    Memory that is new to a process costs more than filling it: the system clears every page first.

    Args:
        count: of buffers.
        size: bytes of each, unless a single row takes more.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._held: list[torch.Tensor | None] = [None] * count
        self._next = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """Returns so many bytes to write to, `uint8`."""
        place, self._next = self._next, (self._next + 1) % len(self._held)
        held = self._held[place]
        if held is None or held.numel() < nbytes:
            self._held[place] = None
            held = self._held[place] = torch.empty(max(nbytes, self.size), dtype=torch.uint8)
        return held[:nbytes]


def spans(
    rows: int, row_bytes: int, size: int, kept: NDArray[np.int64] | None = None
) -> list[Span]:
    """Returns the rows to read, in blocks of at most `size` bytes, or of one row.

    Args:
        rows: of the tensor.
        row_bytes: of each.
        size: of a block.
        kept: the rows that are wanted, ascending; all of them without it. A run of others is left
            out where that saves more than `GAP` bytes.
    """
    most = max(1, size // max(1, row_bytes))
    if kept is None:
        runs = [(0, rows)] if rows else []
    else:
        apart = max(1, GAP // max(1, row_bytes))
        ends = np.flatnonzero(np.diff(kept) > apart)
        first = kept[np.concatenate(([0], ends + 1))] if len(kept) else kept
        last = kept[np.concatenate((ends, [len(kept) - 1]))] if len(kept) else kept
        runs = [(int(a), int(b) + 1) for a, b in zip(first, last, strict=True)]
    return [(at, min(at + most, b)) for a, b in runs for at in range(a, b, most)]


def rows_of(
    tensors: Mapping[str, torch.Tensor], name: str, wanted: Sequence[Span], buffers: Buffers
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields rows of a tensor, read from a file where it lies in one, else views of it."""
    blocks = getattr(tensors, "blocks", None)
    if blocks is not None:
        yield from blocks(name, wanted, buffers)
        return
    tensor = tensors[name]
    for start, stop in wanted:
        yield start, tensor[start:stop]


def extent(shape: Sequence[int], itemsize: int) -> tuple[int, int]:
    """Returns how many rows a tensor has, and the bytes of one; a number is one row."""
    return (shape[0] if shape else 1), itemsize * math.prod(shape[1:])


def take(tensor: torch.Tensor, dim: int, indices: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    """Returns a tensor's rows or columns of these indices, bit by bit, in one of the buffers."""
    shape = (*tensor.shape[:dim], len(indices), *tensor.shape[dim + 1 :])
    held = buffers.take(math.prod(shape) * tensor.element_size())
    out = held.view(tensor.dtype).view(shape)
    tensor, words = tensor.detach(), _WORDS.get(tensor.element_size())
    if words is None or not tensor.is_contiguous():
        return torch.index_select(tensor, dim, indices, out=out)
    # Torch takes columns of 16-bit numbers three times as slowly. `clip` because another mode would
    # have NumPy make the result elsewhere first; no index is out of bounds.
    np.take(tensor.view(words).numpy(), indices.numpy(), dim, out.view(words).numpy(), mode="clip")
    return out


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def in_order(tensors: Any, names: Iterable[str]) -> list[str]:
    """Returns names in the order in which their tensors lie in the files, where they do."""
    place: Callable[[str], Any] | None = getattr(tensors, "place", None)
    return list(names) if place is None else sorted(names, key=place)


def stream(
    read: Reader,
    wanted: Iterable[tuple[str, Sequence[Span]]],
    size: int,
    buffers: Buffers | None = None,
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yields blocks of rows of several tensors, each good until the next is asked for.

    While the caller works on one, the next is read.

    Args:
        read: reads rows.
        wanted: of which tensors, which rows.
        size: bytes of a block.
        buffers: what is read into; with more than three, a block is good for as many calls longer.
    """
    buffers = buffers or Buffers(3, size)

    def items() -> Iterator[tuple[str, int, torch.Tensor]]:
        for name, rows in wanted:
            for start, values in read(name, rows, buffers):
                yield name, start, values

    return ahead(items())


def whole(
    weights: Weights, name: str, wanted: Sequence[Span]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields rows of a tensor that can only be read as a whole."""
    tensor = weights[name]
    for start, stop in wanted:
        yield start, (tensor[start:stop] if tensor.ndim else tensor)
