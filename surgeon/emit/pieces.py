"""A parameter as a checkpoint stores it, made in blocks of rows: no tensor is held as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch

from surgeon.axes.plan import Selection
from surgeon.capture.blocks import Reader, extent, spans, stream
from surgeon.emit.scales import Scale
from surgeon.runtime.apply import removed


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
    size: int,
) -> Iterator[torch.Tensor]:
    """Yields a parameter's rows: sliced, folded, then rounded once.

    What is only sliced keeps its bits. Rows that go are not read where a run of them is long, and
    columns that go are not copied.

    Args:
        selection: the plan's arithmetic.
        scales: what is folded into this parameter.
        read: reads the parameter in full size, rewrites applied.
        name: the parameter.
        dtype: the element type that it is stored in.
        full: its shape before anything was removed.
        size: bytes of a block.
    """
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
    for _, start, block in stream(read, [(name, wanted)], size):
        part = block
        if first is not None:
            stop = start + len(block)
            a, b = torch.searchsorted(first, torch.tensor([start, stop])).tolist()
            part = part.index_select(0, first[a:b] - start)
        for dim, columns in enumerate(kept[1:], start=1):
            if columns is not None:
                part = part.index_select(dim, columns)
        # The block's memory is used again, and who writes may be some pieces behind.
        yield _stored(part.clone() if part is block else part, scales, dtype)


def _stored(tensor: torch.Tensor, scales: Sequence[Scale], dtype: torch.dtype) -> torch.Tensor:
    if scales and tensor.is_floating_point():
        tensor = tensor.float()
    for scale in scales:
        tensor = scale.apply(tensor)
    return tensor.to(dtype).contiguous()
