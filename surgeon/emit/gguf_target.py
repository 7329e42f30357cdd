"""The GGUF target: one file that llama.cpp runs.

Layers that are alike are written for its architecture `llama` (Qwen's for `qwen2` or `qwen3`),
others for `deci`, which has numbers of heads and widths of MLPs by layer.

Reference: llama.cpp as of October 2026, src/models/{llama,deci,qwen2,qwen3}.cpp for what each
architecture computes, src/llama-model.cpp (`load_hparams`) for metadata, conversion/llama.py for
the order of the rows of queries and keys. deci goes on to the next layer where `n_ff` is 0 and
forgets what attention added; the width of heads is read only where the first layer has some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan
from surgeon.emit.decoder import (
    ELSEWHERE,
    Decoder,
    Material,
    heads_stay,
    refusals,
    starts_with_attention,
)
from surgeon.emit.gguf_tokens import Field, fields_of
from surgeon.emit.mismatch import differs
from surgeon.emit.scales import Refused
from surgeon.emit.target import Refusal, Target, refusal

FILE = "model.gguf"
TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
"""Element types that may be asked for, by gguf's names."""

BLOCK = 32
"""Neighbours in a row that Q8_0, as most of llama.cpp's packed types, shares a scale among."""

_OWN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPE = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
_TURNED = (".self_attn.q_proj.", ".self_attn.k_proj.")
_STATIC = ("default", "linear", "llama3")
"""Rotary types whose frequencies don't change as a text grows, and whose heads aren't scaled."""


