"""Comparisons of speed: what is run, in which order, and what comes out. Nothing is timed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from surgeon.errors import Code, SurgeonError
from surgeon.report.bench_table import bench_table
from surgeon.runtime import Decoder, bench
from surgeon.runtime.bench import Comparison, Measured, Settings, compare
from surgeon.runtime.bench_worker import measure, prompt_of, runner_of
from tests.command import ROOT, python, surgeon
from tests.decoders import LONGEST, Tiny, write

TINY = Tiny()
SMALL = Settings(prompt_tokens=5, new_tokens=4, batch=2, repeat=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("bench") / "model.onnx", TINY).parent


def refused(code: Code, call, *args, **options) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        call(*args, **options)
    assert caught.value.code is code
    return caught.value


def test_a_decoder_really_writes(folder):
    model = Decoder(folder, device="cpu", threads=1)
    ids, runner = prompt_of(model, SMALL), runner_of(model, SMALL)
    assert ids.shape == (2, 5) and ids.max() < TINY.vocab and len(np.unique(ids)) > 5
    for _ in range(2):  # a turn leaves nothing behind for the next
        found = measure(runner, ids, SMALL.new_tokens)
        assert set(found) == {"prefill", "decode"} and min(found.values()) > 0
        for row in range(2):
            assert runner._next[row] == TINY.greedy(ids[row].tolist(), 5)[-1]
    assert runner.kind == "ONNX Runtime, ort, fp32"


def test_a_transformers_model_really_writes(tiny):
    model = tiny("Llama")
    ids, runner = prompt_of(model, SMALL), runner_of(model, SMALL)
    measure(runner, ids, SMALL.new_tokens)
    text = torch.from_numpy(ids)
    for _ in range(5):
        with torch.no_grad():
            text = torch.cat([text, model(text).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(runner._next, text[:, -1:])
    assert runner.kind == "Transformers, float32" and runner.device == "cpu"


def test_a_function_really_writes():
    def model(ids: np.ndarray) -> np.ndarray:
        return np.eye(101, dtype=np.float32)[(ids + 1) % 101]

    ids, runner = prompt_of(model, SMALL), runner_of(model, SMALL)
    measure(runner, ids, SMALL.new_tokens)
    assert np.array_equal(runner._ids[:, 4:], (ids[:, -1:] + np.arange(6)) % 101)


def test_more_tokens_than_positions_are_refused(folder):
    model = Decoder(folder, device="cpu")
    runner_of(model, Settings(prompt_tokens=LONGEST - 1, new_tokens=1))
    error = refused(
        Code.BAD_OPTION, runner_of, model, Settings(prompt_tokens=LONGEST, new_tokens=1)
    )
    assert f"{LONGEST} positions" in error.why


@pytest.mark.parametrize("name", ["prompt_tokens", "new_tokens", "batch", "repeat"])
def test_settings_that_measure_nothing_are_refused(name):
    assert name.replace("_", "-") in refused(Code.BAD_OPTION, Settings, **{name: 0}).at


def test_the_peak_of_memory_is_what_was_held_at_once():
    code = """
