"""Statistics in a file: what was gathered is what is read, of the right model, or a refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from surgeon.axes.contractions import contractions
from surgeon.axes.plan import Plan
from surgeon.calibrate.data import Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.calibrate.stored import STATISTICS, Stored, load, save
from surgeon.errors import Code, SurgeonError
from surgeon.opening import Model, open_model
from surgeon.plugin import Calibration, Context
from tests import models
from tests.command import checkpoint, surgeon

pytestmark = pytest.mark.slow

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama() -> Model:
    return open_model(models.tiny("Llama"))


@pytest.fixture(scope="module")
def data(llama: Model) -> Gathered:
    return Gathered(llama.axes, llama.read, Windows(models.tokens(100, 4, 12).numpy()))


@pytest.fixture(scope="module")
def file(llama: Model, data: Gathered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "stats.safetensors"
    about = {"fingerprint": llama.fingerprint(), "model": "tiny", "seed": 0}
    counts = save(path, data, STATISTICS, about)
    assert counts["similarity"] == 6 and counts["moments"] == counts["fisher"] == 15
    return path


def refused(code: Code, call: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        call()
    assert caught.value.code is code and caught.value.try_
    return caught.value


def test_every_statistic_comes_back_as_it_was(llama: Model, data: Gathered, file: Path) -> None:
    stored: Calibration = load(file, fingerprint=llama.fingerprint())
    maps = [c.param for c in contractions(llama.program)]
    trained = [p.name for p in llama.program.params if p.kind == "parameter"]
    for kind, names in (("moments", maps), ("gradients", trained), ("fisher", maps)):
        found, expected = getattr(stored, kind)(names), getattr(data, kind)(names)
        for name in names:
            for part, value in vars(expected[name]).items():
                got = getattr(found[name], part)
                same = torch.equal(got, value) if torch.is_tensor(value) else got == value
                assert same, (kind, name, part)
    branches = [b.name for b in llama.axes.branches]
    assert stored.similarity(branches) == data.similarity(branches)
    assert stored.moments([DOWN], full=False)[DOWN].second is None


def test_maps_that_read_one_value_share_its_tensors(
    llama: Model, data: Gathered, file: Path
) -> None:
    values = {c.value for c in contractions(llama.program)}
    seconds = [name for name in load_file(file) if name.startswith("moments/") and "second" in name]
    assert len(seconds) == len(values)


def test_a_pass_takes_them_as_it_takes_data(llama: Model, data: Gathered, file: Path) -> None:
    from passes.score.fisher import Fisher

    target = ("model.layers.0.mlp/ffn", "model.layers.1.self_attn/kv_heads")
    one, two = (
        Fisher().score(Context(llama.axes, llama.read, target, calibration=c))
        for c in (data, load(file))
    )
    for name in target:
        assert np.array_equal(one[name], two[name])


def test_what_is_not_held_is_refused(llama: Model, data: Gathered, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save(path, data, ("norms",), {"fingerprint": "x"})
    stored = load(path)
    assert stored.moments([DOWN], full=False)[DOWN].count == 48
    assert (
        "--statistics norms,moments"
        in refused(Code.BAD_OPTION, lambda: stored.moments([DOWN])).try_
    )
    refused(Code.BAD_OPTION, lambda: stored.gradients([DOWN]))
    refused(Code.BAD_OPTION, lambda: stored.similarity(["model.layers.0"]))
    refused(Code.BAD_OPTION, lambda: stored.moments(["nothing"], full=False))
    refused(Code.BAD_OPTION, lambda: stored.loss(Plan()))
    refused(Code.BAD_OPTION, lambda: stored.sequential(Plan(), [DOWN], lambda n, p: None))
    assert stored.with_rewrites({DOWN: torch.zeros(1)}, dense=False) is stored
    refused(Code.BAD_OPTION, lambda: stored.with_rewrites({DOWN: torch.zeros(1)}, dense=True))


def test_those_of_another_model_are_refused(file: Path) -> None:
    other = open_model(models.build("Llama", seed=1))
    error = refused(Code.PLAN_MISMATCH, lambda: load(file, fingerprint=other.fingerprint()))
    assert "tiny" in error.why and error.data["found"] == other.fingerprint()


def test_files_that_are_something_else_or_damaged(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    refused(Code.MISSING_FILE, lambda: load(path))
    refused(Code.MISSING_FILE, lambda: load(tmp_path))
    whole = file.read_bytes()
    for content in (b"", b"nonsense" * 20, whole[: len(whole) // 2], whole[:100]):
        path.write_bytes(content)
        refused(Code.BAD_CHECKPOINT, lambda: load(path))
    save_file({"a": torch.zeros(2)}, path)
    assert "something else" in refused(Code.BAD_CHECKPOINT, lambda: load(path)).why
    for header in ("{", "[]", '{"format": 1}', '{"format": 9, "statistics": {}}'):
        save_file({"a": torch.zeros(2)}, path, metadata={"surgeon.statistics": header})
        refused(Code.BAD_CHECKPOINT, lambda: load(path))
    index = {"fisher": {"w": {"count": 1, "second": "gone"}}}
    text = json.dumps({"format": 1, "statistics": index})
    save_file({"a": torch.zeros(2)}, path, metadata={"surgeon.statistics": text})
    assert "gone" in refused(Code.BAD_CHECKPOINT, lambda: load(path)).why


def test_an_interrupted_write_leaves_what_was_there(
    data: Gathered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.safetensors"
    save(path, data, ("similarity",), {"seed": 1})

    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgeon.emit.safetensors_file.write_safetensors_file", stop)
    with pytest.raises(KeyboardInterrupt):
        save(path, data, ("similarity",), {"seed": 2}, overwrite=True)
    assert load(path).about["seed"] == 1 and [p.name for p in tmp_path.iterdir()] == [path.name]


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_what_can_be_read_and_says_what_it_did(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    folder = checkpoint(tmp_path / "m", models.tiny("Llama"), tiny_tokenizer)
    text, out = tmp_path / "a.txt", tmp_path / "stats.safetensors"
    text.write_text("The heart is a muscle that pumps blood. " * 20)
    options = ("--calibration", text, "--samples", 3, "--length", 20, "--seed", 5)
    asked = ("--statistics", "norms,similarity", "--offload", tmp_path / "states")
    found = surgeon("calibrate", folder, "-o", out, *options, *asked)
    assert found.code == 0, found.err
    assert "norms of 15, similarity of 6 (3 windows of 20 tokens)" in found.out
    stored = load(out, fingerprint=open_model(str(folder)).fingerprint())
    assert isinstance(stored, Stored) and stored.about["seed"] == 5
    assert stored.about["data"] == {str(text): [3, 800]}
    assert {"model-surgeon", "torch"} <= stored.about["versions"].keys()
    assert stored.moments([DOWN], full=False)[DOWN].count == 60
    again = surgeon("calibrate", folder, "-o", out, *options)
    assert again.code == 1 and "[bad-output]" in again.err
    wrong = surgeon("calibrate", folder, "-o", out, "--statistics", "moment", "--overwrite")
    assert wrong.code == 1 and "did you mean moments" in wrong.err
    short = surgeon("calibrate", folder, "-o", out, *options[:4], "--length", 900, "--overwrite")
    assert short.code == 1 and "[bad-text-input]" in short.err
    text.write_text("")
    empty = surgeon("calibrate", folder, "-o", out, *options, "--overwrite")
    assert empty.code == 1 and "empty" in empty.err
    assert load(out).about["seed"] == 5


def test_the_command_without_a_text_warns(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = checkpoint(tmp_path / "m", models.tiny("Llama"), tiny_tokenizer)
    out = tmp_path / "stats.safetensors"
    numbers = ("--samples", 2, "--length", 8, "--statistics", "moments", "--json")
    found = surgeon("calibrate", folder, "-o", out, *numbers)
    assert found.code == 0, found.err
    notes = json.loads(found.out)["notes"]
    assert len(notes) == 2 and "no calibration data" in notes[0] and "too few" in notes[1]
