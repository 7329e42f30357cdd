"""Rounds with training and evaluation of the caller's own, and recovery of what was written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.errors import Code, SurgeonError
from surgeon.recovery.losses import label_loss
from tests import models
from tests.command import ROOT, checkpoint, weights_of
from tests.command import surgeon as command
from tests.recovering import DATA, TEXT
from tests.refusals import refused

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

IDS = torch.tensor(TEXT[:96]).reshape(6, 16)


def learn(model: Any, number: int) -> None:
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(4):
        label_loss(model(input_ids=IDS).logits, IDS).backward()
        adam.step()
        adam.zero_grad()


def evaluate(model: Any) -> float:
    with torch.no_grad():
        return math.exp(float(label_loss(model(input_ids=IDS).logits, IDS)))


def loop(**given: Any) -> Any:
    options = {"recipe": "fast", "ratio": 0.3, "rounds": 3, "eval_fn": evaluate, **given}
    return surgeon.prune_iteratively(models.tiny("Llama"), **options)


def rounds_of(made: Any) -> list[dict[str, Any]]:
    return [entry for entry in made.report.recipe if entry["pass"] == "round"]


def test_rounds_prune_train_and_evaluate_up_to_the_ratio() -> None:
    seen: list[tuple[int, int]] = []

    def train(model: Any, number: int) -> None:
        seen.append((number, sum(p.numel() for p in model.parameters())))
        learn(model, number)

    made = loop(train_fn=train, stop_if_worse_than=2.0)
    assert [number for number, _ in seen] == [1, 2, 3]
    assert seen[0][1] > seen[1][1] > seen[2][1]
    assert abs(made.report.ratio["removed"] - 0.3) < 0.01
    assert made.report.verification["largest"] <= 1e-4
    values = [r["effect"]["evaluation"] for r in rounds_of(made)]
    assert evaluate(made.model) == pytest.approx(values[-1], rel=1e-4)
    assert evaluate(made.model) < 0.2 * evaluate(models.tiny("Llama"))  # it was trained
    assert values == sorted(values, reverse=True)  # each went on from what the one before learnt


@pytest.mark.parametrize("threshold", [{"stop_above": 5.0}, {"stop_if_worse_than": 5 / 4}])
def test_the_last_good_model_is_kept(threshold: dict[str, float]) -> None:
    given = iter([4.0, 4.5, 4.9, 5.1] if "stop_if_worse_than" in threshold else [4.5, 4.9, 5.1])
    models_seen: list[dict[str, torch.Tensor]] = []

    def judged(model: Any) -> float:
        models_seen.append({n: t.clone() for n, t in model.state_dict().items()})
        return next(given)

    made = loop(train_fn=learn, eval_fn=judged, **threshold)
    assert abs(made.report.ratio["removed"] - 0.2) < 0.01
    assert len(rounds_of(made)) == 3 and "stopped before round 3" in made.report.notes[-1]
    good, state = models_seen[-2], made.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in good.items())


def test_a_first_round_that_is_no_good_is_refused() -> None:
    for value in (5.1, math.nan):
        with pytest.raises(SurgeonError) as caught:
            loop(eval_fn=lambda _, value=value: value, stop_above=5.0)
        assert caught.value.code is Code.BAD_RATIO and "5 is allowed" in caught.value.why


def test_finished_rounds_are_gone_on_from(tmp_path: Path) -> None:
    seen: list[int] = []

    def interrupted(model: Any, number: int) -> None:
        seen.append(number)
        if len(seen) == 3:
            raise KeyboardInterrupt
        learn(model, number)

    given = {"folder": tmp_path / "rounds", "stop_if_worse_than": 2.0, "train_fn": interrupted}
    with pytest.raises(KeyboardInterrupt):
        loop(**given)
    made = loop(**given)
    assert seen == [1, 2, 3, 3]
    whole = loop(**{**given, "folder": None, "train_fn": learn})
    assert made.plan == whole.plan
    assert all(torch.equal(made.rewrites[n], t) for n, t in whole.rewrites.items())


@pytest.mark.parametrize(
    ("given", "at"),
    [
        ({"stop_above": 1.0, "stop_if_worse_than": 1.2}, "stop_above with stop_if_worse_than"),
        ({"eval_fn": None, "stop_above": 1.0}, "stop_above"),
        ({}, "eval_fn"),
        ({"stop_if_worse_than": 0.9}, "schedule.stop_if_worse_than"),
        ({"stop_above": 1.0, "rounds": 0}, "schedule.rounds"),
        ({"eval_fn": lambda _: 0.0, "stop_if_worse_than": 1.2}, "eval_fn"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], at: str) -> None:
    with pytest.raises(SurgeonError) as caught:
        loop(**given)
    assert caught.value.code is Code.BAD_OPTION and caught.value.at == at


def test_adapters_that_are_left_in_the_model_are_refused() -> None:
    peft = pytest.importorskip("peft")

    def adapting(model: Any, number: int) -> None:
        peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))

    with pytest.raises(SurgeonError) as caught:
        loop(train_fn=adapting, stop_above=1e9)
    assert "merge adapters" in caught.value.try_


def test_recovery_in_each_round_of_a_recipe() -> None:
    recipe = {
        "version": 1,
        "budget": {"ratio": 0.3},
        "schedule": {"rounds": 2},
        "passes": [
            {"score": "magnitude"},
            {"select": "uniform"},
            {
                "compensate": "recover",
                "steps": 4,
                "length": 16,
                "rate": 1e-2,
                "distill": "hidden",
                "weight": 0.5,
            },
        ],
    }
    made = surgeon.prune(models.tiny("Llama"), recipe=recipe, calibration=DATA)
    assert made.report.verification is not None
    assert made.report.verification["largest"] <= 1e-4
    trainings = [e for e in made.report.recipe if e["pass"] == "compensate/recover"]
    assert len(trainings) == 2
    first, second = (t["effect"]["curve"] for t in trainings)
    assert second[0][1] < first[0][1]  # the second round goes on from what the first learnt


# --- what was written ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("recover")
    dense = checkpoint(base / "dense", models.tiny("Llama"), tiny_tokenizer)
    text = base / "text.txt"
    text.write_text("".join(f"{i} green bottles hang on the wall. " for i in range(60)))
    args = ("--recipe", "fast", "--role", "ffn=0.4", "--no-verify")
    assert command("prune", dense, "-o", base / "pruned", *args).code == 0
    return {"dense": dense, "text": text, "pruned": base / "pruned"}


OPTIONS = ("--steps", 4, "--length", 16, "--rate", 0.01)


def test_a_folder_is_recovered_into_another(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "better"
    found = command("recover", folders["pruned"], "-o", out, *OPTIONS, "--data", folders["text"])
    assert found.code == 0, found.err
    assert "verified" in found.out and "recover: 256 tokens in 4 steps" in found.out
    assert (out / "loss.svg").is_file() and not (tmp_path / "better.training").exists()
    assert command("verify", out).code == 0
    plans = [json.loads((f / "plan.json").read_text()) for f in (folders["pruned"], out)]
    assert plans[0]["cuts"] == plans[1]["cuts"] and len(plans[1]["rewrites"]) == 21
    report = json.loads((out / "surgeon.json").read_text())
    assert [step["pass"] for step in report["recipe"]] == [
        "score/magnitude",
        "select/uniform",
        "compensate/recover",
    ]
    # The recipe of both together makes the same again.
    assert command("recipe", out).out.count("compensate: recover") == 1
    made = surgeon.prune(folders["dense"], recipe=report["as_recipe"], verify=False)
    made.save(tmp_path / "again", verify=False)
    one, two = weights_of(out), weights_of(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_recovery_refuses_what_it_cannot_do(folders: dict[str, Path], tmp_path: Path) -> None:
    out, data = tmp_path / "better", ("--data", folders["text"])

    def run(*args: object) -> Any:
        found = command("recover", *args)
        assert not out.exists()
        return found

    refused(run(folders["dense"], "-o", out, *data), "missing-file", "plan")
    refused(run(folders["pruned"], "-o", out, *data, "--method", "x"), "bad-option", "method")
    refused(run(folders["pruned"], "-o", out, *data, "--option", "x=1"), "bad-option", "'x'")
    refused(run(folders["pruned"], "-o", out, "--data", "none.txt"), "missing-file", "none.txt")
    refused(run(folders["pruned"], "-o", folders["dense"], *data), "bad-output", "dense")
    moved = ("--source", tmp_path / "gone")
    refused(run(folders["pruned"], "-o", out, *data, *moved), "not-a-model", "gone")


def test_a_product_of_two_maps_is_not_trained() -> None:
    told = {"version": 1, "passes": [{"transform": "low_rank", "rank": 8, "by": "weights"}]}
    pruned = surgeon.prune(models.build("Llama"), recipe=told, verify=False)
    with pytest.raises(surgeon.SurgeonError, match="product of two maps"):
        surgeon.recover(pruned, steps=1)


def test_two_processes_learn_what_one_learns(folders: dict[str, Path], tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    given = [*OPTIONS, "--data", folders["text"], "--no-verify"]
    assert command("recover", folders["pruned"], "-o", outs[0], *given).code == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = ["-m", "surgeon.cli", "recover", folders["pruned"], "-o", outs[1], *given]
    ran = subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("256 tokens in 4 steps") == 1  # one process speaks and writes
    one, two = map(weights_of, outs)
    before = weights_of(folders["pruned"])
    for name, tensor in one.items():
        moved = float((tensor - before[name]).abs().max())
        assert moved > 1e-3
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=0.02 * moved)


def test_rounds_are_an_option_of_prune(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "o"
    args = ("prune", folders["dense"], "-o", out, "--recipe", "fast", "--ratio", "0.3")
    refused(command(*args, "--rounds", 0), "bad-option", "schedule.rounds")
    refused(command(*args, "--stop-if-worse-than", 1.5), "bad-option", "schedule.rounds")
    given = ("--rounds", 2, "--stop-if-worse-than", 1e6, "--calibration", folders["text"])
    small = ("--samples", 8, "--length", 16, "--no-verify")
    found = command(*args, *given, *small)
    assert found.code == 0, found.err
    report = json.loads((out / "surgeon.json").read_text())
    assert sum(step["pass"] == "round" for step in report["recipe"]) == 2
    assert report["as_recipe"]["schedule"] == {"rounds": 2, "stop_if_worse_than": 1e6}
