"""What a decoder's graph takes and gives, read from the graph and from what lies beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.graph_file import DTYPES, OpenGraph, read_json

Padding = Literal["right", "any"]

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_INTEGERS = ("tensor(int64)", "tensor(int32)")


@dataclass(frozen=True)
class Slot:
    """One of the tensors that a decoder keeps between steps: keys or values of one layer."""

    past: str
    """The input's name."""
    present: str
    """The output's name."""
    heads: int
    width: int
    shared: bool
    """Whether past and present may be one buffer, [batch, heads, capacity, width]."""

    def shape(self, batch: int, length: int) -> tuple[int, int, int, int]:
        """Returns the shape for that many positions."""
        return batch, self.heads, length, self.width


@dataclass(frozen=True)
class Signature:
    """What a decoder's graph takes and gives."""

    slots: tuple[Slot, ...]
    dtype: str
    """Of the cache: fp32, fp16 or bf16."""
    logits_dtype: str
    padding: Padding
    """Where padding may be: `right` only, or anywhere."""
    positions: int | None
    """The longest sequence that the model has positions for."""
    vocab: int | None
    types: Mapping[str, str]
    """Element types of the inputs, by name."""
    style: str | None
    """`ort` or `standard`, where the graph is Surgeon's."""
    quantised: str | None = None
    """`int8`, `int4` or `w8`, where it is quantised."""

    @property
    def shared(self) -> bool:
        """Whether every layer's past and present may be one buffer."""
        return all(slot.shared for slot in self.slots)

    @property
    def no_cuda(self) -> str | None:
        """Why this graph should not run on CUDA, or None if it may."""
        if self.quantised == "int8":
            return (
                "its dynamic 8-bit products have no kernel for CUDA, so they would run on the CPU"
            )
        if self.dtype != "fp32" or not any(slot.shared for slot in self.slots):
            return None
        return (
            "it is in fp32, in which GroupQueryAttention has no kernel for CUDA: attention would "
            "run on the CPU"
        )


def is_cached(graph: OpenGraph) -> bool:
    """Whether the graph has inputs for keys and values of earlier positions."""
    return any(_PAST.fullmatch(name) for name in graph.types)


def read_signature(graph: OpenGraph) -> Signature:
    """Returns what the graph takes and gives.

    Raises:
        SurgeonError: `not-a-model` where its inputs or outputs are not those of a decoder.
    """
    said = graph.metadata
    beside = read_json(graph.path.parent / "genai_config.json")
    inputs = {i.name: i for i in graph.session.get_inputs()}
    outputs = {o.name: o for o in graph.session.get_outputs()}
    _check_names(graph, inputs, outputs)
    shares = _sharing(said, beside)
    slots: list[Slot] = []
    for name, given in inputs.items():
        found = _PAST.fullmatch(name)
        if found is None:
            continue
        layer, kind = int(found[1]), found[2]
        heads, width = _sizes(graph, name, given.shape, beside)
        shared = shares is True or (shares is not False and layer in shares)
        slots.append(Slot(name, f"present.{layer}.{kind}", heads, width, shared))
    dtypes = {inputs[slot.past].type for slot in slots} | {outputs[s.present].type for s in slots}
    if len(dtypes) != 1 or not dtypes <= set(DTYPES) or outputs["logits"].type not in DTYPES:
        kinds = ", ".join(sorted(dtypes | {outputs["logits"].type}))
        raise _no_decoder(graph, f"keys, values and logits are {kinds}")
    vocab = outputs["logits"].shape[-1]
    return Signature(
        slots=tuple(slots),
        dtype=DTYPES[dtypes.pop()],
        logits_dtype=DTYPES[outputs["logits"].type],
        padding="any" if said.get("surgeon.padding") == "any" else "right",
        positions=_positions(said, beside),
        vocab=vocab if isinstance(vocab, int) else None,
        types=graph.types,
        style=said.get("surgeon.style"),
        quantised=said.get("surgeon.quantize"),
    )


def stop_tokens(folder: Path, tokenizer: Any = None) -> tuple[int, ...]:
    """Returns the tokens that end a text, as the files beside a model say, else its tokenizer."""
    genai: Any = read_json(folder / "genai_config.json").get("model", {})
    for found in (
        read_json(folder / "generation_config.json").get("eos_token_id"),
        genai.get("eos_token_id") if isinstance(genai, dict) else None,
        getattr(tokenizer, "eos_token_id", None),
    ):
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found:
            return tuple(int(token) for token in found)
    return ()


def _check_names(graph: OpenGraph, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    known = ("input_ids", "attention_mask", "position_ids")
    for name, given in inputs.items():
        if _PAST.fullmatch(name):
            present = name.replace("past_key_values", "present")
            if present not in outputs:
                raise _no_decoder(graph, f"it has an input '{name}' and no output '{present}'")
        elif name not in known or given.type not in _INTEGERS:
            raise _no_decoder(graph, f"unknown: {name}: {given.type}")
    lacking = [name for name in known[:2] if name not in inputs]
    if lacking or "logits" not in outputs:
        raise _no_decoder(graph, f"it has no {(*lacking, 'logits')[0]}")


def _no_decoder(graph: OpenGraph, why: str) -> SurgeonError:
    return SurgeonError(
        Code.NOT_A_MODEL,
        f"'{graph.path.name}' has not the inputs and outputs of a decoder with a cache",
        at=str(graph.path),
        why=why,
        try_="export with 'surgeon export --to onnx', whose inputs are input_ids, attention_mask "
        "and past_key_values.N.key and .value",
        data={"inputs": dict(graph.types)},
    )


def _sharing(said: Mapping[str, str], beside: Mapping[str, Any]) -> frozenset[int] | bool:
    """Returns the layers whose past and present may be one buffer, or True for all of them."""
    if "surgeon.shared_cache" in said:
        return frozenset(int(n) for n in said["surgeon.shared_cache"].split(",") if n.strip())
    # onnxruntime-genai's own graphs say it for all layers at once.
    search = beside.get("search")
    return isinstance(search, dict) and search.get("past_present_share_buffer") is True


def _positions(said: Mapping[str, str], beside: Mapping[str, Any]) -> int | None:
    if "surgeon.style" in said:
        return int(said["surgeon.positions"]) if "surgeon.positions" in said else None
    model = beside.get("model")
    found = model.get("context_length") if isinstance(model, dict) else None
    return found if isinstance(found, int) else None


def _sizes(
    graph: OpenGraph, name: str, shape: list[Any], beside: Mapping[str, Any]
) -> tuple[int, int]:
    if len(shape) != 4:
        raise _no_decoder(graph, f"{name} has {len(shape)} dimensions, not 4")
    heads, width = shape[1], shape[3]
    if not isinstance(width, int):
        # onnxruntime-genai's builder leaves it open in the graph and writes it beside.
        model = beside.get("model")
        decoder = model.get("decoder") if isinstance(model, dict) else None
        width = decoder.get("head_size") if isinstance(decoder, dict) else None
    if not isinstance(heads, int) or not isinstance(width, int):
        raise _no_decoder(graph, f"the shape of {name} says no number of heads, or no head size")
    return heads, width
