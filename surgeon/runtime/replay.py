"""A decoding step in fixed shapes at fixed addresses, so that CUDA can record and replay it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgeon.runtime.device_ops import ELEMENTS
from surgeon.runtime.graph_file import OpenGraph, failed, ort_errors
from surgeon.runtime.signature import Signature

if TYPE_CHECKING:
    from surgeon.runtime.cache import Cache

_NUMBERS = itertools.count(1)
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


class Replay:
    """One token for every row of a cache, all shapes and addresses the same at every call.

    The mask is as wide as the cache, with each row's tokens first: GroupQueryAttention takes a
    row's length from the mask's sum, and only the upper bound of all lengths from its width.
    """

    def __init__(self, graph: OpenGraph, signature: Signature, cache: Cache) -> None:
        import onnxruntime as ort

        self._graph, self._capacity = graph, cache.capacity
        self._number = next(_NUMBERS)
        self._options: Any = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", str(self._number))
        self._binding = graph.session.io_binding()
        shapes = {"input_ids": 1, "attention_mask": cache.capacity, "position_ids": 1}
        self._inputs: dict[str, tuple[Any, type[np.generic]]] = {}
        for name, columns in shapes.items():
            if name not in signature.types:
                continue
            kind = _INTEGERS[signature.types[name]]
            zeros = np.zeros((cache.batch, columns), kind)
            value = ort.OrtValue.ortvalue_from_numpy(zeros, graph.device, 0)
            self._binding.bind_ortvalue_input(name, value)
            self._inputs[name] = (value, kind)
        for slot in signature.slots:
            value = cache.values[slot.past]
            self._binding.bind_ortvalue_input(slot.past, value)
            self._binding.bind_ortvalue_output(slot.present, value)
        element = ELEMENTS[signature.logits_dtype]
        shape = (cache.batch, 1, signature.vocab or 0)
        self._logits: Any = ort.OrtValue.ortvalue_from_shape_and_type(
            shape, element, graph.device, 0
        )
        self._binding.bind_ortvalue_output("logits", self._logits)

    def __call__(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> Any:
        """Reads one token a row; returns logits [batch, 1, vocab], which the next call overwrites.

        Args:
            ids: [batch, 1].
            lengths: tokens of each row, the new one included.
        """
        mask = np.arange(self._capacity)[None] < lengths[:, None]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": lengths[:, None] - 1}
        for name, (value, kind) in self._inputs.items():
            value.update_inplace(np.ascontiguousarray(given[name], dtype=kind))
        try:
            self._graph.session.run_with_iobinding(self._binding, self._options)
        except ort_errors() as error:
            raise failed(self._graph, ids.shape, error) from error
        return self._logits

    def close(self) -> None:
        """Frees what the device recorded for this step."""
        # Older versions keep it until the session ends.
        if hasattr(self._graph.session, "release_captured_graph"):
            self._graph.session.release_captured_graph(self._number)