from surgeon.runtime.bench_worker import peak_bytes
import numpy as np
before = peak_bytes()
np.ones(25_000_000)
print(before, peak_bytes())
"""
    found = python(code, path=ROOT)
    if "None" in found.out:
        pytest.skip("this system doesn't say")
    before, after = map(int, found.out.split())
    assert before > 10e6 and 190e6 < after - before < 220e6


class Fake:
    """A worker that notes what it was told."""

    log: list[tuple[str, str]] = []  # noqa: RUF012

    def __init__(self, model, load, arguments, settings) -> None:
        self.model = model

    def start(self) -> None:
        self.log.append((self.model, "start"))

    def turn(self, *, counts: bool) -> None:
        if self.model == "bad":
            raise SurgeonError(Code.RUNTIME_FAILED, "no", at="", why="", try_="")
        self.log.append((self.model, f"turn {counts}"))

    def result(self) -> Measured:
        speed = {"a": 10.0, "b": 25.0}[self.model]
        peak = {"a": 2 * 2**20, "b": None}[self.model]
        return Measured(self.model, "fake", "cpu", "", (1.0,), (1.0,), peak, 2 * speed, speed)

    def close(self) -> None:
        self.log.append((self.model, "close"))


def test_models_take_turns_after_one_that_does_not_count(monkeypatch):
    monkeypatch.setattr(bench, "Worker", Fake)
    monkeypatch.setattr(Fake, "log", [])
    found = compare(["a", "b"], "", settings=Settings(repeat=2))
    assert Fake.log == [
        ("a", "start"),
        ("b", "start"),
        ("a", "turn False"),
        ("b", "turn False"),
        *[(name, "turn True") for name in "abab"],
        ("b", "close"),
        ("a", "close"),
    ]
    assert (found.ratio(0, "decode"), found.ratio(1, "decode")) == (1.0, 2.5)
    assert found.ratio(0, "peak_bytes") == 1.0 and found.ratio(1, "peak_bytes") is None
    shown = json.loads(json.dumps(found.to_json()))
    assert shown["models"][1]["ratio"] == {"prefill": 2.5, "decode": 2.5, "peak_bytes": None}
    assert shown["settings"]["repeat"] == 2


def test_processes_end_when_one_of_them_fails(monkeypatch):
    monkeypatch.setattr(bench, "Worker", Fake)
    monkeypatch.setattr(Fake, "log", [])
    refused(Code.RUNTIME_FAILED, compare, ["a", "bad"], "")
    assert [what for _, what in Fake.log if what == "close"] == ["close"] * 2


def test_the_table_has_every_figure_with_its_ratio():
    from rich.console import Console

    models = tuple(
        Measured(
            name, "ONNX Runtime, ort, fp32", "cpu", "", (1.0,), (1.0,), peak, 20.0 * s, 4.0 * s
        )
        for name, peak, s in (("one", 2**30, 1.0), ("two", None, 1.5))
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(bench_table(Comparison(SMALL, models)))
    shown = console.export_text()
    for part in ("2 × 5 tokens", "one", "two", "×1.50", "1.0 GiB", "–", "20", "30", "6"):
        assert part in shown


@pytest.mark.slow
def test_a_process_of_its_own(folder):
    load, arguments = "tests.decoders:load_to_bench", {"folder": str(folder)}
    found = compare(["fine"], load, arguments, SMALL)
    (model,) = found.models
    assert len(model.prefill_seconds) == len(model.decode_seconds) == 3
    assert model.prefill == pytest.approx(10 / sorted(model.prefill_seconds)[1])
    assert model.decode == pytest.approx(8 / sorted(model.decode_seconds)[1])
    assert model.peak_bytes is None or model.peak_bytes > 10e6
    assert (model.device, model.note) == ("cpu", "asked for")
    error = refused(Code.BAD_TEXT_INPUT, compare, ["refused"], load, arguments, SMALL)
    assert (error.what, error.at, error.why, error.try_) == ("what", "at", "why", "try")
    error = refused(Code.RUNTIME_FAILED, compare, ["dies"], load, arguments, SMALL)
    assert "exit code 3" in error.why


@pytest.mark.slow
def test_the_command(folder):
    small = ["--prompt-tokens", 5, "--new-tokens", 4, "--repeat", 1, "--threads", 1]
    found = surgeon("bench", folder, folder / "model.onnx", *small, "--device", "cpu", "--json")
    assert found.code == 0, found.err
    data = json.loads(found.out)
    assert [m["model"] for m in data["models"]] == [str(folder), str(folder / "model.onnx")]
    assert data["settings"]["prompt_tokens"] == 5
    assert surgeon("bench", folder, "--batch", 0).err.startswith("[bad-option]")
    assert surgeon("bench", folder, *small, "--device", "tpu").err.startswith("[bad-option]")
    assert surgeon("bench", folder / "none.onnx", *small).err.startswith("[missing-file]")
