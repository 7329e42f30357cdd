"""ONNX files: found in a folder, opened in ONNX Runtime, and told why where that fails."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from surgeon.errors import Code, SurgeonError, near
from surgeon.runtime.device import CPU, CUDA, choose_device

DTYPES = {
    "tensor(float)": "fp32",
    "tensor(float16)": "fp16",
    "tensor(bfloat16)": "bf16",
}
"""The element types that a decoder computes in, as ONNX Runtime and as Surgeon write them."""


@dataclass(frozen=True)
class OpenGraph:
    """A graph that ONNX Runtime has loaded."""

    session: Any
    path: Path
    device: str
    """`cuda` or `cpu`."""
    note: str
    """Why this device."""
    asked: str
    """The device that was asked for, or `providers` where they were named."""
    threads: int | None = None

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that came up."""
        return tuple(self.session.get_providers())

    @property
    def types(self) -> dict[str, str]:
        """The element type of every input, by name."""
        return {i.name: i.type for i in self.session.get_inputs()}

    @property
    def metadata(self) -> dict[str, str]:
        """What the graph says of itself."""
        return dict(self.session.get_modelmeta().custom_metadata_map)


class OfGraph:
    """What any session says of the graph that it runs."""

    graph: OpenGraph

    @property
    def path(self) -> Path:
        """The ONNX file."""
        return self.graph.path

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return self.graph.device

    @property
    def note(self) -> str:
        """Why it runs on this device."""
        return self.graph.note

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that came up."""
        return self.graph.providers


REWRITES = "plan.safetensors"
"""What a prune replaced besides removing, kept beside its plan: no weights of a checkpoint."""


def is_graph_folder(path: Path) -> bool:
    """Whether this folder is an exported graph and not a checkpoint that has one beside it."""
    weights = any(file.name != REWRITES for file in path.glob("*.safetensors"))
    return any(path.glob("*.onnx")) and not weights


def locate(path: str | Path) -> Path:
    """Returns the ONNX file that a path means: the file itself, or the one in a folder.

    Raises:
        SurgeonError: no such path, a folder without a graph or with several.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise SurgeonError(
            Code.MISSING_FILE,
            f"there is no ONNX file '{path}'",
            at=str(path),
            why="no such file or folder",
            try_="give the path of an .onnx file, or of a folder that 'surgeon export' wrote",
        )
    found = sorted(path.glob("*.onnx"))
    if (path / "model.onnx") in found:
        return path / "model.onnx"
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found)
    raise SurgeonError(
        Code.MISSING_FILE,
        "the folder has no ONNX graph" if not found else "the folder has several ONNX graphs",
        at=str(path),
        why=f"none of {names} is called model.onnx"
        if found
        else "it is empty"
        if not any(path.iterdir())
        else "no file in it ends in .onnx",
        try_=f"name the file itself, such as {found[0]}"
        if found
        else "a folder that 'surgeon export --to onnx' wrote",
    )


def open_graph(
    path: str | Path,
    *,
    device: str = "auto",
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    cuda_graph: bool = False,
) -> OpenGraph:
    """Returns a graph loaded in ONNX Runtime.

    Args:
        path: an ONNX file or a folder with one.
        device: `auto`, `cuda` or `cpu`.
        providers: execution providers in order of preference in place of a device; all must load.
        threads: threads inside an operation; ONNX Runtime's own choice without it.
        cuda_graph: record the work of a decoding step once and replay it; on CUDA only.

    Raises:
        SurgeonError: no file, no model, weights that are missing or cut off, a device or provider
            that doesn't work here, options that contradict each other.
    """
    import onnxruntime as ort

    file = locate(path)
    if threads is not None and threads < 1:
        raise _bad_option("threads", threads, "at least one thread computes", "threads=1, or more")
    if providers is not None:
        if device != "auto":
            raise _bad_option("device", device, "providers are named too", "one of the two")
        _check_known(providers, ort.get_available_providers(), file)
        name, note, asked = ("cuda" if CUDA in providers else "cpu"), "asked for", tuple(providers)
    else:
        chosen = choose_device(device)
        name, note, asked = chosen.name, chosen.note, chosen.providers
    if cuda_graph and name != "cuda":
        raise _bad_option(
            "cuda_graph",
            cuda_graph,
            f"the graph would run on {name} ({note})",
            "device='cuda' on a machine with a GPU, or leave cuda_graph out",
        )
    settings: Any = ort.SessionOptions()
    settings.log_severity_level = 3
    if threads is not None:
        settings.intra_op_num_threads = threads
    options: list[dict[str, str]] = [
        {"enable_cuda_graph": "1"} if cuda_graph and p == CUDA else {} for p in asked
    ]
    try:
        session: Any = ort.InferenceSession(
            file, settings, providers=list(asked), provider_options=options
        )
    except ort_errors() as error:
        raise _why(file, error, name) from error
    absent = [p for p in asked if p not in session.get_providers()]
    if absent and device == "auto" and providers is None:
        warnings.warn(
            f"this machine has a CUDA device, but {absent[0]} did not load; using {CPU}",
            stacklevel=3,
        )
        name, note = "cpu", f"{absent[0]} did not load"
    elif absent:
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            f"the execution provider {absent[0]} did not load",
            at=str(file),
            why="ONNX Runtime has it, but not the device or the libraries that it needs; "
            f"only {', '.join(session.get_providers())} came up",
            try_=f"pip install 'model-surgeon[cuda]' on a machine with the device, or {CPU}",
            data={"asked": list(asked), "loaded": list(session.get_providers())},
        )
    return OpenGraph(session, file, name, note, "providers" if providers else device, threads)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, empty where there is no such file.

    Raises:
        SurgeonError: `bad-checkpoint` where it is no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _no_object(path, one_line(error)) from error
    if not isinstance(found, dict):
        raise _no_object(path, f"it holds a {type(found).__name__}")
    return found


