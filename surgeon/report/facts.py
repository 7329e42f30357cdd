"""What a model is, before it is run: parameters, zeros, bytes, multiply-adds, cache.

A figure that can't be had is None, with the reason under its name in `unknown`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes
from surgeon.axes.budget import count, decoder_params
from surgeon.axes.costs import Costs
from surgeon.ir.program import ParamRef, op_refs
from surgeon.runtime.decoder import Decoder

if TYPE_CHECKING:
    import torch

_TABLES = {"GroupQueryAttention": (7, 8), "RotaryEmbedding": (1, 2, 3)}
"""Operations of ONNX graphs, and which of their inputs are tables of cosines and sines."""

_PRODUCTS = ("MatMul", "Gemm", "FusedMatMul")
_QUANTISED = ("MatMulNBits", "MatMulInteger", "DynamicQuantizeMatMul", "GatherBlockQuantized")


@dataclass(frozen=True)
class Facts:
    """A model's figures.

    Attributes:
        kind: `checkpoint`, `gguf`, `config`, `onnx` or `pt2`; `model` for an object in memory.
        architecture: the Transformers class, or the style of a graph.
        parameters: elements of its weights; a tied one counts once.
        decoder_parameters: those inside its layers.
        sparsity: the share of exact zeros in the weights of linear maps.
        disk_bytes: of the files that hold its weights.
        memory_bytes: of its weights as they are run here.
        flops: of matrix products for one token, two for each multiply-add.
        flops_context: the same for each token that it attends to.
        cache_bytes: keys and values of one token, in the element type that the model is stored in.
        unknown: by the name of a figure, why there is none.
    """

    kind: str
    architecture: str
    parameters: int | None = None
    decoder_parameters: int | None = None
    sparsity: float | None = None
    disk_bytes: int | None = None
    memory_bytes: int | None = None
    flops: int | None = None
    flops_context: int | None = None
    cache_bytes: int | None = None
    unknown: Mapping[str, str] = field(default_factory=dict[str, str])

    def without(self, why: str, *names: str) -> Facts:
        """Returns the same with a reason for figures that can't be had."""
        return replace(self, unknown={**self.unknown, **dict.fromkeys(names, why)})


def of_program(
    kind: str,
    architecture: str,
    axes: Axes,
    costs: Costs,
    read: Callable[[str], torch.Tensor] | None,
) -> Facts:
    """Returns the figures of a captured model, less its bytes.

    Args:
        kind: what it was read from.
        architecture: its class.
        axes: of its program.
        costs: of the same.
        read: gives a weight by name; without it nothing is known of zeros.
    """
    whole = costs.whole
    layered = any(branch.layer for branch in axes.branches)
    found = Facts(
        kind,
        architecture,
        parameters=whole.parameters,
        decoder_parameters=count(axes.program, _trained(axes)) if layered else None,
        sparsity=None if read is None else zeros(read(name) for name in linear_maps(axes)),
        flops=whole.flops,
        flops_context=whole.flops_context,
        cache_bytes=whole.cache_bytes,
    )
    if not layered:
        found = found.without("the program doesn't say what its layers are", "decoder_parameters")
    return found


def _trained(axes: Axes) -> Iterator[str]:
    return (n for n in decoder_params(axes) if axes.program.param[n].kind == "parameter")


def linear_maps(axes: Axes) -> tuple[str, ...]:
    """Returns the parameters that an operation contracts with what flows through the model."""
    program = axes.program
    out: dict[str, None] = {}
    for use in axes.facts.uses:
        if use.kind == "contract":
            names = (r.name for r in op_refs(program.ops[use.op]) if isinstance(r, ParamRef))
            # A bias takes part in the same operation and isn't contracted.
            out |= dict.fromkeys(n for n in names if len(program.param[n].type.shape) > 1)
    return tuple(out)


def zeros(tensors: Iterable[torch.Tensor]) -> float | None:
    """Returns the share of exact zeros in all tensors together, None where there is none."""
    total = empty = 0
    for tensor in tensors:
        total += tensor.numel()
        empty += tensor.numel() - int(tensor.count_nonzero())
    return empty / total if total else None


