"""Models as something that runs: loaded from a name, or exported to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import formats
from surgeon.axes.plan import Plan
from surgeon.errors import Code, SurgeonError, near, no_weights
from surgeon.pipeline import Model, open_model, prune, versions

if TYPE_CHECKING:
    from surgeon.emit.lowbit.scheme import Scheme
    from surgeon.packing import Measuring
    from surgeon.pruned import Report


def load(
    model: str,
    tokenizer: str | None = None,
    *,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Returns something that gives logits, and its tokenizer or None.

    Args:
        model: an ONNX or .pt2 file or the folder of one, or anything that `open_model` takes.
        tokenizer: a folder with a tokenizer, for a model that has none beside it.
        device: `auto`, `cuda` or `cpu`.
        trust_remote_code: run modelling code that comes with a checkpoint.

    Raises:
        SurgeonError: why it can't be loaded.
    """
    from surgeon.capture.source import resolve
    from surgeon.runtime.model import open_session, tokenizer_beside
    from surgeon.runtime.program_file import open_module, program_file

    chosen = resolve(tokenizer).load_tokenizer() if tokenizer else None
    if is_graph(model):
        session = open_session(model, device=device)
        return session, chosen or tokenizer_beside(session.path)
    file = program_file(model)
    if file is not None:
        return open_module(file, device=device), chosen or tokenizer_beside(file)
    rounded = packed(model, device=device, trust_remote_code=trust_remote_code)
    if rounded is not None:
        return rounded, chosen or tokenizer_beside(Path(model).expanduser() / "config.json")
    opened = open_model(model, trust_remote_code=trust_remote_code)
    own = opened.source.load_tokenizer() if opened.source and chosen is None else None
    return load_opened(opened, device=device), chosen or own


def load_opened(opened: Model, *, device: str = "auto") -> Any:
    """Returns an opened model as a Transformers model in fp32, ready to run.

    Raises:
        SurgeonError: why it can't be loaded.
    """
    from surgeon.runtime.device import choose_torch_device

    on = choose_torch_device(device)
    loaded: Any = prune(opened, plan=Plan(), verify=False).model.float().to(on.name)
    loaded.device_note = on.note
    return loaded


def load_to_measure(
    model: str, *, device: str = "auto", threads: int | None = None, trust_remote_code: bool = False
) -> Any:
    """Returns a model as its own library loads it, so that its memory is what users will see.

    Args:
        model: an ONNX or .pt2 file or the folder of one, or a Transformers checkpoint.
        device: `auto`, `cuda` or `cpu`.
        threads: threads inside an operation; the library's own choice without it.
        trust_remote_code: run modelling code that comes with a checkpoint.

    Raises:
        SurgeonError: why it can't be loaded.
    """
    from surgeon.runtime.model import open_session

    if is_graph(model):
        return open_session(model, device=device, threads=threads)
    import torch

    from surgeon.capture.source import resolve
    from surgeon.runtime.device import choose_torch_device
    from surgeon.runtime.program_file import open_module, program_file

    if threads is not None:
        torch.set_num_threads(threads)
    file = program_file(model)
    if file is not None:
        return open_module(file, device=device)
    rounded = packed(model, device=device, trust_remote_code=trust_remote_code)
    if rounded is not None:
        return rounded
    on = choose_torch_device(device)
    source = resolve(model, trust_remote_code=trust_remote_code)
    model_class: Any = source.model_class
    if source.folder is not None and source.weights is not None:
        loaded = model_class.from_pretrained(source.folder, dtype=torch.float32)
    else:
        weights = source.full_weights()
        loaded = model_class(source.config)
        wanted = loaded.state_dict()
        loaded.load_state_dict({n: weights[n] for n in wanted if n in weights}, strict=False)
        loaded.tie_weights()
    loaded.device_note = on.note
    return loaded.float().eval().to(on.name)


