"""A `.pt2` file is loaded where it holds tensors and text, and nothing that torch would run."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.program_archive import check_archive

pytestmark = pytest.mark.slow

RAN: list[str] = []
Edit = Callable[[dict[str, bytes]], None]


class Mine:
    def __reduce__(self) -> tuple[Any, ...]:
        return (RAN.append, ("ran",))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "linear.pt2"
    given = (torch.zeros(1, 2),)
    torch.export.save(torch.export.export(torch.nn.Linear(2, 3), given), path)
    return path


def pickled(members: dict[str, bytes]) -> None:
    name = next(n for n in members if n.endswith("weights_config.json"))
    config = json.loads(members[name])
    config["config"]["weight"]["use_pickle"] = True
    members[name] = json.dumps(config).encode()


def objects(members: dict[str, bytes]) -> None:
    name = next(n for n in members if n.endswith("constants_config.json"))
    config = {"config": {"c": {"path_name": "opaque_obj_0"}}}
    members[name] = json.dumps(config).encode()


def inputs(members: dict[str, bytes]) -> None:
    file = io.BytesIO()
    torch.save((Mine(),), file)
    members[next(n for n in members if "sample_inputs" in n)] = file.getvalue()


def compiled(members: dict[str, bytes]) -> None:
    members["linear/data/aotinductor/model/code.so"] = b"code"


def older(members: dict[str, bytes]) -> None:
    members["version"] = b"8.1"


@pytest.mark.parametrize("edit", [pickled, objects, inputs, compiled, older])
def test_what_could_run_code_is_refused(program: Path, tmp_path: Path, edit: Edit) -> None:
    check_archive(program)
    with zipfile.ZipFile(program) as file:
        members = {name: file.read(name) for name in file.namelist()}
    edit(members)
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    with pytest.raises(SurgeonError) as caught:
        check_archive(tmp_path / "m.pt2")
    assert caught.value.code in (Code.REMOTE_CODE, Code.NOT_A_MODEL)
    assert RAN == []
