"""A run killed at any moment leaves the old result or none, and the next run works."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.command import surgeon, weights_of
from tests.slow_prune import kill_at

FILES = {"config.json", "model.safetensors", "plan.json", "surgeon.json", "tokenizer.json"}


def complete(folder: Path) -> dict[str, Any]:
    """Asserts that a folder holds a whole result, by its own check; returns its report."""
    assert {p.name for p in folder.iterdir()} >= FILES
    report = json.loads((folder / "surgeon.json").read_text())
    assert (
        sum(t.numel() for t in weights_of(folder).values())
        == (report["parameters"]["total"]["after"])
    )
    return report


def spread(steps: list[str], count: int) -> list[int]:
    """Returns some steps from the first to the last, and all around the final rename."""
    last = [i for i, name in enumerate(steps) if "rename" in name or "_swap" in name]
    return sorted({*(i * (len(steps) - 1) // (count - 1) for i in range(count)), *last})


@pytest.mark.slow
def test_a_killed_run_leaves_all_or_nothing_and_the_next_one_works(
    llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    args = ("prune", llama, "-o", out, "--ratio", "0.2", "--no-verify")
    steps = kill_at(None, *args)
    complete(out)
    shutil.rmtree(out)
    found: list[bool] = []
    for number in spread(steps, 8):
        assert kill_at(number, *args) == steps[: number + 1]
        found.append(out.exists())
        if out.exists():
            complete(out)
            shutil.rmtree(out)
    assert found == sorted(found) and set(found) == {False, True}  # first none, then all of it
    assert surgeon(*args).code == 0
    complete(out)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]  # what was left over is gone


@pytest.mark.slow
def test_a_killed_run_keeps_the_old_result(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    first = ("prune", llama, "-o", out, "--ratio", "0.1", "--no-verify")
    assert surgeon(*first).code == 0
    again = ("prune", llama, "-o", out, "--ratio", "0.2", "--no-verify", "--overwrite")
    steps = kill_at(None, *again)
    assert complete(out)["ratio"]["asked"] == 0.2
    assert surgeon(*first, "--overwrite").code == 0
    found: list[float] = []
    between = 0
    for number in spread(steps, 5):
        kill_at(number, *again)
        if not out.exists():  # killed between two renames: the next run brings it back
            between += 1
            assert surgeon(*first).err.startswith("[bad-output]")
        found.append(complete(out)["ratio"]["asked"])
        if found[-1] != 0.1:
            assert surgeon(*first, "--overwrite").code == 0
    assert between and found == sorted(found) and set(found) == {0.1, 0.2}
    assert surgeon(*again).code == 0 and complete(out)["ratio"]["asked"] == 0.2
    assert [p.name for p in tmp_path.iterdir()] == ["o"]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.3, 0.8])
def test_an_interrupted_run_cleans_up(llama: Path, tmp_path: Path, share: float) -> None:
    args = ("prune", llama, "-o", tmp_path / "o", "--ratio", "0.2", "--no-verify")
    steps = kill_at(None, *args)
    shutil.rmtree(tmp_path / "o")
    before = steps.index("before _swap")
    kill_at(round(share * before), *args, sig=signal.SIGINT)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_verification_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgeon.emit import hf_writing

    # The stored tensor is wrong by a little: what is read back is compared before the rename.
    write = hf_writing.write

    def wrong(folder: Path, *args: Any, **kwargs: Any) -> None:
        from safetensors.torch import load_file, save_file

        write(folder, *args, **kwargs)
        state = load_file(folder / "model.safetensors")
        state["model.norm.weight"][0] += 1e-3
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(hf_writing, "write", wrong)
    found = surgeon("prune", llama, "-o", tmp_path / "o", "--ratio", "0.2")
    assert found.code == 1 and found.err.startswith("[verify-failed] model.norm.weight")
    assert list(tmp_path.iterdir()) == []
