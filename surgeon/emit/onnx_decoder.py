"""An ONNX graph with a key/value cache, for ONNX Runtime and onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.emit.files import output_file
from surgeon.emit.onnx_graph import point, write_onnx
from surgeon.emit.pt2 import TOLERANCE, Reference, Weights, Written, compare, rows, tensors
from surgeon.emit.quantize.scheme import Scheme
from surgeon.emit.target import Target
from surgeon.errors import Code, SurgeonError, near

if TYPE_CHECKING:
    import torch

    from surgeon.axes.axes import Axes
    from surgeon.emit.quantize.graph import Quantised
    from surgeon.ir import Program

STYLES = ("ort", "standard", "generic")
DTYPES = ("fp32", "fp16", "bf16")

POSITIONS = 2048
"""Positions of a model whose configuration doesn't say how many it has."""

INLINE = 1024
"""Bytes up to which a tensor stays in the graph: shapes and scalars."""

HALF_TOLERANCE = 3e-2
"""The largest difference allowed of a graph in half precision, as a share of the largest logit.

Half precision has 11 significant bits; their rounding adds up over the layers.
"""

QUANTISED_TOLERANCE = 1.0
"""The same of a quantised graph, whose quality its perplexity tells: this finds broken ones."""


@dataclass(frozen=True)
class Options:
    """How a model is lowered.

    Attributes:
        style: `ort`, of ONNX Runtime's own operations; `standard`, of ONNX's alone; `generic`,
            through torch's exporter and without a cache.
        dtype: `fp32`, `fp16` or `bf16`: of weights, activations, cache and logits.
        positions: the longest sequence; the tables of rotary embeddings have as many rows.
        quantize: how the weights are stored in fewer bits, None where they are not.
    """

    style: str = "ort"
    dtype: str = "fp32"
    positions: int = POSITIONS
    quantize: Scheme | None = None

    def __post_init__(self) -> None:
        """Refuses what doesn't exist or doesn't go together."""
        for name, value, known in (("style", self.style, STYLES), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise SurgeonError(
                    Code.BAD_OPTION,
                    f"there is no {name} {value!r}",
                    at=f"--{name}",
                    why=f"the {name}s of a graph are {', '.join(known)}",
                    try_=near(value, known),
                )
        if self.style == "generic" and self.dtype != "fp32":
            raise SurgeonError(
                Code.BAD_OPTION,
                "the generic style is fp32 only",
                at=f"--style generic --dtype {self.dtype}",
                why="torch's exporter is given the program as it was captured, in fp32",
                try_="--style ort or --style standard",
            )
        if self.positions < 1:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"a graph can't have {self.positions} positions",
                at="--positions",
                why="every token has one",
                try_="the longest sequence that the model shall see, such as 2048",
            )
        if self.quantize is not None:
            self.quantize.check(self.style, self.dtype)


@dataclass(frozen=True)
class WrittenDecoder(Written):
    """What was written, and what became of its weights if they were quantised."""

    quantised: Quantised | None = None


