"""A language model's program as one ONNX graph with a key/value cache."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from surgeon.emit.ort.activations import activations
from surgeon.emit.ort.build import CONTRIB, FLOATS, OPSET, Builder
from surgeon.emit.ort.cache import BATCH, IDS, LOGITS, MASK, NEW, Slot, Steps
from surgeon.emit.ort.experts import lower_mixture, mixtures
from surgeon.emit.ort.graph import Get, Graph, without_constants
from surgeon.emit.ort.grouped import GROUPED, grouped
from surgeon.emit.ort.match import kind
from surgeon.emit.ort.norms import rms_norms, skip_norms
from surgeon.emit.ort.rotary import POSITIONS, of_positions, rotaries
from surgeon.emit.ort.shape import renamed
from surgeon.emit.ort.table import lowered
from surgeon.emit.ort.tidy import tidy
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Op, Program, Ref
from surgeon.ir.program import op_refs

STYLES = ("ort", "standard")
INPUTS = (IDS, MASK, POSITIONS)


@dataclass(frozen=True)
class Decoder:
    """A lowered model.

    Attributes:
        model: the graph, its weights not read yet.
        slots: the cache of every attention, in order.
        style: `ort` or `standard`.
        dtype: `fp32`, `fp16` or `bf16`.
        positions: the longest sequence that the graph has positions for.
        padding: `right`, or `any` where padding may lie anywhere.
    """

    model: ir.Model
    slots: tuple[Slot, ...]
    style: str
    dtype: str
    positions: int
    padding: str

    @property
    def metadata(self) -> dict[str, str]:
        """What a runtime has to know besides the graph, as text entries of the model."""
        shared = ",".join(str(s.number) for s in self.slots if s.shared)
        return {
            "surgeon.style": self.style,
            "surgeon.dtype": self.dtype,
            "surgeon.positions": str(self.positions),
            "surgeon.padding": self.padding,
            "surgeon.cache": ",".join(str(s.number) for s in self.slots),
            "surgeon.shared_cache": shared,
        }


def rewritten(program: Program, get: Get, *, style: str, positions: int) -> Graph:
    """Returns the program with the shapes of decoders as one operation each.

    Args:
        program: a language model's, after surgery.
        get: its weights.
        style: `ort` or `standard`.
        positions: how many positions the tables of rotary embeddings hold.
    """
    graph = tidy(without_constants(Graph(program)))
    graph = activations(rms_norms(graph))
    graph = tidy(rotaries(graph, get, positions))
    return skip_norms(grouped(graph)) if style == "ort" else graph


def lower_decoder(program: Program, get: Get, *, style: str, dtype: str, positions: int) -> Decoder:
    """Returns a language model as an ONNX graph with a key/value cache.

    Args:
        program: with the inputs `input_ids`, `attention_mask` and `position_ids`.
        get: its weights by parameter name; they are read when the graph is written.
        style: `ort`, with ONNX Runtime's own operations, or `standard`, of ONNX's alone.
        dtype: `fp32`, `fp16` or `bf16`, of weights, activations, cache and logits.
        positions: the longest sequence.

    Raises:
        SurgeonError: `target-refused`, with the operation that can't be lowered and its place.
    """
    if tuple(i.name for i in program.inputs) != INPUTS or len(program.outputs) != 1:
        raise _refused("the whole program", "its inputs are not those of a language model")
    graph = rewritten(program, get, style=style, positions=positions)
    program = graph.program
    b = Builder(program, graph.reader(get), FLOATS[dtype], style == "ort", of_positions(program))
    steps = Steps(b)
    batch, new = program.inputs[0].type.shape
    b.facts.update(steps=steps, sizes={str(batch): BATCH, str(new): NEW})
    b.env[IDS] = steps.ids
    masks = _masks(program)
    first = _first_rows(program, str(new)) if _has_grouped(program) else None
    mixed, within = mixtures(program)
    for index, op in enumerate(program.ops):
        b.op = op
        if masks.issuperset(op.outputs):
            continue
        _stepwise(b, op, str(new))
        if index in within:
            if index in mixed:
                b.env[op.outputs[0]] = lower_mixture(b, mixed[index])
                _typed(b, op, 0, b.env[op.outputs[0]])
            continue
        if any(isinstance(r, Ref) and r.name == POSITIONS for r in op_refs(op)):
            b.env[POSITIONS] = steps.positions()
        for i, value in enumerate(lowered(b, op)):
            if op.outputs[i] == first:
                value = b.node("Add", [value, steps.refusal()])
            _typed(b, op, i, value)
            b.env[op.outputs[i]] = value
    b.op = None
    logits = b.env[program.outputs[0]]
    if logits.producer() is None or program.consumers.get(program.outputs[0]):
        logits = b.node("Identity", [logits])
    logits.name = LOGITS
    logits.shape = ir.Shape((BATCH, NEW, *program.types[program.outputs[0]].shape[2:]))
    found = ir.Graph(
        b.inputs,
        [logits, *steps.presents],
        nodes=b.nodes,
        initializers=list(b.initializers.values()),
        opset_imports={"": OPSET, CONTRIB: 1} if style == "ort" else {"": OPSET},
        name="decoder",
    )
    decoder = Decoder(
        ir.Model(found, ir_version=10, producer_name="surgeon"),
        tuple(steps.slots),
        style,
        dtype,
        positions,
        "right" if first else "any",
    )
    decoder.model.metadata_props.update(decoder.metadata)
    return decoder


def _typed(b: Builder, op: Op, index: int, value: ir.Value) -> None:
    if value.shape is None and value.producer() is not None:
        shape = op.types[index].shape
        value.shape = ir.Shape([renamed(b, size) for size in shape])


def _has_grouped(program: Program) -> bool:
    return any(op.target == GROUPED for op in program.ops)


def _first_rows(program: Program, new: str) -> str:
    """Returns the first value that every attention sees: what is looked up with the token ids."""
    for op in program.ops:
        if kind(op) == "embedding" and any(r == Ref(IDS) for r in op_refs(op)):
            return op.outputs[0]
    raise _refused("the whole program", "no table is looked up with the token ids")


def _masks(program: Program) -> frozenset[str]:
    """Returns what is made of the attention mask on its way to the attentions.

    Raises:
        SurgeonError: `target-refused` where something else reads it: with a cache it is longer.
    """
    found = {MASK}
    for op in program.ops:
        used = [r for r in op_refs(op) if isinstance(r, Ref) and r.name in found]
        if not used:
            continue
        attends = op.target in ("surgeon.attention", GROUPED)
        if attends and op.arg(3) in used and len(used) == 1:
            continue
        if op.target != "aten.to.dtype" and kind(op) not in ("view", "reshape", "clone"):
            raise _refused(
                f"{op.target} in {op.where}",
                "it reads the attention mask, which with a cache covers earlier tokens too",
            )
        found.update(op.outputs)
    return frozenset(found)


_ROWS = frozenset(["view", "reshape", "surgeon.attention", GROUPED])


def _stepwise(b: Builder, op: Op, new: str) -> None:
    """Refuses what mixes tokens by other means than attention: a step sees the new ones only."""
    for type_ in op.types:
        dynamic = [s for s in type_.shape if isinstance(s, str) and new in _words(s)]
        plain = all(s == new or s.count("*") == 1 for s in dynamic)
        if len(dynamic) > 1 or not plain:
            raise b.refused("its result has tokens along other than one dimension")
        reads = [r for r in op_refs(op) if isinstance(r, Ref)]
        if dynamic and not reads:
            raise b.refused("it counts new tokens, whose places it doesn't know")
    for ref in op_refs(op):
        if not isinstance(ref, Ref) or ref.name not in b.program.types or kind(op) in _ROWS:
            continue
        shape = b.program.types[ref.name].shape
        along = [d for d, s in enumerate(shape) if isinstance(s, str) and new in _words(s)]
        gone = along and not any(
            isinstance(s, str) and new in _words(s) for t in op.types for s in t.shape
        )
        dim = op.arg(1)
        mixes = False
        if kind(op) in ("softmax", "_softmax") and isinstance(dim, int):
            mixes = dim % len(shape) in along
        if gone or mixes:
            raise b.refused("it mixes tokens, of which a step sees the new ones only")


def _words(size: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in size).split())


def _refused(where: str, why: str) -> SurgeonError:
    return SurgeonError(
        Code.TARGET_REFUSED,
        "the model can't be lowered to ONNX with a cache",
        at=where,
        why=why,
        try_="--style generic, which goes through torch's own exporter and has no cache",
    )
