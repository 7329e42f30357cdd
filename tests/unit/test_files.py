from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgeon.capture.exported import DTYPES
from surgeon.emit import files
from surgeon.emit.files import output_file, output_folder
from surgeon.emit.safetensors_file import TensorSpec, write_safetensors
from surgeon.errors import Code, SurgeonError


def specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [
        TensorSpec(name, DTYPES[t.dtype], tuple(t.shape), lambda t=t: t)
        for name, t in tensors.items()
    ]


def drawn() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    out: dict[str, torch.Tensor] = {
        f"z.{n}": torch.randn((3, 5), generator=draw).mul(9).to(dtype)
        for n, dtype in enumerate(DTYPES)
    }
    out["a.scalar"] = torch.tensor(2.5)
    out["a.empty"] = torch.zeros(0, 4)
    out["a.strided"] = torch.arange(12.0).reshape(3, 4).T
    out["ключ"] = torch.ones(1)
    return out


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def result(folder: Path, text: str) -> None:
    (folder / "surgeon.json").write_text("{}")
    (folder / "data").write_text(text)


# --- folders ---------------------------------------------------------------------------------


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with output_folder(out) as tmp:
        assert tmp.parent == out.parent and tmp.name.startswith(".out.partial-")
        (tmp / "sub").mkdir()
        (tmp / "sub" / "file").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x"
    assert entries(out.parent) == ["out"]


def test_a_folder_has_the_rights_of_any_new_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with output_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "out") as tmp:
        (tmp / "half").write_text("x")
        raise error
    assert entries(tmp_path) == []


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out") as tmp:
        result(tmp, "new")
    assert (tmp_path / "out" / "data").read_text() == "new"


@pytest.mark.parametrize("overwrite", [False, True])
def test_somebody_elses_folder_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with (
        pytest.raises(SurgeonError, match="not empty") as caught,
        output_folder(tmp_path / "out", overwrite=overwrite),
    ):
        pytest.fail("entered")
    assert caught.value.code is Code.BAD_OUTPUT
    assert (tmp_path / "out" / "thesis.tex").exists()


def test_an_earlier_result_is_replaced_only_when_asked(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as tmp:
        result(tmp, "old")
    with pytest.raises(SurgeonError, match="earlier result"), output_folder(out):
        pytest.fail("entered")
    with output_folder(out, overwrite=True) as tmp:
        result(tmp, "new")
        assert (out / "data").read_text() == "old"
    assert (out / "data").read_text() == "new"
    assert entries(tmp_path) == ["out"]


def test_an_earlier_result_survives_an_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with output_folder(out) as tmp:
        result(tmp, "old")
    with pytest.raises(ZeroDivisionError), output_folder(out, overwrite=True) as tmp:
        result(tmp, "new")
        raise ZeroDivisionError
    assert (out / "data").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_an_earlier_result_comes_back_when_the_swap_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with output_folder(out) as tmp:
        result(tmp, "old")
    rename = Path.rename

    def failing(self: Path, target: Any) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EACCES, "denied", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(SurgeonError, match="denied"), output_folder(out, overwrite=True) as tmp:
        result(tmp, "new")
    assert (out / "data").read_text() == "old"
    assert entries(tmp_path) == ["out"]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    for path in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(SurgeonError) as caught, output_folder(path, overwrite=True):
            pytest.fail("entered")
        assert caught.value.code is Code.BAD_OUTPUT
    assert (tmp_path / "out").read_text() == "x"


def test_an_unwritable_parent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def refusing(self: Path, *args: Any, **kwargs: Any) -> None:
        if ".partial-" in self.name:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refusing)
    with pytest.raises(SurgeonError, match="Permission denied") as caught:
        output_folder(tmp_path / "out").__enter__()
    assert caught.value.code is Code.BAD_OUTPUT


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_parent_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(SurgeonError) as caught:
        output_folder("/proc/surgeon/out").__enter__()
    assert caught.value.code is Code.BAD_OUTPUT