def packed(model: str, *, device: str, trust_remote_code: bool) -> Any:
    """Returns the model of a quantised checkpoint folder, None where it is no such folder.

    Raises:
        SurgeonError: `missing-extra` without the library that reads it, `remote-code`.
    """
    how = packing_of(model)
    if how is None:
        return None
    from surgeon.emit.lowbit.scheme import need_library
    from surgeon.runtime.device import choose_torch_device
    from surgeon.saving import load_transformers

    folder = Path(model).expanduser()
    need_library(how, str(folder))
    on = choose_torch_device(device)
    loaded: Any = load_transformers(folder, trust_remote_code=trust_remote_code).to(on.name)
    loaded.device_note = on.note
    return loaded


def packing_of(model: str) -> str | None:
    """Returns the library that packed a checkpoint folder's weights; None for any other model."""
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        return None
    from surgeon.capture.configs import quantised, read_config

    how = quantised(read_config(folder / "config.json"))
    return how if next(folder.glob("*.safetensors"), None) is not None else None


def quantize(
    source: Any,
    path: str | Path,
    scheme: str | Mapping[str, Any] | Scheme = "int8",
    *,
    overwrite: bool = False,
    verify: bool = True,
    measure: Measuring | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """Writes a model with its weights in fewer bits and returns what was written.

    Args:
        source: what `open_model` takes, such as a folder that a prune wrote.
        path: a folder that doesn't exist yet, or is empty.
        scheme: `int8`, `w8` or `int4`, or the keys of a recipe's section `quantize`.
        overwrite: replace an earlier result.
        verify: read back what was written, and compare.
        measure: a text that the model is scored on, before and after.
        trust_remote_code: run modelling code that comes with a checkpoint.

    Raises:
        SurgeonError: `bad-option`, `bad-checkpoint` where it is quantised already,
            `target-refused`, `bad-output`, `disk-full` or `verify-failed`.
    """
    from surgeon.calibrate.parallel import rank
    from surgeon.emit.files import check_output
    from surgeon.emit.lowbit.scheme import scheme_of

    chosen = scheme_of(scheme)
    if rank() == 0:  # which may have written when the others come here
        check_output(path, overwrite=overwrite)
    made = prune(
        source, plan=Plan(), quantize=chosen, verify=False, trust_remote_code=trust_remote_code
    )
    return made.save(path, overwrite=overwrite, verify=verify, measure=measure)


def where(model: Any) -> str:
    """Returns on which device a loaded model runs, and why."""
    note = getattr(model, "device_note", "") or getattr(model, "note", "")
    device = getattr(model, "device", "cpu")
    return f"{device} ({note})" if note else str(device)


def is_graph(model: str) -> bool:
    """Whether this names an ONNX file, or the folder of one."""
    from surgeon.runtime.graph_file import is_graph_folder

    path = Path(model).expanduser()
    return model.endswith(".onnx") or (path.is_dir() and is_graph_folder(path))


def need_tokenizer(tokenizer: Any, model: str) -> Any:
    """Returns the tokenizer, or refuses where there is none."""
    if tokenizer is None:
        raise SurgeonError(
            Code.MISSING_FILE,
            "there is no tokenizer for this model",
            at=model,
            why="a text can't be turned into token ids without one",
            try_="--tokenizer FOLDER, with the folder of the checkpoint it was made from",
        )
    return tokenizer


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: of the file or folder.
        summary: in words.
        target: what a report says of it.
        notes: what the user should know of it.
    """

    path: Path
    summary: str
    target: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def export(
    model: str | Model,
    to: str,
    path: Path,
    *,
    style: str | None = None,
    dtype: str | None = None,
    positions: int | None = None,
    quantize: str | None = None,
    block_size: int | None = None,
    rounding: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes a model for a runtime, as a graph or in a format of its own; returns what was written.

    Args:
        model: anything that `open_model` takes.
        to: `onnx`, `pt2`, `gguf` or `vllm`.
        path: a file with the target's suffix gets the graph (large weights beside it); for `onnx`
            any other path is a folder that ONNX Runtime and onnxruntime-genai run as it is, for
            `gguf` one with the file `model.gguf`.
        style: of an ONNX graph: `ort`, `standard` or `generic`; see `Options`.
        dtype: `fp32`, `fp16` or `bf16`: of an ONNX graph (fp32 without it), or of a GGUF file's
            matrices (without it as the source stores them).
        positions: the longest sequence of an ONNX graph; by default the configuration's.
        quantize: store weights in fewer bits: those of an ONNX graph by `int4`, `w8` or `int8`, see
            `Scheme`; those of a GGUF file by `q8_0`.
        block_size: neighbouring weights that share a scale; 32 without it.
        rounding: of the weights: `nearest`, the default, or `k-quant`.
        overwrite: replace an earlier result.
        check: run what was written and compare.
        trust_remote_code: run modelling code that comes with a checkpoint.

    Raises:
        SurgeonError: `bad-option` for an unknown target; why the model can't be read, exported
            or written.
    """
    from surgeon.emit.target import find_targets, get_target

    known = find_targets()
    if to not in known:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{to!r} is no export target",
            at="--to",
            why="one at a time is written of " + ", ".join(known),
            try_=near(to, known),
        )
    if known[to].kind == "checkpoint":
        odd = {"--style": style, "--positions": positions, "--rounding": rounding}
        odd["--block-size"] = block_size
        if to != "gguf":
            odd |= {"--dtype": dtype, "--quantize": quantize}
        for option, given in odd.items():
            if given is not None:
                raise formats.no_option(to, option)
        kind = _gguf_type(dtype, quantize)
        opening = {"trust_remote_code": trust_remote_code}
        return _export_format(model, to, path, opening, kind, overwrite=overwrite, check=check)
    if to != "onnx" and quantize is not None:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"--to {to} isn't quantised",
            at=f"--to {to} --quantize {quantize}",
            why="the rounding and the kernels are ONNX Runtime's",
            try_="--to onnx, or leave --quantize out",
        )
    dtype = dtype or "fp32"
    if to != "onnx" and (style is not None or dtype != "fp32" or positions is not None):
        raise SurgeonError(
            Code.BAD_OPTION,
            f"--to {to} has no style, element type or number of positions",
            at=f"--to {to}",
            why="a torch.export program is written in fp32, without tables",
            try_="leave --style, --dtype and --positions out, or --to onnx",
        )
    from surgeon.emit.files import check_output, check_output_file

    target = get_target(to)
    alone = to != "onnx" or path.suffix == target.suffix
    (check_output_file if alone else check_output)(path, overwrite=overwrite)
    options: dict[str, Any] = {
        "style": style,
        "dtype": dtype,
        "positions": positions,
        "quantize": _scheme(quantize, block_size, rounding),
    }
    if to == "onnx":
        from surgeon.emit.onnx_decoder import Options

        # What can't be asked for is refused before the model is opened.
        Options(style or "ort", dtype, 1 if positions is None else positions, options["quantize"])
    opened = open_model(model, trust_remote_code=trust_remote_code)
    if not alone:
        return _export_folder(opened, path, options, overwrite=overwrite, check=check)
    chosen: dict[str, Any] = {}
    if to == "onnx":
        from surgeon.emit.onnx_folder import options_for

        chosen = {"options": options_for(opened.program, opened.source, **options)}
    found = target.write(
        opened.program, opened.read, path, overwrite=overwrite, check=check, **chosen
    )
    size = sum(file.stat().st_size for file in found.files)
    names = ", ".join(file.name for file in found.files)
    report = {"name": to, "nodes": found.nodes, "bytes": size, "largest_difference": found.largest}
    notes: list[str] = []
    if options["quantize"] is not None:
        from surgeon.emit.onnx_folder import judged

        quantised, notes = judged(
            found, opened.program, opened.read, opened.source, chosen["options"], check=check
        )
        report["quantize"] = quantised
    return Exported(path, _summary(names, found.nodes, size, found.largest), report, tuple(notes))


