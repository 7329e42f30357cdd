"""Small operations on values that stay where they are, on the CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.runtime.graph_file import OpenGraph

ELEMENTS = {"fp32": 1, "fp16": 10, "bf16": 16}
"""The element types as ONNX numbers them: NumPy has no bf16 of its own."""


class Ops:
    """Small operations on values that stay on the device, as graphs of one or two nodes.

    ONNX Runtime has no slicing or joining of device values outside a graph, and torch may be
    built without CUDA.
    """

    def __init__(self, graph: OpenGraph) -> None:
        self._providers = list(graph.providers)
        self._device = graph.device

    def joined(self, first: Any, second: Any) -> Any:
        """Returns both values after one another along positions, the third dimension."""
        return self._run(self._join[first.element_type()], {"a": first, "b": second})

    def rows(self, logits: Any, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        """Returns from logits [batch, sequence, vocab] one column of each row, in fp32."""
        import onnxruntime as ort

        index = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(columns[:, None]))
        out = self._run(self._pick[logits.element_type()], {"a": logits, "b": index})
        return out.numpy()

    def host(self, value: Any) -> NDArray[Any]:
        """Returns a value as an array, bf16 as fp32."""
        if value.element_type() == ELEMENTS["bf16"]:
            value = self._run(self._widen[value.element_type()], {"a": value})
        return value.numpy()

    @cached_property
    def _join(self) -> Mapping[int, Any]:
        return _Sessions(self, ("a", "b"), lambda h: [h("Concat", ["a", "b"], ["c"], axis=2)])

    @cached_property
    def _pick(self) -> Mapping[int, Any]:
        def nodes(h: Callable[..., Any]) -> list[Any]:
            picked = h("GatherND", ["a", "b"], ["p"], batch_dims=1)
            return [picked, h("Cast", ["p"], ["c"], to=ELEMENTS["fp32"])]

        return _Sessions(self, ("a", "b:int64"), nodes, ELEMENTS["fp32"])

    @cached_property
    def _widen(self) -> Mapping[int, Any]:
        to = ELEMENTS["fp32"]
        return _Sessions(self, ("a",), lambda h: [h("Cast", ["a"], ["c"], to=to)], to)

    def session(self, model: Any) -> Any:
        """Returns a session for a small graph, on the providers of the large one."""
        import onnxruntime as ort

        settings: Any = ort.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = 1
        return ort.InferenceSession(
            model.SerializeToString(), settings, providers=list(self._providers)
        )

    def _run(self, session: Any, inputs: Mapping[str, Any]) -> Any:
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("c", self._device)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]


class _Sessions(dict[int, Any]):
    """Sessions of one small graph by the element type that it takes, made when first used."""

    def __init__(
        self,
        ops: Ops,
        inputs: Sequence[str],
        nodes: Callable[[Callable[..., Any]], list[Any]],
        output: int | None = None,
    ) -> None:
        super().__init__()
        self._ops, self._inputs, self._nodes, self._output = ops, inputs, nodes, output

    def __missing__(self, element: int) -> Any:
        from onnx import TensorProto, helper

        given: list[Any] = []
        for entry in self._inputs:
            name, _, kind = entry.partition(":")
            wanted = TensorProto.INT64 if kind else element
            given.append(helper.make_tensor_value_info(name, wanted, None))
        made = helper.make_tensor_value_info("c", self._output or element, None)
        graph = helper.make_graph(self._nodes(helper.make_node), "op", given, [made])
        opset = [helper.make_opsetid("", 18)]
        self[element] = self._ops.session(
            helper.make_model(graph, opset_imports=opset, ir_version=10)
        )
        return self[element]