@dataclass(frozen=True)
class Form:
    """How a decoder is spelled in a GGUF file.

    Attributes:
        decoder: what it is of.
        source: where the tokenizer comes from.
        kind: asked for, of `TYPES`; empty for the source's own.
    """

    decoder: Decoder
    source: Any
    kind: str = ""

    @cached_property
    def architecture(self) -> str:
        """llama.cpp's name for what computes this."""
        found, biases = self.decoder, self.decoder.biases
        if not found.uniform:
            return "deci"
        if biases.qk_norm:
            return "qwen3"
        plain = not biases.output and not biases.mlp and self.factors is None
        square = found.layers[0].heads * found.head == found.hidden
        return "qwen2" if found.family == "qwen2" and plain and square else "llama"

    @cached_property
    def ratios(self) -> torch.Tensor:
        """By what the frequencies of θ are divided, for each rotary pair."""
        n = len(self.decoder.frequencies)
        theta = float(self.decoder.rope.get("rope_theta", 10000.0))
        natural = theta ** (-torch.arange(n, dtype=torch.float64) / max(n, 1))
        return natural / self.decoder.frequencies

    @cached_property
    def scaling(self) -> float:
        """By what all frequencies are divided; 1 where that differs by pair."""
        first = float(self.ratios[0]) if len(self.ratios) else 1.0
        same = bool(((self.ratios / first - 1).abs() < 1e-5).all())
        return first if same and abs(first - 1) > 1e-5 else 1.0

    @cached_property
    def factors(self) -> torch.Tensor | None:
        """By what each frequency is divided, where that differs by pair: fp32, [head / 2]."""
        same = bool(((self.ratios / self.scaling - 1).abs() < 1e-5).all())
        return None if same else self.ratios.float()

    @cached_property
    def names(self) -> Mapping[str, str]:
        """Names in the file by names in the source."""
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == self.architecture)
        table = get_tensor_name_map(arch, len(self.decoder.layers))
        out: dict[str, str] = {}
        for old, new in self.decoder.emission.names.items():
            found = table.get_name(new, try_suffixes=(".weight", ".bias"))
            if found is None:
                raise Refused(f"llama.cpp's {self.architecture} has no tensor for {new}")
            out[old] = found
        return out

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        """The metadata, the tokenizer's left out."""
        d, a = self.decoder, self.architecture
        layers = d.layers
        per_layer = a == "deci"

        def number(key: str, values: list[int]) -> Field:
            if per_layer:
                return Field(f"{a}.{key}", values, "array of int32")
            return Field(f"{a}.{key}", values[0], "uint32")

        out = [
            Field(f"{a}.block_count", len(layers), "uint32"),
            Field(f"{a}.context_length", int(d.config.max_position_embeddings), "uint32"),
            Field(f"{a}.embedding_length", d.hidden, "uint32"),
            number("feed_forward_length", [s.ffn for s in layers]),
            number("attention.head_count", [s.heads for s in layers]),
            number("attention.head_count_kv", [s.kv_heads for s in layers]),
            Field(f"{a}.attention.key_length", d.head, "uint32"),
            Field(f"{a}.attention.value_length", d.head, "uint32"),
            Field(f"{a}.rope.dimension_count", d.head, "uint32"),
            Field(f"{a}.rope.freq_base", float(d.rope.get("rope_theta", 10000.0)), "float32"),
            Field(f"{a}.attention.layer_norm_rms_epsilon", float(d.config.rms_norm_eps), "float32"),
            Field(f"{a}.vocab_size", d.vocab, "uint32"),
        ]
        if self.scaling != 1.0:
            out.append(Field(f"{a}.rope.scaling.type", "linear", "string"))
            out.append(Field(f"{a}.rope.scaling.factor", self.scaling, "float32"))
        return tuple(out)

    def turned(self, old: str) -> int:
        """Returns into how many heads the rows of a tensor are ordered anew; 0 for most."""
        new = self.decoder.emission.names[old]
        if self.architecture not in ("llama", "deci") or not any(t in new for t in _TURNED):
            return 0
        layer = self.decoder.layers[int(new.split(".layers.")[1].split(".")[0])]
        return layer.heads if _TURNED[0] in new else layer.kv_heads

    def type_of(self, old: str, dtype: torch.dtype) -> str:
        """Returns the type in which a tensor is stored: vectors are in fp32, as it wants them."""
        shape = self.decoder.selection.shape(old)
        if len(shape) < 2:
            return "F32"
        kind = TYPES.get(self.kind) or _OWN.get(dtype, "F32")
        return "F16" if kind == "Q8_0" and shape[-1] % BLOCK else kind

    def stored(self, material: Material, old: str) -> torch.Tensor:
        """Returns a tensor in fp32, its rows in the file's order."""
        tensor = self.decoder.tensor(material.get, old)
        heads = self.turned(old)
        return interleaved(tensor, heads) if heads else tensor


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns rows with the two of a rotary pair side by side, and not half a head apart."""
    pairs = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()


def halved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns rows in the order that `interleaved` was given them in."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape).contiguous()


# --- rules ---------------------------------------------------------------------------------------


def rules(axes: Axes, plan: Plan, origin: Any) -> list[Refusal]:
    """Returns what llama.cpp can't express of a plan."""
    return refusals(TARGET.name, axes, plan, origin, lambda d: _against(d, origin.source))


def _against(decoder: Decoder, source: Any) -> list[Refusal]:
    found: list[Refusal] = []
    rope = str(decoder.rope.get("rope_type", "default"))
    if rope not in _STATIC:
        why = f"its rotary frequencies are fixed, and this model's ({rope}) are not"
        return [Refusal("rotary", why, ELSEWHERE)]
    form = Form(decoder, source)
    alone = [s.path for s in decoder.layers if s.attention and not s.mlp]
    if alone:
        found.append(
            Refusal(
                alone[0],
                "a layer without MLP is passed over whole, and so would be its attention "
                f"({len(alone)} layers)",
                "whole layers (--role layers=…), or --freeze with the MLPs",
            )
        )
    if not decoder.layers[0].attention:
        first = decoder.layers[0].path
        why = "the width of heads is that of the first layer, so it has to have attention"
        found.append(Refusal(first, why, f"--freeze '{first}'"))
    if decoder.biases.qk_norm:
        if not decoder.uniform:
            why = "layers of other widths than their neighbours can't normalise queries and keys"
            found.append(Refusal(decoder.family, why, "the same share of every layer"))
        elif decoder.biases.output or decoder.biases.mlp or form.factors is not None:
            why = (
                "with normalised queries and keys it has no further biases, nor lacks rotary pairs"
            )
            found.append(Refusal(decoder.family, why, "--freeze rotary, or " + ELSEWHERE))
    if not found and decoder.selection.plan.empty:  # asked of the model as it is, and not again
        try:
            form.names  # noqa: B018  (each tensor has to have one)
            fields_of(source, int(source.config.vocab_size))
        except Refused as refused:
            try_ = (
                "--to transformers, and llama.cpp's own convert_hf_to_gguf.py where the layers "
                "are alike"
            )
            found.append(Refusal("tokenizer", str(refused), try_))
    return found