def _scheme(name: str | None, block_size: int | None, rounding: str | None) -> Any:
    """Returns how to quantise, None where that isn't asked for."""
    from surgeon.emit.quantize.scheme import Scheme

    asked: dict[str, Any] = {"block_size": block_size, "rounding": rounding}
    given = {option: value for option, value in asked.items() if value is not None}
    if name is not None:
        return Scheme(name, **given)
    if given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{option} is of a quantised graph",
            at=option,
            why="without --quantize the weights stay as they are",
            try_=f"--quantize int4 with {option}, or leave it out",
        )
    return None


def _gguf_type(dtype: str | None, quantize: str | None) -> str:
    """Returns the type asked for of a GGUF file's matrices; empty for the source's own."""
    from surgeon.emit.gguf_target import TYPES

    asked = quantize or dtype or ""
    what, known = ("--quantize", ["q8_0"]) if quantize else ("--dtype", [*TYPES][:3])
    if (quantize and dtype) or (asked and asked not in known):
        raise SurgeonError(
            Code.BAD_OPTION,
            f"a GGUF file has no type {asked!r}"
            if asked not in known
            else "a GGUF file's matrices have one type",
            at=f"--to gguf {what} {asked}",
            why="its matrices are written in fp32, fp16 or bf16, or packed as q8_0; llama.cpp's "
            "own llama-quantize makes the others of these",
            try_=f"{what} " + " or ".join(known),
        )
    return asked


