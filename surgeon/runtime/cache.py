"""Keys and values of earlier positions, kept where the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.runtime.device_ops import ELEMENTS, Ops
from surgeon.runtime.replay import Replay
from surgeon.runtime.signature import Signature, Slot

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_NUMPY: Mapping[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16}


def allocate(shape: Sequence[int], dtype: str, device: str) -> Any:
    """Returns an `OrtValue` of zeros on the device: what is never written may still be read."""
    import onnxruntime as ort

    if dtype in _NUMPY:
        # On the CPU it takes this array as it is, whose pages cost nothing before they are written.
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _NUMPY[dtype]), device, 0)
    element = ELEMENTS[dtype]
    bits = np.zeros(shape, np.uint16)
    zeros = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, element)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), element, device, 0)
    value.update_inplace(zeros)
    return value


class Cache:
    """The state of one batch between steps. A `Decoder` makes it and is the only one to use it.

    Shared layers have one buffer [batch, kv_heads, capacity, head_dim] that is past and present
    at once; of the others the last step's present is kept and given back as it is.

    Attributes:
        batch: rows.
        capacity: columns that fit before shared buffers have to grow.
        width: columns filled, padding included.
    """

    def __init__(
        self, signature: Signature, device: str, batch: int, capacity: int, ops: Ops
    ) -> None:
        self.signature, self.device, self.batch, self.capacity = signature, device, batch, capacity
        self._ops = ops
        self.width = 0
        self._mask = np.zeros((batch, max(1, capacity)), np.int64)
        self.values: dict[str, Any] = {}
        for slot in signature.slots:
            shape = slot.shape(batch, capacity if slot.shared else 0)
            self.values[slot.past] = allocate(shape, signature.dtype, device)
        self.binding: Any = None
        """The shared buffers bound to the session's inputs and outputs."""
        self.replay: Replay | None = None

    @property
    def mask(self) -> NDArray[np.int64]:
        """1 for a token and 0 for padding, [batch, width]."""
        return self._mask[:, : self.width]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many tokens each row holds, [batch]."""
        return self.mask.sum(axis=1)

    def append(self, mask: NDArray[np.int64]) -> None:
        """Counts in new columns [batch, new], growing the buffers where they don't fit."""
        wanted = self.width + mask.shape[1]
        if wanted > self.capacity:
            self._grow(wanted)
        self._mask[:, self.width : wanted] = mask
        self.width = wanted

    def retract(self, columns: int) -> None:
        """Forgets the newest columns again, after a step that failed."""
        self.width -= columns

    def reset(self) -> None:
        """Forgets everything and keeps the buffers."""
        self.width = 0
        for slot in self.signature.slots:
            if not slot.shared:
                empty = allocate(slot.shape(self.batch, 0), self.signature.dtype, self.device)
                self.values[slot.past] = empty

    def row(self, slot: Slot, row: int) -> tuple[list[int], int]:
        """Returns the shape and the address of one row of a shared buffer."""
        shape = slot.shape(1, self.capacity)
        step = int(np.prod(shape)) * _BYTES[self.signature.dtype]
        return list(shape), self.values[slot.past].data_ptr() + row * step

    def _grow(self, wanted: int) -> None:
        capacity = max(wanted, 2 * self.capacity)
        if self.signature.positions is not None:
            capacity = max(wanted, min(capacity, self.signature.positions))
        extra = capacity - self.capacity
        for slot in self.signature.slots:
            if slot.shared:
                more = allocate(slot.shape(self.batch, extra), self.signature.dtype, self.device)
                self.values[slot.past] = self._ops.joined(self.values[slot.past], more)
        wider = np.zeros((self.batch, capacity), np.int64)
        wider[:, : self.width] = self.mask
        self._mask, self.capacity = wider, capacity
        # Both hold on to the buffers that were replaced.
        self.binding = None
        self.close()

    def close(self) -> None:
        """Frees what the device recorded for this cache, if it did."""
        if self.replay is not None:
            self.replay.close()
        self.replay = None
