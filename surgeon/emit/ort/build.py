"""An ONNX graph under construction: values, constants, weights read when they are written."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters

from surgeon.emit.ort.graph import Get
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Arg, Op, ParamRef, Program, Ref, Size
from surgeon.runtime.lower import TORCH_DTYPES

CONTRIB = "com.microsoft"
OPSET = 23
"""The first with attention, rotary embedding and RMSNorm as operations."""

FLOATS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
"""Element types of a graph, by the name of the option."""

_ONNX = {
    "f64": ir.DataType.DOUBLE,
    "f32": ir.DataType.FLOAT,
    "f16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
    "i64": ir.DataType.INT64,
    "i32": ir.DataType.INT32,
    "i16": ir.DataType.INT16,
    "i8": ir.DataType.INT8,
    "u8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}
_FLOATING = frozenset(["f64", "f32", "f16", "bf16"])

Change = Callable[[torch.Tensor], torch.Tensor]


class Builder:
    """What lowering rules build with.

    Attributes:
        program: the program that is lowered.
        float: the element type of activations and weights: `f32`, `f16` or `bf16`.
        contrib: whether ONNX Runtime's own operations may be used.
    """

    def __init__(
        self, program: Program, get: Get, dtype: str, contrib: bool, exact: frozenset[str]
    ) -> None:
        self.program, self.get = program, get
        self.float, self.contrib = dtype, contrib
        self.exact = exact
        """Values that stay in fp32 whatever the graph's type: functions of positions."""
        self.env: dict[str, ir.Value] = {}
        self.dtypes: dict[str, str] = {}
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self.facts: dict[str, Any] = {}
        """What several operations share, such as the cache and its lengths."""
        self.op: Op | None = None
        self._casts: dict[tuple[str, str], ir.Value] = {}
        self._constants: dict[tuple[object, ...], ir.Value] = {}
        self._counts: dict[str, int] = {}

    # --- names and types -------------------------------------------------------------------------

    def name(self, base: str) -> str:
        """Returns a name that no value or node has had yet."""
        number = self._counts.get(base, 0)
        self._counts[base] = number + 1
        return f"{base}_{number}" if number else base

    def dtype(self, value: ir.Value) -> str:
        """Returns the element type of a value, by its short name."""
        assert value.name is not None
        return self.dtypes[value.name]

    def wanted(self, op: Op, index: int = 0) -> str:
        """Returns the element type that a result of an operation has in this graph."""
        kept = op.outputs[index] in self.exact
        dtype = op.types[index].dtype
        return self.float if dtype in _FLOATING and not kept else dtype

    def value(self, name: str, dtype: str, shape: Sequence[Size | None] | None) -> ir.Value:
        """Returns a new value, typed."""
        made = ir.Value(
            name=name,
            type=ir.TensorType(_ONNX[dtype]),
            shape=None if shape is None else ir.Shape(shape),
        )
        self.dtypes[name] = dtype
        return made

    def input(self, name: str, dtype: str, shape: Sequence[Size]) -> ir.Value:
        """Returns a new input of the graph."""
        made = self.value(name, dtype, shape)
        self.inputs.append(made)
        return made

    @contextmanager
    def inside(self, program: Program) -> Generator[list[ir.Node]]:
        """Lowers another program into an inner graph, which sees the values of the outer one.

        Yields the list that nodes go to. What is made there is not known outside.
        """
        outer = (self.program, self.nodes, self.env, self._casts)
        self.program, self.nodes = program, []
        self.env, self._casts = dict(self.env), dict(self._casts)
        try:
            yield self.nodes
        finally:
            self.program, self.nodes, self.env, self._casts = outer

    # --- nodes -----------------------------------------------------------------------------------

    def node(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        dtype: str | Sequence[str] | None = None,
        names: Sequence[str] = (),
    ) -> Any:
        """Adds a node and returns its output, or its outputs where `dtype` names several.

        Args:
            kind: the operation.
            inputs: values, None where an optional one is left out.
            attributes: of the node.
            domain: of the operation.
            dtype: element types of the outputs, of the first input without it; "" leaves one out.
            names: of the outputs.
        """
        first = next(v for v in inputs if v is not None)
        several = dtype is not None and not isinstance(dtype, str)
        types: list[str]
        if dtype is None or isinstance(dtype, str):
            types = [dtype or self.dtype(first)]
        else:
            types = list(dtype)
        place = self.op.module if self.op and self.op.module else "graph"
        label = self.name(f"{place}.{kind}")
        outputs: list[ir.Value] = []
        for i, type_ in enumerate(types):
            given = names[i] if i < len(names) else ""
            name = (given or self.name(f"{label}:{i}")) if type_ else ""
            outputs.append(self.value(name, type_ or "f32", None))
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        self.nodes.append(
            ir.node(kind, trimmed, dict(attributes or {}), domain=domain, outputs=outputs,
                    name=label)
        )  # fmt: skip
        return tuple(outputs) if several else outputs[0]

    def cast(self, value: ir.Value, dtype: str) -> ir.Value:
        """Returns the value in this element type."""
        if self.dtype(value) == dtype:
            return value
        key = (str(value.name), dtype)
        if key not in self._casts:
            self._casts[key] = self.node("Cast", [value], {"to": _ONNX[dtype]}, dtype=dtype)
        return self._casts[key]

    # --- constants and weights -------------------------------------------------------------------

    def const(self, data: Any, dtype: str) -> ir.Value:
        """Returns a small constant, the same value for the same contents."""
        tensor = torch.as_tensor(data, dtype=TORCH_DTYPES[dtype])
        key = (dtype, tuple(tensor.shape), str(tensor.tolist()))
        if key not in self._constants:
            name = self.name("constant")
            value = self.value(name, dtype, tuple(tensor.shape))
            value.const_value = tensor_adapters.TorchTensor(tensor, name=name)
            self.initializers[name] = value
            self._constants[key] = value
        return self._constants[key]

    def ints(self, *numbers: int) -> ir.Value:
        """Returns integers as a one-dimensional constant."""
        return self.const(list(numbers), "i64")

    def weight(
        self, name: str, *, change: str = "", make: Change | None = None, dtype: str | None = None
    ) -> ir.Value:
        """Returns a parameter, changed by `make` when it is written; `change` names the change."""
        type_ = self.program.param[name].type
        kept = dtype or (self.float if type_.dtype in _FLOATING else type_.dtype)
        # Most tensors have the graph's own type; a second copy in another says so in its name.
        usual = self.float if type_.dtype in _FLOATING else type_.dtype
        label = f"{name}{change}" + ("" if kept == usual else f".{kept}")
        if label not in self.initializers:
            shape = tuple(s for s in type_.shape if isinstance(s, int))
            if make is not None:
                shape = tuple(make(torch.empty(shape, device="meta")).shape)
            get = self.get

            def read() -> ir.TensorProtocol:
                tensor = get(name)
                tensor = tensor if make is None else make(tensor)
                return tensor_adapters.TorchTensor(
                    tensor.to(TORCH_DTYPES[kept]).contiguous(), name=label
                )

            value = self.value(label, kept, shape)
            value.const_value = ir.LazyTensor(
                read, dtype=_ONNX[kept], shape=ir.Shape(shape), name=label
            )
            self.initializers[label] = value
        return self.initializers[label]

    def arg(self, arg: Arg, dtype: str | None = None) -> ir.Value:
        """Returns an operand of an operation: a value, a parameter, or a number as a constant."""
        if isinstance(arg, Ref):
            found = self.env[arg.name]
            return found if dtype is None else self.cast(found, dtype)
        if isinstance(arg, ParamRef):
            own = self.program.param[arg.name].type.dtype
            return self.weight(arg.name, dtype=dtype if own in _FLOATING else own)
        if isinstance(arg, bool | int | float) and dtype is not None:
            return self.const(arg, dtype)
        raise self.refused(f"{arg!r} is no tensor")

    # --- messages --------------------------------------------------------------------------------

    def refused(self, why: str) -> SurgeonError:
        """Returns the refusal of the operation that is being lowered."""
        op = self.op
        return SurgeonError(
            Code.TARGET_REFUSED,
            f"{op.target} can't be lowered to ONNX here" if op else "the program can't be lowered",
            at=op.where if op else "the whole program",
            why=why,
            try_="--style generic, which goes through torch's own exporter and has no cache",
            data={"operation": op.target if op else ""},
        )