def _export_format(
    model: str | Model,
    to: str,
    path: Path,
    opening: Mapping[str, Any],
    kind: str,
    *,
    overwrite: bool,
    check: bool,
) -> Exported:
    """Writes a model in a runtime's own format, into a file or a folder."""
    from surgeon.emit.files import (
        MARKER,
        check_output,
        check_output_file,
        output_file,
        output_folder,
    )

    alone = to == "gguf" and path.suffix == ".gguf"
    (check_output_file if alone else check_output)(path, overwrite=overwrite)
    opened = open_model(model, **opening)
    whole = prune(opened, plan=Plan(), verify=False, target=to)
    if opened.tensors is None:
        raise no_weights(opened.id)
    options: dict[str, Any] = {"kind": kind} if to == "gguf" else {}
    room = formats.need_bytes(whole)
    if alone:
        with output_file(path, overwrite=overwrite, need_bytes=room) as file:
            options["file"] = file.name
            facts, found = formats.write(whole, to, file.parent, verify=check, **options)
    else:
        with output_folder(path, overwrite=overwrite, need_bytes=room) as folder:
            facts, found = formats.write(whole, to, folder, verify=check, **options)
            report = {
                "source": {"id": opened.id, "hash": opened.fingerprint()},
                "target": {key: value for key, value in facts.items() if key != "notes"},
                "notes": facts["notes"],
                "versions": versions(),
            }
            text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
            (folder / MARKER).write_text(text, encoding="utf-8")
    notes = tuple(facts.pop("notes"))
    said = (
        f"wrote {path}: {facts['architecture']}, {facts['dtype']}, {facts['bytes'] / 1e6:,.1f} MB"
    )
    if found is not None:
        said += f", within {found.largest:.1e} of the model's values; every tensor read back"
        facts["largest_difference"] = found.largest
    return Exported(path, said, facts, notes)


def _export_folder(
    opened: Model, path: Path, options: Mapping[str, Any], *, overwrite: bool, check: bool
) -> Exported:
    from surgeon.emit.files import MARKER, output_folder
    from surgeon.emit.onnx_folder import options_for, write_folder

    chosen = options_for(opened.program, opened.source, **options)
    width = 4 if chosen.dtype == "fp32" else 2
    shapes = (p.type.shape for p in opened.program.params)
    need = sum(width * prod(int(size) for size in shape) for shape in shapes)
    with output_folder(path, overwrite=overwrite, need_bytes=need) as folder:
        found = write_folder(
            folder, opened.program, opened.read, opened.source, chosen, check=check
        )
        report = {
            "source": {"id": opened.id, "hash": opened.fingerprint()},
            "target": found.target(),
            "notes": found.notes,
            "versions": versions(),
        }
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        (folder / MARKER).write_text(text, encoding="utf-8")
    summary = _summary(str(path), found.nodes, found.bytes, found.largest)
    return Exported(path, summary, found.target(), found.notes)


def _summary(names: str, nodes: int, size: int, largest: float | None) -> str:
    checked = f", within {largest:.1e} of the program's values" if largest is not None else ""
    return f"wrote {names}: {nodes:,} nodes, {size / 1e6:,.1f} MB{checked}"