def write_decoder(
    program: Program,
    weights: Weights,
    path: str | Path,
    *,
    options: Options | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> Written:
    """Writes a language model as one ONNX graph for prefill and decoding.

    Weights are read when they are written, one at a time, into a file beside the graph of its
    name and `.data`. Both appear when they are whole and, with `check`, have given the program's
    logits over prefill, a second chunk and single steps in ONNX Runtime on the CPU; a bf16 graph
    can't be checked there.

    Args:
        program: the program after the plan.
        weights: after the plan too, by parameter name.
        path: of the graph.
        options: how to lower it.
        metadata: further text entries of the model.
        overwrite: replace an existing file.
        check: run it and compare.

    Raises:
        SurgeonError: `target-refused` with the operation that can't be lowered, `runtime-failed`,
            `verify-failed`, or the file can't be written.
    """
    options = options or Options()
    if options.style == "generic":
        found = {"surgeon.style": "generic", "surgeon.dtype": "fp32", **(metadata or {})}
        return write_onnx(program, weights, path, metadata=found, overwrite=overwrite, check=check)
    import onnx_ir

    from surgeon.emit.ort.decoder import lower_decoder
    from surgeon.emit.quantize.graph import add_views, quantise
    from surgeon.runtime.lower import lower

    path = Path(path)
    get = tensors(program, weights)
    decoder = lower_decoder(
        program, get, style=options.style, dtype=options.dtype, positions=options.positions
    )
    model = decoder.model
    quantised = quantise(model, options.quantize) if options.quantize else None
    model.metadata_props.update(metadata or {})
    beside = path.with_name(path.name + ".data")
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    with (
        output_file(path, overwrite=overwrite, need_bytes=size) as partial,
        output_file(beside, overwrite=overwrite) as data,
    ):
        model = onnx_ir.external_data.unload_from_model(
            model, data.parent, data.name, size_threshold_bytes=INLINE
        )
        if quantised is not None:
            add_views(model.graph, quantised)
        onnx_ir.save(model, partial, format="protobuf")
        largest = None
        if check and options.dtype != "bf16":
            largest = check_decoder(partial, lower(program, get), rows(program, "input_ids"))
        point(model, beside.name)
        onnx_ir.save(model, partial, format="protobuf")
        # Between the two renames that follow, an old graph must not find new weights.
        path.unlink(missing_ok=True)
    return WrittenDecoder((path, beside), len(model.graph), largest, quantised)


# --- check ---------------------------------------------------------------------------------------


def check_decoder(path: str | Path, reference: Reference, vocab: int) -> float:
    """Returns the largest difference from the program's logits, relative to its largest.

    Two rows, one of them padded on the right, are read at once; then token by token; and one row
    in two chunks and the rest token by token.

    Args:
        path: of a graph that `write_decoder` wrote, in another style than `generic`.
        reference: from ids, mask and positions, each [B, S], to logits [B, S, vocab].
        vocab: token ids are drawn below this.

    Raises:
        SurgeonError: `runtime-failed` where ONNX Runtime can't run the graph on the CPU,
            `verify-failed` where it gives other logits.
    """
    import torch

    from surgeon.emit.pt2 import Sample

    runner = _Runner(str(path))
    draw = torch.Generator().manual_seed(0)
    length = min(12, runner.positions)
    ids = torch.randint(0, vocab, (2, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[1, -(length // 3) or length :] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = torch.ones_like(ids)
    counted = torch.arange(length).expand(2, -1)
    first, second = max(1, length // 3), max(1, length // 4)
    steps = [1] * (length - first)
    chunks = [first, second] if first + second <= length else [first]
    found = [
        runner.run(ids, mask, [length]),
        runner.run(ids, whole, [first, *steps]),
        runner.run(ids[:1], whole[:1], [*chunks, *[1] * (length - sum(chunks))]),
    ]
    given = [
        Sample("read at once, padded on the right", (ids, mask, positions), mask.bool()),
        Sample("read token by token", (ids, whole, counted), whole.bool()),
        Sample("read in chunks", (ids[:1], whole[:1], counted[:1]), whole[:1].bool()),
    ]
    tolerance = TOLERANCE if runner.dtype == "float" else HALF_TOLERANCE
    if "surgeon.quantize" in runner.facts:
        tolerance = QUANTISED_TOLERANCE
    return compare(str(path), found, reference, given, tolerance)


def is_cached(path: str | Path) -> bool:
    """Whether a graph file has a cache, by what its own metadata says."""
    import onnx

    props = onnx.load(path, load_external_data=False).metadata_props
    return any(p.key == "surgeon.style" and p.value != "generic" for p in props)


_NUMPY = {"float": "float32", "float16": "float16"}


class _Runner:
    """Runs a decoder graph with plain arrays, the cache handed from step to step."""

    def __init__(self, path: str) -> None:
        import onnx
        import onnxruntime

        self.path = path
        settings: Any = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        try:
            self.session: Any = onnxruntime.InferenceSession(
                path, settings, providers=["CPUExecutionProvider"]
            )
            self.facts: Mapping[str, str] = self.session.get_modelmeta().custom_metadata_map
            if self.facts["surgeon.style"] == "standard":
                onnx.checker.check_model(path)
        except Exception as error:
            raise self._failed("opened", error) from error
        self.positions = int(self.facts["surgeon.positions"])
        self.past = {v.name: v for v in self.session.get_inputs() if v.name.startswith("past_")}
        self.dtype = self.session.get_outputs()[0].type[len("tensor(") : -1]

    def run(self, ids: torch.Tensor, mask: torch.Tensor, pieces: list[int]) -> torch.Tensor:
        """Returns the logits [B, S, vocab] of token ids [B, S], read in pieces."""
        import numpy as np
        import torch

        cache: dict[str, Any] = {}
        for name, value in self.past.items():
            _, heads, _, width = value.shape
            cache[name] = np.zeros((len(ids), heads, 0, width), _NUMPY[self.dtype])
        names = [value.name for value in self.session.get_outputs()]
        out: list[torch.Tensor] = []
        start = 0
        for piece in pieces:
            end = start + piece
            feed = {
                "input_ids": ids[:, start:end].numpy(),
                "attention_mask": mask[:, :end].numpy(),
                **cache,
            }
            try:
                logits, *presents = self.session.run(None, feed)
            except Exception as error:
                what = f"run on {list(ids.shape)} with {start} of it read"
                raise self._failed(what, error) from error
            cache = {
                name.replace("present", "past_key_values"): value
                for name, value in zip(names[1:], presents, strict=True)
            }
            out.append(torch.from_numpy(logits).float())
            start = end
        return torch.cat(out, 1)

    def _failed(self, what: str, error: Exception) -> SurgeonError:
        return SurgeonError(
            Code.RUNTIME_FAILED,
            f"the exported graph can't be {what} in ONNX Runtime",
            at=self.path,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            try_="--style standard or --style generic, or report this with the plan",
        )


def head_multiples(axes: Axes) -> Mapping[str, int]:
    """Returns what widths of heads should be multiples of, for GroupQueryAttention to take them.

    It takes heads of a multiple of 8 channels, and turns those of a multiple of 16 by itself: pairs
    come in eights then, and channels beside them in sixteens. Others are lowered to the standard's
    attention, so an axis that has another size already may keep any.
    """
    turned = bool(axes.of_role("rotary"))
    wanted = {
        axis.name: 16 if axis.role == "qk" and turned else 8
        for axis in axes.of_role("qk")  # both the pairs and what is beside them
    }
    return {name: n for name, n in wanted.items() if axes.by_name[name].size % n == 0}


TARGET = Target(
    name="onnx",
    description="an ONNX graph with a key/value cache, for ONNX Runtime",
    suffix=".onnx",
    write=write_decoder,
    multiple_of=head_multiples,
)
