"""What a `.pt2` file may hold: tensors and text. `torch.export.load` reads pickles and code too."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

from surgeon.errors import Code, SurgeonError

_PLAIN = ("archive_format", "archive_version", "byteorder", "data.pkl")
_FOLDERS = (
    "models/",
    "data/weights/",
    "data/constants/",
    "data/sample_inputs/",
    "extra/",
    ".data/",
)
_TENSORS = ("weight_", "tensor_")
"""How raw tensors are named; compiled code and pickled objects have other names."""


def check_archive(path: Path) -> None:
    """Returns if torch can load a `.pt2` file without running code that is in it.

    The archive is looked at through the reader that loads it, so that there is no second reading
    of the same bytes.

    Raises:
        SurgeonError: `not-a-model` for a file that is no archive of a program, `remote-code` where
            it holds pickled objects or compiled code.

    Reference:
        torch.export.pt2_archive, `_load_state_dict`, `_load_constants` and
        `deserialize_torch_artifact`: what is marked `use_pickle`, objects, and example inputs that
        are more than tensors are unpickled.
    """
    from torch.export.pt2_archive._package import PT2ArchiveReader

    try:
        with PT2ArchiveReader(str(path)) as archive:
            names = [str(name) for name in archive.get_file_names()]
            for name in names:
                _check_name(path, name)
                if name.startswith(("data/weights/", "data/constants/")) and name.endswith(".json"):
                    _check_payloads(path, archive.read_bytes(name))
                elif name.startswith("data/sample_inputs/"):
                    _check_inputs(path, archive.read_bytes(name))
        with zipfile.ZipFile(path) as other:  # what torch looks into where the archive fails it
            folder = Path(other.namelist()[0]).parts[0] + "/" if other.namelist() else ""
            if {name.removeprefix(folder) for name in other.namelist()} != {*names}:
                raise _no_program(path, "its table of contents can be read in two ways")
    except SurgeonError:
        raise
    except Exception as error:  # the reader's own are RuntimeError, AssertionError and others
        lines = str(error).strip().splitlines() or ["no message"]
        raise _no_program(path, f"{type(error).__name__}: {lines[0]}"[:500]) from error


def _check_name(path: Path, name: str) -> None:
    folder = next((f for f in _FOLDERS if name.startswith(f)), None)
    inside = name.removeprefix(folder or "")
    known = name in _PLAIN if folder is None else "/" not in inside or folder == "extra/"
    if folder in ("data/weights/", "data/constants/"):
        known = inside.endswith("_config.json") or inside.startswith(_TENSORS)
    if not known:
        raise _code(path, f"it holds {name}, which is neither a tensor nor text")


def _check_payloads(path: Path, text: bytes) -> None:
    for name, payload in json.loads(text)["config"].items():
        if payload.get("use_pickle") or not str(payload["path_name"]).startswith(_TENSORS):
            raise _code(path, f"{name} is a pickled object")


def _check_inputs(path: Path, data: bytes) -> None:
    import torch

    if not data:
        return
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise _code(path, "its example inputs are more than tensors") from error


def _code(path: Path, why: str) -> SurgeonError:
    return _error(
        Code.REMOTE_CODE,
        f"'{path.name}' could run code when it is loaded",
        path,
        why,
        "export the program again with tensors alone, or prune the checkpoint it was made from",
    )


def _no_program(path: Path, why: str) -> SurgeonError:
    return _error(
        Code.NOT_A_MODEL,
        f"torch can't load '{path.name}'",
        path,
        why,
        "export it again with the version of torch that is installed here",
    )


def _error(code: Code, what: str, path: Path, why: str, try_: str) -> SurgeonError:
    return SurgeonError(code, what, at=str(path), why=why, try_=try_)