@cache
def ort_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions of ONNX Runtime, which share no base class of their own."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [
        kind
        for kind in vars(state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    return (*own, RuntimeError, ValueError)


def one_line(error: BaseException) -> str:
    """Returns what an exception says, on one line."""
    return " ".join(str(error).split())[:500]


def failed(graph: OpenGraph, shape: Sequence[int], error: BaseException) -> SurgeonError:
    """Returns the error of a run that ONNX Runtime gave up."""
    return SurgeonError(
        Code.RUNTIME_FAILED,
        f"ONNX Runtime failed in '{graph.path.name}'",
        at=f"{graph.path}, input_ids {list(shape)}, on {graph.providers[0]}",
        why=one_line(error),
        try_="a shorter sequence, or another device",
    )


def _why(file: Path, error: BaseException, device: str) -> SurgeonError:
    """Returns what is wrong with a file that ONNX Runtime doesn't load."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model: Any = onnx.load(file, load_external_data=False)
    except (DecodeError, OSError) as unreadable:
        return SurgeonError(
            Code.NOT_A_MODEL,
            f"'{file.name}' is no ONNX file, or only a part of one",
            at=str(file),
            why=one_line(unreadable) or one_line(error),
            try_="export the model again",
        )
    lost = _lost_data(model, file.parent)
    if lost is not None:
        return lost
    types = {i.type.tensor_type.elem_type for i in (*model.graph.input, *model.graph.output)}
    if device == "cpu" and onnx.TensorProto.BFLOAT16 in types:
        return SurgeonError(
            Code.RUNTIME_FAILED,
            "a graph in bf16 doesn't run on the CPU",
            at=str(file),
            why=f"{CPU} has no kernels for it: {one_line(error)}",
            try_="a machine with a CUDA device, or export with --dtype fp32",
        )
    return SurgeonError(
        Code.NOT_A_MODEL,
        f"ONNX Runtime can't open '{file.name}'",
        at=str(file),
        why=one_line(error),
        try_="export the model again, or check the file with onnx.checker.check_model",
    )


def _lost_data(model: Any, folder: Path) -> SurgeonError | None:
    """Returns the error of weights beside the graph that aren't there, or None if all are."""
    need: dict[str, int] = {}
    for tensor in model.graph.initializer:
        entry = {e.key: e.value for e in tensor.external_data}
        if "location" in entry:
            end = int(entry.get("offset", 0)) + int(entry.get("length", 0))
            need[entry["location"]] = max(need.get(entry["location"], 0), end)
    for name, size in need.items():
        path = folder / name
        if not path.is_file():
            return SurgeonError(
                Code.MISSING_FILE,
                f"the graph's weights are missing: '{name}'",
                at=str(path),
                why="the graph keeps them in a file of their own, which has to lie beside it",
                try_="copy that file too, under the same name, or export again",
            )
        if path.stat().st_size < size:
            return SurgeonError(
                Code.BAD_CHECKPOINT,
                f"the graph's weights are cut off: '{name}'",
                at=str(path),
                why=f"the file has {path.stat().st_size:,} bytes, the graph needs {size:,}",
                try_="copy that file again, or export again",
                data={"bytes": path.stat().st_size, "needed": size},
            )
    return None


def _check_known(asked: Sequence[str], known: Sequence[str], path: Path) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            f"there is no execution provider '{unknown[0]}'"
            if unknown
            else "no execution provider was named",
            at=str(path),
            why=f"the ONNX Runtime installed here has {', '.join(known)}",
            try_=near(unknown[0], known) if unknown else CPU,
            data={"asked": list(asked), "known": list(known)},
        )


def _no_object(path: Path, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_CHECKPOINT,
        f"'{path.name}' can't be read",
        at=str(path),
        why=why,
        try_="write it again, or remove it",
    )


def _bad_option(name: str, value: object, why: str, try_: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        f"{name} can't be {value}",
        at=f"option {name}",
        why=why,
        try_=try_,
        data={"option": name},
    )
