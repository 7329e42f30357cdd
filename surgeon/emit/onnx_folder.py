"""A folder that ONNX Runtime and onnxruntime-genai run as it is: graph, tokenizer, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.emit.genai import FILE, genai_config, read_facts
from surgeon.emit.onnx_decoder import POSITIONS, Options, WrittenDecoder, write_decoder
from surgeon.emit.pt2 import LANGUAGE, Weights, Written, tensors
from surgeon.emit.quantize.scheme import Scheme

if TYPE_CHECKING:
    from surgeon.capture.source import Source
    from surgeon.ir import Program

GRAPH = "model.onnx"
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Folder:
    """What was written.

    Attributes:
        options: how the model was lowered.
        nodes: of the graph.
        bytes: of graph and weights.
        largest: difference from the program's logits as a share of the largest, None where it
            wasn't or couldn't be compared.
        notes: what the user should know of it.
        quantised: what became of the weights, None where they are whole.
    """

    options: Options
    nodes: int
    bytes: int
    largest: float | None
    notes: tuple[str, ...] = ()
    quantised: Mapping[str, Any] | None = None

    def target(self) -> dict[str, Any]:
        """Returns what a report says of it."""
        kind = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[self.options.dtype]
        found = {
            "name": "onnx",
            "style": self.options.style,
            "dtype": kind,
            "nodes": self.nodes,
            "bytes": self.bytes,
            "largest_difference": self.largest,
        }
        return found if self.quantised is None else {**found, "quantize": dict(self.quantised)}


def options_for(
    program: Program,
    source: Source | None,
    *,
    style: str | None = None,
    dtype: str = "fp32",
    positions: int | None = None,
    quantize: Scheme | None = None,
) -> Options:
    """Returns how to lower a program: what is asked for, else what suits it.

    A program that is no language model has no tokens to keep a cache of: it goes the generic way.
    """
    language = tuple(i.name for i in program.inputs) == LANGUAGE
    said = getattr(source.config, "max_position_embeddings", None) if source else None
    known = said if isinstance(said, int) else POSITIONS
    chosen = style or ("ort" if language else "generic")
    return Options(chosen, dtype, known if positions is None else positions, quantize)


def write_folder(
    folder: Path,
    program: Program,
    weights: Weights,
    source: Source | None,
    options: Options,
    *,
    check: bool = True,
) -> Folder:
    """Writes the graph and what belongs beside it into an empty folder.

    Args:
        folder: that exists and is empty.
        program: after the plan.
        weights: after the plan, by parameter name.
        source: where tokenizer and configuration come from.
        options: how to lower the program.
        check: run the graph and compare.

    Raises:
        SurgeonError: as `write_decoder`.
    """
    path = folder / GRAPH
    written = write_decoder(program, weights, path, options=options, check=check)
    size = sum(file.stat().st_size for file in written.files)
    notes: list[str] = []
    if check and written.largest is None:
        notes.append(f"not run: ONNX Runtime has no {options.dtype} kernels on the CPU")
    if source is not None:
        from surgeon.emit.hf_writing import carry

        carry(folder, source.tokenizer_files, source.tokenizer)
        if source.generation_config is not None:
            source.generation_config.save_pretrained(folder)
        notes += _genai(folder, path, source)
    quantised, said = judged(written, program, weights, source, options, check=check)
    return Folder(options, written.nodes, size, written.largest, (*notes, *said), quantised)


def judged(
    written: Written,
    program: Program,
    weights: Weights,
    source: Source | None,
    options: Options,
    *,
    check: bool = True,
) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Returns what to report of a quantised graph, and what to say; nothing where it isn't one.

    Args:
        written: the graph.
        program: that it was made from.
        weights: by parameter name.
        source: where the tokenizer comes from.
        options: how the program was lowered.
        check: measure perplexity, before and after.
    """
    if not isinstance(written, WrittenDecoder) or written.quantised is None:
        return None, []
    from surgeon.emit.quantize.quality import measure, notes, report
    from surgeon.runtime.lower import lower

    quality, missing = None, ""
    tokenizer = source.load_tokenizer() if check and source is not None else None
    if not check:
        missing = "it was not asked for"
    elif options.dtype == "bf16":
        missing = "ONNX Runtime has no bf16 kernels on the CPU"
    elif tokenizer is None:
        missing = "the model has no tokenizer"
    else:
        reference = lower(program, tensors(program, weights))
        quality = measure(written.files[0], reference, tokenizer, options.positions)
        missing = "" if quality else "the model or the text is too short"
    said = notes(written.quantised, quality)
    if missing:
        said.append(f"perplexity was not measured: {missing}")
    return report(written.quantised, quality), said


def _genai(folder: Path, path: Path, source: Source) -> list[str]:
    """Writes onnxruntime-genai's configuration where there can be one; returns what to say."""
    file = folder / GENERATION
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    made, said = genai_config(read_facts(path), source.config.to_dict(), generation)
    if made is None:
        return [f"no {FILE}: {said}"]
    (folder / FILE).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return [f"{FILE}: {said}"] if said else []
