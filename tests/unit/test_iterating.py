"""Schedules: rounds that come to one plan, watch quality, and go on after an interruption."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import surgeon
from surgeon import iterating
from surgeon.calibrate.data import Piece, Windows
from surgeon.calibrate.data import Recipe as Data
from surgeon.errors import Code, SurgeonError
from surgeon.iterating import Quality, State, joined, left_of, share
from surgeon.opening import Model, open_model
from surgeon.plugin import Plan, cut
from surgeon.recipes.schema import ScheduleKeys
from surgeon.runtime.lower import lower
from tests import models
from tests.command import checkpoint
from tests.command import surgeon as command
from tests.refusals import refused
from tests.slow_prune import kill_at

pytestmark = pytest.mark.slow

DATA = Data((Piece(list(np.random.default_rng(0).integers(3, 100, 400))),), 8, 16)
FFN = "model.layers.0.mlp/ffn"


@pytest.fixture(scope="module")
def llama() -> Model:
    return open_model(models.tiny("Llama"))


def recipe(rounds: int, *passes: dict[str, Any], **keys: Any) -> dict[str, Any]:
    schedule = {"rounds": rounds, **keys.pop("schedule", {})}
    steps = passes or ({"score": "magnitude"}, {"select": "uniform"})
    return {"version": 1, "schedule": schedule, "passes": list(steps), **keys}


WIDTH = ({"score": "obs"}, {"select": "uniform"}, {"compensate": "least_squares"})


def rounds_of(pruned: Any) -> list[dict[str, Any]]:
    return [entry for entry in pruned.report.recipe if entry["pass"] == "round"]


# --- one plan ------------------------------------------------------------------------------------


def test_how_much_is_gone_after_each_round() -> None:
    def gone(shape: Any) -> list[float]:
        return [share(ScheduleKeys(rounds=4, shape=shape), k) for k in range(5)]

    assert gone("linear") == [0, 0.25, 0.5, 0.75, 1]
    assert gone("cubic") == pytest.approx([0, 37 / 64, 56 / 64, 63 / 64, 1])


def test_rounds_come_to_the_ratio_and_to_one_plan(llama: Model) -> None:
    made = surgeon.prune(llama, recipe=recipe(3), ratio=0.4)
    assert abs(made.report.ratio["removed"] - 0.4) < 0.01
    assert made.report.verification is not None
    assert made.report.verification["largest"] <= 1e-4
    removed = [
        entry["effect"]["parameters"]
        for entry in made.report.recipe
        if entry["pass"] == "select/uniform"
    ]
    decoder = made.report.parameters["decoder"]
    assert len(removed) == len(rounds_of(made)) == 3
    assert sum(removed) == decoder["before"] - decoder["after"]
    assert max(removed) < 1.1 * min(removed)  # evenly
    # Weights that don't change are scored alike in every round: what goes is what goes at once.
    at_once = surgeon.prune(llama, ratio=0.4, verify=False)
    for name, found in at_once.plan.by_axis.items():
        fewer, more = sorted((found.kept, made.plan.by_axis[name].kept), key=len)
        assert set(fewer) <= set(more) and len(more) - len(fewer) <= 1


def test_shares_of_roles_are_met(llama: Model) -> None:
    roles = {"ffn": 0.5, "kv_heads": 1 / 3, "q_per_kv": 0.5, "hidden": 0.25, "layers": 0.5}
    made = surgeon.prune(llama, recipe=recipe(2), roles=roles)
    assert made.report.verification is not None
    assert made.report.verification["largest"] <= 1e-4
    after = {a["name"]: a["after"] for a in made.report.axes}
    left = next(n for n in range(2) if f"model.layers.{n}/mlp" not in made.plan.branches)
    assert len(made.plan.branches) == 2
    assert (after["hidden"], after[f"model.layers.{left}.mlp/ffn"]) == (36, 40)
    assert after[f"model.layers.{left}.self_attn/kv_heads"] == 2
    assert after[f"model.layers.{left}.self_attn/q_per_kv"] == 1


def test_what_each_round_mends_is_in_the_result(llama: Model) -> None:
    made = surgeon.prune(
        llama, recipe=recipe(2, *WIDTH), ratio=0.3, roles={"q_per_kv": 0.5}, calibration=DATA
    )
    assert made.rewrites and made.report.verification is not None
    assert made.report.verification["largest"] <= 1e-4
    once = surgeon.prune(
        llama,
        ratio=0.3,
        roles={"q_per_kv": 0.5},
        calibration=DATA,
        score="obs",
        compensate=["least_squares"],
        verify=False,
    )
    assert once.plan.cuts != made.plan.cuts  # the second round saw what the first left


def test_rewrites_of_what_is_left_are_told_in_full_size(llama: Model) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    kept = np.arange(3, 50)
    first = State(1, Plan((cut(llama.axes.get(FFN), kept),)))
    model = left_of(llama, first)
    assert tuple(model.read(down).shape) == (48, 47)
    torch.testing.assert_close(model.read(down), llama.read(down)[:, kept])
    new = torch.randn(48, 47)
    second = Plan((cut(model.axes.get(FFN), [0, 46]),))
    both = joined(llama, first, second, {down: new})
    assert both.plan.by_axis[FFN].kept == (3, 49)
    torch.testing.assert_close(both.rewrites[down][:, kept], new)
    torch.testing.assert_close(left_of(llama, both).read(down), new[:, [0, 46]])


# --- quality -------------------------------------------------------------------------------------


def test_quality_is_perplexity_over_that_of_the_dense_model(llama: Model) -> None:
    held = Windows(models.tokens(100, 3, 16).numpy())
    quality = Quality(llama, held, 1.2)
    assert quality.of(llama) == pytest.approx(1)
    state = State(1, Plan((cut(llama.axes.get(FFN), range(20)),)))

    def loss(model: Model) -> float:
        ids = torch.from_numpy(held.ids)
        forward = lower(model.program, model.read)
        with torch.no_grad():
            logits = forward(ids, torch.ones_like(ids), torch.arange(16)[None].expand(3, -1))
        rows = logits[:, :-1].reshape(-1, logits.shape[-1])
        return float(torch.nn.functional.cross_entropy(rows, ids[:, 1:].reshape(-1)))

    small = left_of(llama, state)
    assert quality.of(small) == pytest.approx(math.exp(loss(small) - loss(llama)), rel=1e-4)


def watched(rounds: int = 3) -> dict[str, Any]:
    return recipe(rounds, schedule={"stop_if_worse_than": 1.2})


def test_the_last_good_model_is_the_result(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([1.1, 1.19, 1.21])
    monkeypatch.setattr(Quality, "of", lambda *_: next(found))
    made = surgeon.prune(llama, recipe=watched(), ratio=0.3, calibration=DATA)
    assert abs(made.report.ratio["removed"] - 0.2) < 0.01
    assert [r["effect"]["relative"] for r in rounds_of(made)] == [1.1, 1.19, 1.21]
    assert "stopped before round 3" in made.report.notes[-1]
    two = surgeon.prune(llama, recipe=recipe(2), ratio=0.2, verify=False)
    assert made.plan.cuts == two.plan.cuts


def test_a_first_round_that_is_too_bad_is_refused(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    for relative in (1.3, math.nan):
        monkeypatch.setattr(Quality, "of", lambda *_, relative=relative: relative)
        with pytest.raises(SurgeonError) as caught:
            surgeon.prune(llama, recipe=watched(), ratio=0.3, calibration=DATA)
        assert caught.value.code is Code.BAD_RATIO and "1.2 is allowed" in caught.value.why


def test_quality_cannot_be_watched_without_a_text(llama: Model) -> None:
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(llama, recipe=watched(), ratio=0.3)
    assert caught.value.code is Code.BAD_OPTION and "stop_if_worse_than" in caught.value.what


def test_windows_held_out_are_seen_by_no_pass(llama: Model) -> None:
    seen, held = iterating._split(llama, Data(DATA.pieces, 16, 16), True, [])
    assert held is not None and (len(seen.ids), len(held.ids)) == (16, 2)
    rows = {row.tobytes() for row in seen.ids}
    assert not rows & {row.tobytes() for row in held.ids}
    assert iterating._split(llama, Data(DATA.pieces, 16, 16), False, [])[1] is None


# --- interruptions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama") / "m", models.tiny("Llama"), tiny_tokenizer)


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} green bottles hang on the wall. " for i in range(60)))
    calibration = {"sources": [str(text)], "samples": 4, "length": 16}
    data = recipe(3, *WIDTH, budget={"ratio": 0.3}, calibration=calibration)
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def same(one: Path, two: Path) -> bool:
    names = ("plan.json", "plan.safetensors", "model.safetensors")
    return all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_a_killed_run_goes_on_and_gives_what_a_whole_one_gives(
    folder: Path, file: Path, tmp_path: Path
) -> None:
    whole, out, rounds = (tmp_path / name for name in ("whole", "o", "o.rounds"))
    args = ("run", file, folder, "-o", out, "--no-verify")
    steps = kill_at(None, *args)
    assert not rounds.exists()
    out.rename(whole)
    begins = [i for i, name in enumerate(steps) if name == "begin"]
    assert len(begins) == 4  # three rounds, and the result
    # In the middle of writing the second round; then as the third begins.
    kill_at((begins[1] + begins[2]) // 2, *args)
    assert {p.name for p in rounds.iterdir() if p.name.startswith("round")} == {"round-1"}
    assert not out.exists()
    left = kill_at(1, *args)
    assert left[0] == "begin" and not (rounds / "round-3").exists()
    # A finished round is a model like any other.
    assert command("verify", rounds / "round-1").code == 0
    assert command(*args).code == 0
    assert same(out, whole) and not rounds.exists()
    report = json.loads((out / "surgeon.json").read_text())
    assert [r["options"]["round"] for r in report["recipe"] if r["pass"] == "round"] == [1, 2, 3]


def test_finished_rounds_are_not_done_again(
    folder: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = iterating.planned, []

    def until(stop: int) -> Any:
        def planned(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return planned

    args = {"recipe": file, "rounds": tmp_path / "rounds", "verify": False}
    monkeypatch.setattr(iterating, "planned", until(3))
    with pytest.raises(KeyboardInterrupt):
        surgeon.prune(folder, **args)
    assert len(calls) == 3
    monkeypatch.setattr(iterating, "planned", until(0))
    calls.clear()
    made = surgeon.prune(folder, **args)
    assert len(calls) == 1
    calls.clear()
    whole = surgeon.prune(folder, **{**args, "rounds": None})
    assert len(calls) == 3 and made.plan == whole.plan
    assert all(torch.equal(made.rewrites[n], t) for n, t in whole.rewrites.items())


def test_rounds_of_another_run_are_refused(folder: Path, file: Path, tmp_path: Path) -> None:
    rounds = tmp_path / "o.rounds"
    surgeon.prune(folder, recipe=file, rounds=rounds, verify=False)
    args = ("run", file, folder, "-o", tmp_path / "o", "--no-verify")
    refused(command(*args, "--ratio", "0.2"), "bad-output", "another recipe", "o.rounds")
    report = rounds / "round-3" / "surgeon.json"
    report.write_text("{}")
    refused(command(*args), "bad-output", "round-3 can't be read")
    shutil.rmtree(rounds / "round-3")
    assert command(*args).code == 0
