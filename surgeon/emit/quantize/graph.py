"""Products and lookups of an ONNX graph, replaced by ones that read quantised weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.convenience import replace_nodes_and_values

from surgeon.emit.quantize.rounding import round_blocks, round_columns, sizes
from surgeon.emit.quantize.scheme import Grid, Scheme
from surgeon.errors import Code, SurgeonError

CONTRIB = "com.microsoft"
IDS = "input_ids"
INTEGER = 4
"""The accuracy level of MatMulNBits that rounds activations to 8 bits, block by block, on a CPU.

Measured there: three times as fast with 4 bits and sixty times with 8, for half a per cent of
perplexity.
"""

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Stored:
    """A matrix of the graph, and what it takes on disk, in bytes."""

    name: str
    before: int
    after: int
    bits: int


@dataclass(frozen=True)
class Quantised:
    """What became of a graph.

    Attributes:
        scheme: how it was quantised.
        matrices: those in fewer bits.
        embedding: the table that token ids look up, None where there is none.
        head: what makes the logits, the same as `embedding` where one table serves both.
        rest: bytes of the floating weights that stay as they were.
        views: values whose contents are another's in another shape, to be added by `add_views`.
    """

    scheme: Scheme
    matrices: tuple[Stored, ...]
    embedding: Stored | None
    head: Stored | None
    rest: int
    views: tuple[tuple[ir.Value, ir.Value], ...]

    @property
    def shared(self) -> bool:
        """Whether one table serves as embedding and head."""
        return self.embedding is not None and self.embedding == self.head


def quantise(model: ir.Model, scheme: Scheme) -> Quantised:
    """Replaces what multiplies by a stored matrix, and what looks token ids up in one.

    Weights are read and rounded when the graph is written, one matrix at a time.

    Args:
        model: a decoder's graph, as `lower_decoder` makes it; it is changed.
        scheme: how to store the weights.

    Raises:
        SurgeonError: `target-refused` where the graph has no matrix to quantise.
    """
    found = _Rewrite(model.graph, scheme).run()
    if not found.matrices:
        raise SurgeonError(
            Code.TARGET_REFUSED,
            "there is nothing to quantise",
            at="the whole graph",
            why="no operation multiplies by a stored matrix or looks tokens up in one",
            try_="leave --quantize out",
        )
    model.metadata_props["surgeon.quantize"] = scheme.name
    model.graph.opset_imports.setdefault(CONTRIB, 1)
    return found


def add_views(graph: ir.Graph, found: Quantised) -> None:
    """Adds the views to a graph whose other tensors have been written: they read the same bytes."""
    for view, whole in found.views:
        data, shape = whole.const_value, view.shape
        assert data is not None and shape is not None
        if isinstance(data, ir.ExternalTensor):
            view.const_value = ir.ExternalTensor(
                data.location,
                data.offset,
                data.length,
                data.dtype,
                shape=ir.Shape(shape),
                name=str(view.name),
                base_dir=data.base_dir,
            )
        else:
            view.const_value = ir.Tensor(data.numpy().reshape(shape.numpy()), name=view.name)
        graph.register_initializer(view)


# --- weights, rounded when they are written ------------------------------------------------------


class _Parts:
    """Tensors that are computed together; each is kept until it has been read."""

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self.make = make
        self.kept: dict[str, Any] = {}

    def take(self, part: str) -> Any:
        if part not in self.kept:
            self.kept = dict(self.make())
        return self.kept.pop(part)


def _lazy(
    parts: _Parts, part: str, name: str, shape: Sequence[int], dtype: ir.DataType
) -> ir.Value:
    """Returns a value whose contents are a part, read when they are written."""

    def read() -> ir.TensorProtocol:
        return ir.Tensor(parts.take(part).astype(dtype.numpy()), name=name)

    lazy = ir.LazyTensor(read, dtype=dtype, shape=ir.Shape(shape), name=name)
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape), const_value=lazy)


def _matrix(value: ir.Value) -> tuple[int, int]:
    assert value.shape is not None
    rows, width = value.shape.numpy()
    return rows, width


def _bytes(*values: ir.Value) -> int:
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


# --- the graph -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Product:
    """x · W, with W stored as [K, N], or as [N, K] where `rows`."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    rows: bool


