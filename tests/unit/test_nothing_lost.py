"""What the system refuses is said in four parts; what a killed run leaves goes with the next."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from surgeon import cli
from surgeon.emit import files, scratch
from surgeon.errors import Code, SurgeonError, refused_by_system
from surgeon.saving import read_plan
from tests.command import ROOT
from tests.faults import COMMANDS

# --- scratch -------------------------------------------------------------------------------------


def dead() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_scratch_folder_is_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt), scratch.scratch() as folder:
        (folder / "x").touch()
        assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_is_swept_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    name = "surgeon-scratch-{}-{}-0123abcd"
    gone, alive = name.format(files._HOST, dead()), name.format(files._HOST, os.getppid())
    elsewhere, other = name.format("00000000", dead()), "surgeon-scratch-mine"
    for folder in (gone, alive, elsewhere, other):
        (tmp_path / folder).mkdir()
    with scratch.scratch() as one, scratch.scratch() as two:
        assert one.is_dir() and two.is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {alive, elsewhere, other}


# --- the system's refusals -----------------------------------------------------------------------


def test_a_file_that_may_not_grow_is_a_disk_that_is_full(tmp_path: Path) -> None:
    """As a full disk: `ulimit -f` refuses any write beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SurgeonError) as caught, files.output_folder(tmp_path / "o") as folder:
            (folder / "x").write_bytes(bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code is Code.DISK_FULL and "too large" in caught.value.why
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting takes root")
def test_a_disk_that_runs_full_leaves_the_old_result(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system doesn't let root mount a tmpfs")
    try:
        out = disk / "o"
        with files.output_folder(out) as folder:
            (folder / files.MARKER).write_text("old")
        with (
            pytest.raises(SurgeonError) as caught,
            files.output_folder(out, overwrite=True) as folder,
        ):
            (folder / "x").write_bytes(bytes(100_000))
        assert caught.value.code is Code.DISK_FULL
        assert [p.name for p in disk.iterdir()] == ["o"]
        assert (out / files.MARKER).read_text() == "old"
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_links_in_a_circle_are_no_place_to_write(tmp_path: Path) -> None:
    (tmp_path / "o").symlink_to("o")
    for check in (files.check_output, files.check_output_file):
        with pytest.raises(SurgeonError) as caught:
            check(tmp_path / "o")
        assert caught.value.code is Code.BAD_OUTPUT
    with pytest.raises(SurgeonError) as caught:
        files.check_output("a\0b")
    assert caught.value.code is Code.BAD_OUTPUT


@pytest.mark.parametrize("name", ["a b", "größe", "模型", "-o", "$(x)", "a'b\"c", "new\nline"])
def test_any_name_is_a_place_to_write(tmp_path: Path, name: str) -> None:
    for _ in range(2):
        with files.output_folder(tmp_path / name, overwrite=True) as folder:
            (folder / files.MARKER).touch()
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "disk-full", "/tmp/x"),
        (OSError(errno.EIO, "Input/output error"), "missing-file", "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied", b"y"), "missing-file", "  at  y\n"),
    ],
)
def test_what_nothing_else_tells_of_has_four_parts(
    error: OSError,
    code: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def app() -> None:
        raise error

    monkeypatch.setattr(cli, "app", app)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith(f"[{code}] ") and said in told and told.count("\n") == 4
    assert told == f"{refused_by_system(error)}\n"


# --- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"nothing of the kind", bytes(8) + b"{}"])
def test_damaged_rewrites_are_refused(tmp_path: Path, data: bytes) -> None:
    plan = '{"version": 1, "source": {}, "branches": [], "rewrites": ["w"], "cuts": []}'
    (tmp_path / "plan.json").write_text(plan)
    (tmp_path / "plan.safetensors").write_bytes(data)
    with pytest.raises(SurgeonError) as caught:
        read_plan(tmp_path)
    assert caught.value.code is Code.BAD_CHECKPOINT


def test_rewrites_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    plan = '{"version": 1, "source": {}, "branches": [], "rewrites": ["w"], "cuts": []}'
    (tmp_path / "plan.json").write_text(plan)
    save_file({"v": torch.ones(1)}, tmp_path / "plan.safetensors")
    with pytest.raises(SurgeonError) as caught:
        read_plan(tmp_path)
    assert caught.value.code is Code.BAD_PLAN and "w" in caught.value.why


# --- faults --------------------------------------------------------------------------------------


def test_every_command_that_writes_is_killed_too() -> None:
    """`tools/faults` knows them all; `demo` writes by the same functions as the others."""
    writes = {"--output", "--markdown", "--html"}
    app: object = typer.main.get_command(cli.app)
    commands = {
        name
        for name, command in getattr(app, "commands").items()  # noqa: B009
        if writes & {option for parameter in command.params for option in parameter.opts}
    }
    assert commands - {"demo"} == {arguments[0] for arguments in COMMANDS.values()}


@pytest.mark.slow
def test_killed_commands_leave_the_old_result_the_new_one_or_none() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "tests.faults", "--kills", "6", "--only", "calibrate,graph"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "| all | 6 |" in found.stdout
