"""A run killed at any moment leaves the old result or none, and the next run works."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.command import ROOT, checkpoint, surgeon, weights_of

FILES = {"config.json", "model.safetensors", "plan.json", "surgeon.json", "tokenizer.json"}

# Everything is loaded before the first file is written, and each write is slowed down, so that
# kills spread over the writing of one small checkpoint as they would over that of a large one.
SLOW_PRUNE = """
import sys, time
from pathlib import Path
from surgeon.emit import files, huggingface
import surgeon.saving as saving
from surgeon.cli import main

def slowed(function):
    def run(*args, **kwargs):
        time.sleep(0.05)
        return function(*args, **kwargs)
    return run

huggingface.final = saving.hf.final = slowed(huggingface.final)
for name in ("_sync", "_swap", "_sync_tree"):
    setattr(files, name, slowed(getattr(files, name)))
Path.rename = slowed(Path.rename)
begin = files.output_folder

def announced(*args, **kwargs):
    print("writing", flush=True)
    return begin(*args, **kwargs)

saving.output_folder = announced
sys.argv[0] = "surgeon"
main()
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama") / "m", models.tiny("Llama"), tiny_tokenizer)


def start(*args: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SLOW_PRUNE, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def kill_while_writing(seconds: float, *args: object, sig: int = signal.SIGKILL) -> float:
    """Kills the run so long after it began to write; returns how long it wrote."""
    process = start(*args)
    assert process.stdout is not None
    try:
        while (line := process.stdout.readline()) != "writing\n":
            assert line, "it ended before it wrote"
        begin = time.monotonic()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(sig)
        process.wait(60)
        return time.monotonic() - begin
    finally:
        process.kill()
        process.stdout.close()


def complete(folder: Path) -> dict[str, Any]:
    """Asserts that a folder holds a whole result, by its own check; returns its report."""
    assert {p.name for p in folder.iterdir()} >= FILES
    report = json.loads((folder / "surgeon.json").read_text())
    assert (
        sum(t.numel() for t in weights_of(folder).values())
        == (report["parameters"]["total"]["after"])
    )
    return report


@pytest.mark.slow
def test_a_killed_run_leaves_all_or_nothing_and_the_next_one_works(
    llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    args = ("prune", llama, "-o", out, "--ratio", "0.2", "--no-verify")
    whole = kill_while_writing(60, *args)
    complete(out)
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    draw = random.Random(0)
    found = set()
    for step in range(6):
        kill_while_writing(whole * (step + draw.random()) / 6, *args)
        found.add(out.exists())
        if out.exists():
            complete(out)
            for file in out.iterdir():
                file.unlink()
            out.rmdir()
    assert False in found  # some were killed in time
    assert surgeon(*args).code == 0
    complete(out)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]  # what was left over is gone


@pytest.mark.slow
def test_a_killed_run_keeps_the_old_result(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    first = ("prune", llama, "-o", out, "--ratio", "0.1", "--no-verify")
    assert surgeon(*first).code == 0
    again = ("prune", llama, "-o", out, "--ratio", "0.3", "--no-verify", "--overwrite")
    whole = kill_while_writing(60, *again)
    assert complete(out)["ratio"]["asked"] == 0.3
    assert surgeon(*first, "--overwrite").code == 0
    draw = random.Random(1)
    old = 0
    for step in range(5):
        # The last moments, where one folder takes the other's place, matter most.
        kill_while_writing(whole * (1 - draw.random() ** (step + 1) * 0.9), *again)
        if not out.exists():  # killed between two renames: the next run brings it back
            assert surgeon(*first).err.startswith("[bad-output]")
        asked = complete(out)["ratio"]["asked"]
        assert asked in (0.1, 0.3)
        old += asked == 0.1
        assert surgeon(*first, "--overwrite").code == 0
    assert old > 0
    assert surgeon(*again).code == 0 and complete(out)["ratio"]["asked"] == 0.3
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.mark.slow
def test_an_interrupted_run_cleans_up(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    args = ("prune", llama, "-o", out, "--ratio", "0.2", "--no-verify")
    kill_while_writing(0.3, *args, sig=signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_verification_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgeon.emit import huggingface

    # The stored tensor is wrong by a little: what is read back is compared before the rename.
    write = huggingface.write

    def wrong(folder: Path, *args: Any, **kwargs: Any) -> None:
        from safetensors.torch import load_file, save_file

        write(folder, *args, **kwargs)
        state = load_file(folder / "model.safetensors")
        state["model.norm.weight"][0] += 1e-3
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(huggingface, "write", wrong)
    found = surgeon("prune", llama, "-o", tmp_path / "o", "--ratio", "0.2")
    assert found.code == 1 and found.err.startswith("[verify-failed] model.norm.weight")
    assert list(tmp_path.iterdir()) == []