def whole(axes: Axes, asked: Mapping[str, float]) -> Mapping[str, str]:
    """Returns what has to stay whole.

    Heads may be narrower where as many channels of values go as of queries: both have to be asked
    for. A layer without MLP can't have attention; whole layers may go.
    """
    out: dict[str, str] = {}
    both = asked.get("v") is not None and asked.get("v") == asked.get("rotary")
    if not both:
        why = "heads of queries and values have one width: --role v and --role rotary alike"
        out |= heads_stay(axes, why)
    if "layers" not in asked:
        why = "llama.cpp passes over a layer without MLP"
        out |= {b.name: why for b in axes.branches if b.kind != "attention"}
        out |= starts_with_attention(axes, "llama.cpp reads the width of heads there")
    return out


def multiples(axes: Axes) -> Mapping[str, int]:
    """Returns what rows' lengths should be multiples of, so that packed types can hold them."""
    found = (*axes.of_role("ffn"), *axes.of_role("hidden"))
    return {axis.name: BLOCK for axis in found if axis.size % BLOCK == 0}


# --- writing -------------------------------------------------------------------------------------


def write(
    folder: Path, decoder: Decoder, material: Material, *, kind: str = "", file: str = FILE
) -> dict[str, Any]:
    """Writes the file into an existing folder, one tensor at a time; returns facts.

    Args:
        folder: where to.
        decoder: one that the rules let through.
        material: where its tensors come from.
        kind: of `TYPES`; by default each matrix has the type that the source stores it in.
        file: its name.

    Raises:
        SurgeonError: `target-refused` for a tokenizer that llama.cpp has none like, and for weights
            that are too large for fp16.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    form = Form(decoder, material.source, kind)
    try:
        tokens, notes = fields_of(material.source, decoder.vocab)
    except Refused as refused:
        raise refusal(TARGET.name, [Refusal("tokenizer", str(refused), ELSEWHERE)]) from refused
    types = {old: form.type_of(old, material.dtype_of(old)) for old in form.names}
    counts: dict[str, int] = {}
    for old, stored in types.items():
        counts[stored] = counts.get(stored, 0) + prod(decoder.selection.shape(old))
    main = max(counts, key=lambda t: counts[t])
    writer = GGUFWriter(folder / file, form.architecture)
    writer.add_type("model")
    writer.add_file_type(_FILE_TYPE[main])
    if main == "Q8_0":
        writer.add_quantization_version(2)
    for field in (*form.fields, *tokens):
        _add(writer, field)
    float32 = np.dtype(np.float32)
    for old, new in form.names.items():
        shape = decoder.selection.shape(old)
        size = _bytes(types[old], prod(shape))
        writer.add_tensor_info(new, shape, float32, size, GGMLQuantizationType[types[old]])
    if form.factors is not None:
        factors = form.factors.numpy()
        writer.add_tensor_info("rope_freqs.weight", factors.shape, float32, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for old, new in form.names.items():
        writer.write_tensor_data(_packed(form.stored(material, old), types[old], new))
    if form.factors is not None:
        writer.write_tensor_data(form.factors.numpy())
    writer.close()
    left = sum(len(decoder.selection.shape(o)) > 1 and t == "F16" for o, t in types.items())
    if main == "Q8_0" and left:
        notes += (f"{left} matrices are in fp16, as {BLOCK} doesn't divide their rows",)
    return {
        "architecture": form.architecture,
        "dtype": main.lower(),
        "bytes": (folder / file).stat().st_size,
        "notes": notes,
    }


def _add(writer: Any, field: Field) -> None:
    from gguf import GGUFValueType

    *several, kind = field.kind.split("array of ")
    own = GGUFValueType[kind.upper()]
    if several:
        if field.value:  # the format knows no array of nothing
            writer.add_key_value(field.key, field.value, GGUFValueType.ARRAY, sub_type=own)
    else:
        writer.add_key_value(field.key, field.value, own)


def _bytes(kind: str, elements: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, packed = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return elements // values * packed


def _packed(tensor: torch.Tensor, kind: str, name: str) -> Any:
    """Returns the bytes of a tensor in a type."""
    if kind == "F32":
        return tensor.numpy()
    if kind == "BF16":
        return tensor.bfloat16().view(torch.int16).numpy()
    if kind == "F16":
        half = tensor.half()
        if not bool(torch.isfinite(half).all()):
            why = f"{name} has a value that fp16 doesn't"
            raise refusal(TARGET.name, [Refusal(name, why, "--dtype bf16 or fp32")])
        return half.numpy()
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(tensor.numpy(), GGMLQuantizationType[kind])


# --- reading back --------------------------------------------------------------------------------


def read(
    folder: Path, decoder: Decoder, material: Material, *, kind: str = "", file: str = FILE
) -> None:
    """Compares a written file with what it should be: metadata, and tensor by tensor.

    Rows are put back in the source's order first. Plain floats have to be the same bit by bit,
    packed ones within half a step, and what the rounding of the step itself adds.

    Raises:
        SurgeonError: `verify-failed`.
    """
    from gguf import GGUFReader

    path = folder / file
    form, reader = Form(decoder, material.source, kind), GGUFReader(path)
    tokens, _ = fields_of(material.source, decoder.vocab)
    wanted = [Field("general.architecture", form.architecture, "string"), *form.fields, *tokens]
    for field in wanted:
        found = reader.get_field(field.key)
        value: Any = None if found is None else found.contents()
        want: Any = field.value
        if "float32" in field.kind:
            want = np.float32(want).tolist()
        if value != want and not (found is None and want == []):
            raise differs(path, field.key, "the metadata says something else")
    held = {tensor.name: tensor for tensor in reader.tensors}
    for old, new in form.names.items():
        if new not in held:
            raise differs(path, new, "the file doesn't hold it")
        tensor = held.pop(new)
        _compare(path, form, material, old, tensor)
    factors = held.pop("rope_freqs.weight", None)
    if (factors is None) != (form.factors is None) or (
        factors is not None
        and form.factors is not None
        and not np.array_equal(factors.data, form.factors.numpy())
    ):
        raise differs(path, "rope_freqs.weight", "these are not the plan's frequencies")
    if held:
        raise differs(path, min(held), "the plan's result has no such tensor")


def _compare(path: Path, form: Form, material: Material, old: str, tensor: Any) -> None:
    from gguf.quants import dequantize

    kind, shape = tensor.tensor_type.name, form.decoder.selection.shape(old)
    if kind != form.type_of(old, material.dtype_of(old)):
        raise differs(path, tensor.name, f"it is stored as {kind}")
    if tuple(reversed(tensor.shape.tolist())) != shape:
        raise differs(path, tensor.name, f"it is {tensor.shape.tolist()} and not {list(shape)}")
    values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type)))
    values = values.float().reshape(shape)
    want = form.decoder.tensor(material.get, old).float()
    heads = form.turned(old)
    if heads:
        values = halved(values, heads)
    if kind in ("F16", "BF16"):
        want = want.to(torch.float16 if kind == "F16" else torch.bfloat16).float()
    if kind != "Q8_0":
        if not torch.equal(values, want):
            raise differs(path, tensor.name, "the stored tensor is not the plan's, bit for bit")
        return
    # 127 steps of a block's scale, which is rounded to fp16.
    step = want.reshape(-1, BLOCK).abs().amax(-1, keepdim=True) / 127
    apart = (values - want).reshape(-1, BLOCK).abs()
    if not bool((apart <= step * (0.5 + 127 * 2.0**-11) + 2.0**-24).all()):
        raise differs(path, tensor.name, "a weight is more than half a step from the plan's")


TARGET = Target(
    name="gguf",
    description="a GGUF file that llama.cpp runs",
    suffix=".gguf",
    write=write,
    rules=rules,
    multiple_of=multiples,
    whole=whole,
    kind="checkpoint",
    read=read,
)
