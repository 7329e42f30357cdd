from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from surgeon.emit import safetensors_file, unbuffered
from surgeon.emit.safetensors_file import TensorSpec, write_safetensors_file
from surgeon.emit.unbuffered import ALIGNED, UnbufferedFile

fcntl = pytest.importorskip("fcntl")


def parts(lengths: list[int]) -> list[bytes]:
    return [bytes((7 * n + i) % 251 for i in range(size)) for n, size in enumerate(lengths)]


def written(path: Path, data: list[bytes]) -> bytes:
    with UnbufferedFile(path, 2 * ALIGNED) as file:
        for part in data:
            file.write(part)
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([0, 1, 100, 4095, 4096, 8192, 9000, 20_000]), max_size=5))
def test_a_file_holds_what_was_written_to_it(tmp_path: Path, lengths: list[int]) -> None:
    data = parts(lengths)
    assert written(tmp_path / "x", data) == b"".join(data)


def watched(monkeypatch: pytest.MonkeyPatch, do: Any = None) -> list[tuple[bool, int]]:
    """Records whether each write passes by the cache, and its bytes; `do` may write instead."""
    seen: list[tuple[bool, int]] = []
    write = os.write

    def spy(file: int, data: Any) -> int:
        direct = bool(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT)
        seen.append((direct, len(data)))
        return write(file, data) if do is None else do(direct, write, file, data)

    monkeypatch.setattr(unbuffered.os, "write", spy)
    return seen


@pytest.fixture
def direct(tmp_path: Path) -> None:
    try:
        os.close(os.open(tmp_path / "probe", os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except (AttributeError, OSError):
        pytest.skip("this system has no way past the page cache")


@pytest.mark.usefixtures("direct")
def test_all_but_an_odd_end_passes_by_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch)
    data = parts([3 * ALIGNED, 2 * ALIGNED + 5])
    assert written(tmp_path / "x", data) == b"".join(data)
    assert seen == [(True, 2 * ALIGNED), (True, 2 * ALIGNED), (False, ALIGNED + 5)]


@pytest.mark.usefixtures("direct")
def test_what_a_device_refuses_goes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(direct: bool, write: Any, file: int, data: Any) -> int:
        if direct:
            raise OSError(errno.EINVAL, "no")
        return write(file, data)

    seen = watched(monkeypatch, refusing)
    data = parts([5 * ALIGNED])
    assert written(tmp_path / "x", data) == b"".join(data)
    assert [direct for direct, _ in seen] == [True, False, False, False]


@pytest.mark.usefixtures("direct")
def test_a_write_that_stops_halfway_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(direct: bool, write: Any, file: int, data: Any) -> int:
        return write(file, data[:ALIGNED])

    watched(monkeypatch, short)
    data = parts([5 * ALIGNED + 1])
    assert written(tmp_path / "x", data) == b"".join(data)


def test_other_errors_are_raised_and_nothing_more_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(unbuffered.os, "write", full)
    with pytest.raises(OSError, match="no space left"):
        written(tmp_path / "x", parts([5 * ALIGNED]))
    assert (tmp_path / "x").read_bytes() == b""


def test_large_tensor_files_are_written_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.arange(30_000, dtype=torch.float32).reshape(300, 100)
    spec = TensorSpec("w", "f32", (300, 100), lambda: tensor)
    made: list[Any] = []
    monkeypatch.setattr(
        safetensors_file, "UnbufferedFile", lambda path: made.append(path) or UnbufferedFile(path)
    )
    write_safetensors_file(tmp_path / "small", [spec])
    assert made == []
    monkeypatch.setattr(safetensors_file, "LARGE_BYTES", spec.nbytes)
    write_safetensors_file(tmp_path / "large", [spec])
    assert made == [tmp_path / "large"]
    assert torch.equal(load_file(tmp_path / "large")["w"], tensor)
    assert (tmp_path / "large").read_bytes() == (tmp_path / "small").read_bytes()