class _Rewrite:
    def __init__(self, graph: ir.Graph, scheme: Scheme) -> None:
        self.graph, self.scheme = graph, scheme
        self.stored: dict[str, Stored] = {}
        self.made: dict[str, tuple[ir.Value, ...]] = {}
        self.quantised: dict[str, tuple[ir.Value, ...]] = {}
        self.views: list[tuple[ir.Value, ir.Value]] = []
        self.shapes: dict[str, ir.Value] = {}

    def run(self) -> Quantised:
        lookups = [node for node in self.graph if self._is_lookup(node)]
        products = [p for node in self.graph if (p := self._product(node)) is not None]
        head = _head(self.graph, {p.node: str(p.weight.name) for p in products})
        tables = [str(node.inputs[0].name) for node in lookups if node.inputs[0] is not None]
        for product in products:
            table = product.rows or product.weight.name in tables
            if self.scheme.name == "int8" and not table:
                self._dynamic(product)
            else:
                self._blocked(product, self.scheme.table_grid if table else self.scheme.grid)
        for node in lookups:
            self._lookup(node)
        self._sweep()
        new = {str(v.name) for values in self.made.values() for v in values}
        old = [v for name, v in self.graph.initializers.items() if name not in new]
        return Quantised(
            self.scheme,
            tuple(self.stored.values()),
            self.stored.get(tables[0]) if tables else None,
            self.stored.get(head),
            _bytes(*(v for v in old if v.dtype in _FLOATS)),
            tuple(self.views),
        )

    # --- what there is -------------------------------------------------------------------------

    def _is_matrix(self, value: ir.Value | None) -> bool:
        return (
            value is not None
            and value.name in self.graph.initializers
            and value.dtype in _FLOATS
            and value.shape is not None
            and len(value.shape) == 2
        )

    def _is_lookup(self, node: ir.Node) -> bool:
        """Whether a node looks rows up by token ids. Tables of positions are small and stay."""
        if node.op_type != "Gather" or node.domain or node.attributes.get_int("axis", 0) != 0:
            return False
        ids = node.inputs[1]
        return self._is_matrix(node.inputs[0]) and ids is not None and ids.name == IDS

    def _product(self, node: ir.Node) -> _Product | None:
        if node.op_type not in ("MatMul", "FusedMatMul"):
            return None
        x, weight = node.inputs
        if x is None or weight is None:
            return None
        rows = False
        if node.op_type == "FusedMatMul":
            given = node.attributes
            rows = given.get_int("transB", 0) == 1
            others = (given.get_int(n, 0) for n in ("transA", "transBatchA", "transBatchB"))
            if any(others) or given.get_float("alpha", 1.0) != 1:
                return None
        else:
            turned = weight.producer()
            if turned is not None and turned.op_type == "Transpose":
                weight, rows = turned.inputs[0], True
        if weight is None or not self._is_matrix(weight) or self._is_matrix(x):
            return None
        return _Product(node, x, weight, rows)

    # --- what it becomes -----------------------------------------------------------------------

    def _blocks(self, weight: ir.Value, rows: bool, grid: Grid) -> tuple[ir.Value, ...]:
        """Returns codes, scales and zero points of a matrix, the same for the same matrix."""
        name, dtype, data = str(weight.name), weight.dtype, weight.const_value
        if name not in self.made:
            assert data is not None and dtype is not None
            height, width = _matrix(weight) if rows else _matrix(weight)[::-1]

            def make() -> Mapping[str, Any]:
                array = data.numpy()
                return vars(round_blocks(array if rows else array.T, grid))

            parts = _Parts(make)
            types = {"codes": ir.DataType.UINT8, "scales": dtype, "zeros": ir.DataType.UINT8}
            self._store(
                weight,
                grid.bits,
                [
                    _lazy(parts, part, f"{name}.{part}", shape, types[part])
                    for part, shape in sizes(height, width, grid).items()
                ],
            )
        return self.made[name]

    def _store(self, weight: ir.Value, bits: int, values: Sequence[ir.Value]) -> None:
        name = str(weight.name)
        self.made[name] = tuple(values)
        self.stored[name] = Stored(name, _bytes(weight), _bytes(*values), bits)
        for value in values:
            self.graph.register_initializer(value)

    def _blocked(self, product: _Product, grid: Grid) -> None:
        blocks = self._blocks(product.weight, product.rows, grid)
        shape = _matrix(product.weight)
        count, width = shape if product.rows else shape[::-1]
        node = ir.node(
            "MatMulNBits",
            [product.x, *blocks],
            {
                "K": width,
                "N": count,
                "bits": grid.bits,
                "block_size": grid.block_size,
                "accuracy_level": INTEGER,
            },
            domain=CONTRIB,
            name=f"{product.node.name}.nbits",
        )
        self._replace(product.node, [node])

    def _lookup(self, node: ir.Node) -> None:
        table, ids = node.inputs
        assert table is not None and ids is not None
        grid = self.scheme.table_grid
        whole, scales, zeros = self._blocks(table, True, grid)
        assert whole.shape is not None
        rows, count, size = whole.shape.numpy()
        # The product reads its codes with three dimensions, the lookup with two: one set of bytes.
        view = ir.Value(
            name=f"{whole.name}.rows",
            type=ir.TensorType(ir.DataType.UINT8),
            shape=ir.Shape((rows, count * size)),
        )
        self.views.append((view, whole))
        found = ir.node(
            "GatherBlockQuantized",
            [view, ids, scales, zeros],
            {
                "bits": grid.bits,
                "block_size": grid.block_size,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
            domain=CONTRIB,
            name=f"{node.name}.nbits",
        )
        width = _matrix(table)[1]
        nodes = [found]
        if count * grid.block_size != width:
            # The last block is filled up: what it was filled with is cut off.
            bounds = [self._ints(n) for n in (0, width, -1)]
            nodes.append(ir.node("Slice", [found.outputs[0], *bounds], name=f"{node.name}.width"))
        self._replace(node, nodes)

    def _dynamic(self, product: _Product) -> None:
        """Replaces a product by one in 8-bit integers.

        Reference: what `onnxruntime.quantization.quantize_dynamic` makes of a MatMul.
        """
        weight, data = product.weight, product.weight.const_value
        name = str(weight.name)
        if name not in self.made:
            assert data is not None
            width, count = _matrix(weight)

            def make() -> Mapping[str, Any]:
                names = ("codes", "scales", "zeros")
                return dict(zip(names, round_columns(data.numpy()), strict=True))

            parts, byte = _Parts(make), ir.DataType.UINT8
            self._store(
                weight,
                8,
                [
                    _lazy(parts, "codes", f"{name}.codes", (width, count), byte),
                    _lazy(parts, "scales", f"{name}.scales", (count,), ir.DataType.FLOAT),
                    _lazy(parts, "zeros", f"{name}.zeros", (count,), byte),
                ],
            )
        codes, scales, zeros = self.made[name]
        label, nodes = str(product.node.name), list[ir.Node]()
        if product.x.name not in self.quantised:
            rounded = ir.node(
                "DynamicQuantizeLinear", [product.x], num_outputs=3, name=f"{label}.rounded"
            )
            self.quantised[str(product.x.name)] = tuple(rounded.outputs)
            nodes.append(rounded)
        x, scale, zero = self.quantised[str(product.x.name)]
        both = ir.node("Mul", [scale, scales], name=f"{label}.scale")
        whole = ir.node("MatMulInteger", [x, codes, zero, zeros], name=f"{label}.integer")
        real = ir.node("Cast", [whole.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{label}.float")
        out = ir.node("Mul", [real.outputs[0], both.outputs[0]], name=f"{label}.scaled")
        self._replace(product.node, [*nodes, both, whole, real, out])

    # --- edits ---------------------------------------------------------------------------------

    def _ints(self, number: int) -> ir.Value:
        name = f"quantise.{number}"
        if name not in self.shapes:
            data = ir.Tensor(np.array([number], dtype=np.int64), name=name)
            value = ir.Value(name=name, type=ir.TensorType(data.dtype), shape=ir.Shape((1,)))
            value.const_value = data
            self.graph.register_initializer(value)
            self.shapes[name] = value
        return self.shapes[name]

    def _replace(self, old: ir.Node, new: Sequence[ir.Node]) -> None:
        """Puts nodes in the place of one; the last of them gives what it gave."""
        for node in new:
            for i, value in enumerate(node.outputs):
                value.name = value.name or f"{node.name}:{i}"
        replace_nodes_and_values(self.graph, old, [old], new, old.outputs, new[-1].outputs)

    def _sweep(self) -> None:
        """Removes what nothing reads any more: transposed tables, and the matrices themselves."""
        for node in list(self.graph):
            if node.op_type == "Transpose" and not any(v.uses() for v in node.outputs):
                self.graph.remove(node, safe=True)
        for name in self.made:
            if not self.graph.initializers[name].uses():
                del self.graph.initializers[name]


def _head(graph: ir.Graph, products: Mapping[ir.Node, str]) -> str:
    """Returns the matrix of the product that the logits come from, "" where there is none."""
    seen, waiting = set[ir.Node](), [graph.outputs[0].producer()]
    while waiting:
        node = waiting.pop(0)
        if node is None or node in seen:
            continue
        if node in products:
            return products[node]
        seen.add(node)
        waiting += [value.producer() for value in node.inputs if value is not None]
    return ""
