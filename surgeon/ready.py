"""A model opened to be measured: what runs, its tokenizer, and what it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon import exporting
from surgeon.errors import Code, SurgeonError
from surgeon.opening import Model, open_model
from surgeon.report import facts as f
from surgeon.runtime.placing import DeviceMap, load_placed
from surgeon.viewing import costs_of

if TYPE_CHECKING:
    from surgeon.capture.source import Source

_UNCAPTURED = (Code.CAPTURE_FAILED, Code.DATA_DEPENDENT, Code.BAD_PROGRAM)
"""Refusals of an analysis that don't keep a model from running."""

_DERIVED = (
    *("parameters", "decoder_parameters", "sparsity"),
    *("flops", "flops_context", "cache_bytes"),
)


@dataclass(frozen=True)
class Ready:
    """A model that runs.

    Attributes:
        run: what `logits_of` and `generate` take.
        tokenizer: None where there is none.
        facts: what it is.
    """

    run: Any
    tokenizer: Any
    facts: f.Facts


def check_name(model: Any, *, trust_remote_code: bool = False) -> None:
    """Refuses what is no model, before another one is measured for an hour.

    Raises:
        SurgeonError: what it is instead, or that there is nothing.
    """
    if not isinstance(model, str | Path):
        return
    from surgeon.capture.source import resolve
    from surgeon.runtime.graph_file import locate
    from surgeon.runtime.program_file import find_program, program_file

    name = str(model)
    file = program_file(name)
    if exporting.is_graph(name):
        locate(name)
    elif file is not None:
        find_program(file)
    elif exporting.packing_of(name) is None:
        resolve(name, trust_remote_code=trust_remote_code)


@dataclass(frozen=True)
class Placing:
    """Where a checkpoint's layers go, and the folder of those that go to the disk."""

    device_map: DeviceMap
    offload: Path


def open_ready(
    model: Any,
    *,
    device: str = "auto",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    placing: Placing | None = None,
) -> Ready:
    """Returns a model ready to run, with its figures.

    Args:
        model: an ONNX or .pt2 file or the folder of one, or anything that `open_model` takes.
        device: `auto`, `cuda` or `cpu`.
        tokenizer: for a model that has none beside it.
        trust_remote_code: run modelling code that comes with a checkpoint.
        placing: deal its layers out to several devices.

    Raises:
        SurgeonError: why it can't be opened.
    """
    from surgeon.runtime.program_file import program_file

    name = str(model) if isinstance(model, str | Path) else ""
    if placing is not None:
        return _open_source(model, device, tokenizer, trust_remote_code, placing)
    if name and exporting.is_graph(name):
        return _open_graph(name, device, tokenizer)
    file = program_file(name) if name else None
    if file is not None:
        return _open_program(file, device, tokenizer)
    if name and exporting.packing_of(name) is not None:
        module = exporting.packed(name, device=device, trust_remote_code=trust_remote_code)
        return _open_packed(module, Path(name).expanduser(), tokenizer)
    return _open_source(model, device, tokenizer, trust_remote_code)


def _open_graph(name: str, device: str, tokenizer: Any) -> Ready:
    from surgeon.runtime.model import open_session, tokenizer_beside

    session = open_session(name, device=device)
    own = tokenizer_beside(session.path) or tokenizer
    return Ready(session, own, f.of_graph(session.path, session))


def _open_packed(module: Any, folder: Path, tokenizer: Any) -> Ready:
    """Takes a checkpoint whose weights are stored in fewer bits, which is not analysed."""
    from surgeon.runtime.graph_file import REWRITES
    from surgeon.runtime.model import tokenizer_beside

    found = f.Facts("checkpoint", type(module).__name__)
    found = found.without("its weights are stored in fewer bits", *_DERIVED)
    # What a plan replaced lies beside the checkpoint, and is not loaded with it.
    size = f.size_of(p for p in folder.glob("*.safetensors") if p.name != REWRITES)
    found = replace(found, disk_bytes=size, memory_bytes=f.module_bytes(module))
    return Ready(module, tokenizer_beside(folder / "config.json") or tokenizer, found)


def _open_program(file: Path, device: str, tokenizer: Any) -> Ready:
    from surgeon.runtime.model import tokenizer_beside
    from surgeon.runtime.program_file import load_program, open_module

    program = load_program(file, device=device)
    module = open_module(file, device=device, program=program)
    kind = "pt2", "torch.export program"
    try:
        opened = open_model(program)
        found = f.of_program(*kind, opened.axes, costs_of(opened), opened.read)
    except SurgeonError as error:
        if error.code not in _UNCAPTURED:
            raise
        found = f.Facts(*kind).without(_reason(error), *_DERIVED)
    found = replace(found, disk_bytes=file.stat().st_size, memory_bytes=f.module_bytes(module))
    return Ready(module, tokenizer_beside(file) or tokenizer, found)


def _open_source(
    model: Any, device: str, tokenizer: Any, trust: bool, placing: Placing | None = None
) -> Ready:
    """Opens what Transformers loads; what can't be captured is run all the same."""
    try:
        opened: Model | None = open_model(model, trust_remote_code=trust)
        refusal = None
    except SurgeonError as error:
        if error.code not in _UNCAPTURED:
            raise
        opened, refusal = None, error
    if opened is None:
        from surgeon.capture.source import resolve

        assert refusal is not None
        source = resolve(model, trust_remote_code=trust)
        run = _placed(source, placing) or exporting.load_to_measure(
            model, device=device, trust_remote_code=trust
        )
        found = f.Facts(_kind(source.kind), source.model_class.__name__)
        found = found.without(_reason(refusal), *_DERIVED)
    else:
        source = opened.source
        assert source is not None
        run = _placed(source, placing) or exporting.load_opened(opened, device=device)
        architecture = source.model_class.__name__
        found = f.of_program(
            _kind(source.kind), architecture, opened.axes, costs_of(opened), opened.read
        )
    found = replace(found, memory_bytes=f.module_bytes(run))
    files = source.weight_files
    if files:
        found = replace(found, disk_bytes=f.size_of(files))
    else:
        found = found.without("it was given as an object in memory", "disk_bytes")
    return Ready(run, source.load_tokenizer() or tokenizer, found)


def _placed(source: Source, placing: Placing | None) -> Any:
    """Returns the model dealt out to devices, None where that isn't asked for."""
    return placing and load_placed(source, placing.device_map, placing.offload)


def _kind(kind: str) -> str:
    return {"folder": "checkpoint", "hub": "checkpoint", "alias": "gguf"}.get(kind, kind)


def _reason(error: SurgeonError) -> str:
    return f"it can't be analysed: {error.what}"
