"""A checkpoint that changes under one's hands, and one whose header or index lies."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgeon.capture.weights import SafetensorsWeights, stored_tensors
from surgeon.errors import Code, SurgeonError

NAME = "model.safetensors"


@pytest.fixture
def weights(tmp_path: Path) -> SafetensorsWeights:
    save_file({"w": torch.ones(64), "v": torch.zeros(3)}, tmp_path / NAME)
    return SafetensorsWeights(tmp_path)


def refused(code: Code, read: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        read()
    assert caught.value.code is code
    return caught.value


def test_a_file_that_was_written_to_is_noticed(tmp_path: Path, weights: SafetensorsWeights) -> None:
    weights["w"]
    path = tmp_path / NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    time = path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=(time, time + 1))  # a clock too coarse for a test
    assert "changed" in refused(Code.BAD_CHECKPOINT, lambda: weights["w"]).what
    assert "changed" in refused(Code.BAD_CHECKPOINT, lambda: weights.rows("w", 0, 1)).what
    assert SafetensorsWeights(tmp_path)["v"].shape == (3,)  # read anew, it is what it is


def test_a_file_in_anothers_place_is_noticed(tmp_path: Path, weights: SafetensorsWeights) -> None:
    path, time = tmp_path / NAME, (tmp_path / NAME).stat().st_mtime_ns
    (tmp_path / "new").write_bytes(path.read_bytes())
    os.utime(tmp_path / "new", ns=(time, time))
    (tmp_path / "new").replace(path)
    assert "changed" in refused(Code.BAD_CHECKPOINT, lambda: weights["w"]).what


def test_a_file_that_is_gone_is_named(tmp_path: Path, weights: SafetensorsWeights) -> None:
    (tmp_path / NAME).unlink()
    assert NAME in refused(Code.MISSING_FILE, lambda: weights["w"]).at


def entry(start: Any, stop: Any, shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "begins at"),
        ({"a": entry(0, 8), "b": entry(16, 24)}, "begins at"),
        ({"a": entry(-8, 0), "b": entry(0, 8)}, "neither"),
        ({"a": entry(0, 8, (-1, -2))}, "neither"),
        ({"a": entry(0, 8, (2.0,))}, "neither"),
        ({"a": entry(0, 8, (True, 2))}, "neither"),
        ({"a": entry(0, 8, "2")}, "neither"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: dict[str, Any], match: str) -> None:
    text = json.dumps(header).encode()
    size = max(e["data_offsets"][1] for e in header.values())
    (tmp_path / NAME).write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    assert match in refused(Code.BAD_CHECKPOINT, lambda: stored_tensors(tmp_path / NAME)).why


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / NAME).open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)  # a hole: it takes no room
    assert "allows" in refused(Code.BAD_CHECKPOINT, lambda: stored_tensors(tmp_path / NAME)).why


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", ".", "", "a/../b", "a\0"])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SurgeonError) as caught:
        SafetensorsWeights(tmp_path)
    assert caught.value.code in (Code.BAD_CHECKPOINT, Code.MISSING_FILE)


def test_links_in_a_circle_are_no_files(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(NAME)
    refused(Code.MISSING_FILE, lambda: SafetensorsWeights(tmp_path))
    refused(Code.MISSING_FILE, lambda: stored_tensors(tmp_path / NAME))