def test_too_little_room_is_refused_before_writing(tmp_path: Path) -> None:
    for output in (output_folder, output_file):
        with pytest.raises(SurgeonError, match=r"1000000000\.00 GB are needed") as caught:
            output(tmp_path / "out", need_bytes=10**18).__enter__()
        assert caught.value.code is Code.DISK_FULL
        assert caught.value.data["need_bytes"] == 10**18
        assert caught.value.data["free_bytes"] > 0
    assert entries(tmp_path) == []


def test_just_enough_room_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 10))
    with output_folder(tmp_path / "out", need_bytes=10):
        pass
    with pytest.raises(SurgeonError):
        output_folder(tmp_path / "other", need_bytes=11).__enter__()


def test_a_disk_that_fills_up_is_reported_as_such(tmp_path: Path) -> None:
    with pytest.raises(SurgeonError) as caught, output_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.code is Code.DISK_FULL
    assert entries(tmp_path) == []


def test_the_callers_own_trouble_is_not_called_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "out"):
        (tmp_path / "source" / "missing").read_text()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with output_folder(tmp_path / "link") as tmp:
        result(tmp, "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "data").read_text() == "new"


# --- what killed runs leave ------------------------------------------------------------------


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_a_dead_owners_leftovers_of_this_path_are_removed(tmp_path: Path) -> None:
    host = files._HOST
    dead, alive = gone(), os.getppid()
    leftover = tmp_path / f".out.partial-{host}-{dead}-01234567"
    beside = tmp_path / f"..out.partial-{host}-{dead}-01234567.8h9sz98_"
    kept = [
        f".out.partial-{host}-{alive}-01234567",
        f"..out.partial-{host}-{alive}-01234567.8h9sz98_",
        f"..out.partial-{host}-{dead}-01234567.a.b",
        f".out.partial-ffffffff-{dead}-01234567",
        f".other.partial-{host}-{dead}-01234567",
        f".out.partial-{host}-{dead}-mine",
    ]
    for path in (leftover, beside, *(tmp_path / name for name in kept)):
        path.mkdir()
        (path / "half").write_text("x")
    with output_folder(tmp_path / "out"):
        pass
    assert entries(tmp_path) == sorted([*kept, "out"])


def test_two_outputs_of_one_process_do_not_remove_each_other(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out", overwrite=True) as first:
        with output_folder(tmp_path / "out", overwrite=True) as second:
            assert first.exists() and second.exists()
            result(second, "second")
        result(first, "first")
    assert (tmp_path / "out" / "data").read_text() == "first"


def test_a_result_that_was_set_aside_comes_back(tmp_path: Path) -> None:
    aside = tmp_path / f".out.replaced-{files._HOST}-{gone()}-01234567"
    aside.mkdir()
    result(aside, "old")
    with pytest.raises(SurgeonError, match="earlier result"):
        output_folder(tmp_path / "out").__enter__()
    assert (tmp_path / "out" / "data").read_text() == "old"
    assert entries(tmp_path) == ["out"]


KILLED = """
    import sys, time, torch
    from surgeon.emit.files import output_folder
    from surgeon.emit.safetensors_file import TensorSpec, write_safetensors

    def load(i):
        if i == 5 and sys.argv[2] == "hang":
            print("writing", flush=True)
            time.sleep(600)
        return torch.full((256, 256), float(i))

    with output_folder(sys.argv[1], overwrite=True) as tmp:
        (tmp / "surgeon.json").write_text("{}")
        specs = [TensorSpec(f"t{i}", "f32", (256, 256), lambda i=i: load(i)) for i in range(9)]
        write_safetensors(tmp, specs, max_shard_bytes=600_000)
"""


def start(out: Path, how: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(out), how]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("earlier", [False, True])
def test_a_killed_run_leaves_the_old_result_or_none(tmp_path: Path, earlier: bool) -> None:
    out = tmp_path / "out"
    if earlier:
        with output_folder(out) as tmp:
            result(tmp, "old")
    process = start(out, "hang")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    partial = [p for p in tmp_path.iterdir() if ".partial-" in p.name]
    assert len(partial) == 1, "the run was killed while it wrote"
    assert list(partial[0].glob("*.safetensors")), "something was half written"
    assert entries(out) == ["data", "surgeon.json"] if earlier else not out.exists()

    assert start(out, "finish").wait() == 0
    assert entries(tmp_path) == ["out"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for i in range(9):
        shard = load_file(out / index["weight_map"][f"t{i}"])
        assert torch.equal(shard[f"t{i}"], torch.full((256, 256), float(i)))


# --- files -----------------------------------------------------------------------------------


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "graph.onnx"
    with output_file(out) as tmp:
        tmp.write_text("x")
        assert not out.exists()
    assert out.read_text() == "x"
    with pytest.raises(SurgeonError, match="exists") as caught, output_file(out):
        pytest.fail("entered")
    assert caught.value.code is Code.BAD_OUTPUT
    with pytest.raises(ZeroDivisionError), output_file(out, overwrite=True) as tmp:
        tmp.write_text("y")
        raise ZeroDivisionError
    assert out.read_text() == "x"
    with output_file(out, overwrite=True) as tmp:
        tmp.write_text("z")
    assert out.read_text() == "z"
    assert entries(out.parent) == ["graph.onnx"]


def test_a_folder_in_a_files_way_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match="it is a folder"):
        output_file(tmp_path, overwrite=True).__enter__()


# --- safetensors -----------------------------------------------------------------------------


def test_one_file_is_what_safetensors_itself_writes(tmp_path: Path) -> None:
    tensors = drawn()
    (path,) = write_safetensors(tmp_path, specs(tensors))
    assert path.name == "model.safetensors"
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    save_file(contiguous, tmp_path / "theirs", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("limit", [60_000, 15_000])
def test_shards_are_those_of_transformers(tmp_path: Path, tiny: Any, limit: int) -> None:
    model = tiny("Llama")
    # At the smaller limit some tensors are alone too large for a shard.
    assert (model.lm_head.weight.nbytes > limit) == (limit == 15_000)
    model.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    (tmp_path / "ours").mkdir()
    assert not model.config.tie_word_embeddings
    written = write_safetensors(tmp_path / "ours", specs(model.state_dict()), max_shard_bytes=limit)
    names = [p.name for p in (tmp_path / "theirs").iterdir() if p.name.startswith("model")]
    assert len(names) > 3
    assert sorted(p.name for p in written) == sorted(names)
    for name in names:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_from_pretrained_reads_the_shards(tmp_path: Path, tiny: Any) -> None:
    model = tiny("Gemma", tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    stored = {k: t for k, t in model.state_dict().items() if k != "lm_head.weight"}
    write_safetensors(tmp_path, specs(stored), max_shard_bytes=20_000)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_tensors_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    import gc
    import weakref

    living: list[weakref.ref[torch.Tensor]] = []

    def load() -> torch.Tensor:
        gc.collect()
        assert not [r for r in living if r() is not None], "an earlier tensor is still held"
        tensor = torch.zeros(4, 4)
        living.append(weakref.ref(tensor))
        return tensor

    write_safetensors(tmp_path, [TensorSpec(f"t{i}", "f32", (4, 4), load) for i in range(5)])
    assert len(living) == 5


def test_a_tensor_other_than_announced_is_refused(tmp_path: Path) -> None:
    for spec in (
        TensorSpec("w", "f32", (3,), lambda: torch.zeros(4)),
        TensorSpec("w", "f16", (4,), lambda: torch.zeros(4)),
    ):
        with pytest.raises(SurgeonError, match=r"made as f32 \[4\]") as caught:
            write_safetensors(tmp_path, [spec])
        assert caught.value.code is Code.PLAN_MISMATCH


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    spec = TensorSpec("w", "f32", (4,), lambda: torch.zeros(4))
    with pytest.raises(SurgeonError, match="twice"):
        write_safetensors(tmp_path, [spec, spec])
    assert entries(tmp_path) == []