def module_bytes(module: Any) -> int:
    """Returns the bytes of a torch module's parameters and buffers, shared storage once."""
    seen: dict[int, int] = {}
    for tensors in (module.parameters(), module.buffers()):
        for tensor in tensors:
            for plain in _plain(tensor):
                storage = plain.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


def _plain(tensor: Any) -> Iterator[Any]:
    """Yields the tensors that one is made of: torchao's have no storage of their own."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain(getattr(tensor, name))


def size_of(files: Iterable[Path]) -> int:
    """Returns the bytes of some files together."""
    return sum(file.stat().st_size for file in files)


# --- ONNX ----------------------------------------------------------------------------------------


def of_graph(path: Path, session: Any) -> Facts:
    """Returns the figures of an ONNX graph, its weights looked at one at a time.

    Args:
        path: the ONNX file.
        session: the same graph, open: a `Decoder` knows its cache.
    """
    import onnx_ir as ir

    graph = ir.load(path).graph
    tables, maps, packed = _roles(graph)
    weights = {
        name: value.const_value
        for name, value in graph.initializers.items()
        if value.const_value is not None and value.const_value.size > 1
    }
    floating = [n for n, t in weights.items() if t.dtype.is_floating_point() and n not in tables]
    found = Facts(
        "onnx",
        _style(session),
        parameters=sum(weights[n].size for n in floating),
        sparsity=zeros(_tensor(weights[n]) for n in maps if n in weights),
        disk_bytes=size_of({path, *_beside(path, graph)}),
        memory_bytes=sum(t.nbytes for t in weights.values()),
        cache_bytes=_cache_bytes(session),
    )
    if packed:
        found = replace(found, parameters=None, sparsity=None).without(
            f"the graph's weights are quantised ({packed})", "parameters", "sparsity"
        )
    if found.cache_bytes is None:
        found = found.without("the graph keeps no cache", "cache_bytes")
    return found.without(
        "an ONNX graph isn't captured; compare the checkpoint that it was made from",
        "decoder_parameters",
        "flops",
        "flops_context",
    )


def _roles(graph: Any) -> tuple[set[str], list[str], str]:
    """Returns the names of tables, those of linear maps, and what is quantised."""
    tables: set[str] = set()
    maps: dict[str, None] = {}
    packed = ""
    for node in graph:
        names = [value.name if value is not None else "" for value in node.inputs]
        tables.update(names[i] for i in _TABLES.get(node.op_type, ()) if i < len(names))
        if node.op_type in _PRODUCTS:
            weight = node.inputs[1]
            made = weight.producer()
            # A table that rows are looked up in too is stored as it is and turned over here.
            origin = made.inputs[0] if made and made.op_type == "Transpose" else weight
            maps[origin.name] = None
        elif node.op_type in _QUANTISED:
            packed = node.op_type
    return tables, list(maps), packed


def _tensor(tensor: Any) -> torch.Tensor:
    """Returns a weight as torch has it: a type that NumPy lacks is read as numbers of its width."""
    import numpy as np
    import torch

    values = tensor.numpy()
    if values.dtype.name not in ("float16", "float32", "float64"):
        values = values.astype(np.float32)
    return torch.from_numpy(np.array(values))  # a copy: what is mapped from a file is read-only


def _beside(path: Path, graph: Any) -> set[Path]:
    values = (v.const_value for v in graph.initializers.values())
    places = (getattr(value, "path", None) for value in values)
    return {path.parent / place for place in places if place is not None}


def _style(session: Any) -> str:
    if isinstance(session, Decoder):
        return f"ONNX graph ({session.signature.style or 'cached'}, {session.signature.dtype})"
    return "ONNX graph without a cache"


def _cache_bytes(session: Any) -> int | None:
    if not isinstance(session, Decoder):
        return None
    width = 4 if session.signature.dtype == "fp32" else 2
    return sum(width * prod(slot.shape(1, 1)) for slot in session.signature.slots)
