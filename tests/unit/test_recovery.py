"""Training of what is left: it learns, goes on, keeps zeros, and refuses what can't be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.errors import Code, SurgeonError
from surgeon.plugin import Plan
from surgeon.recovering import Ground
from surgeon.recovery import training
from surgeon.recovery.losses import hidden_loss, label_loss, logits_loss
from surgeon.registry import build
from tests import models
from tests.recovering import DATA, logits, options, origin, thinner, train, windows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def ground() -> Ground:
    """Two layers of different width, which a modelling file of its own expresses."""
    model = origin()
    cuts = (*thinner(model, 30, (0,)).cuts, *thinner(model, 50, (1,)).cuts)
    return Ground(model, Plan(cuts))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"method": "lora", "rate": 3e-2},
        {"method": "lora", "distill": "both", "dropout": 0.1, "rate": 3e-2, "weight": 0.5},
        {"distill": "hidden", "weight": 0.5, "checkpointing": True},
        {"accumulate": 2, "precision": "bf16"},
    ],
)
def test_a_text_is_learnt(ground: Ground, given: dict[str, Any]) -> None:
    if given.get("method") == "lora":
        pytest.importorskip("peft")
    found, small = train(ground, options(steps=12, **given))
    losses = [loss for _, loss in found.curve]
    assert [step for step, _ in found.curve] == list(range(1, 13))
    assert losses[-1] < 0.8 * losses[0]
    assert (found.steps, found.tokens, found.resumed) == (12, 12 * 4 * 16, 0)
    assert small.learnt(found.state)


def test_a_program_is_trained_like_a_class(ground: Ground) -> None:
    by_class, _ = train(ground, options())
    program = replace(ground, origin=replace(ground.origin, source=None))
    by_program, _ = train(program, options())
    for (_, own), (_, other) in zip(by_program.curve, by_class.curve, strict=True):
        assert own == pytest.approx(other, rel=1e-3)
    pytest.importorskip("peft")
    adapting, _ = train(program, options(method="lora", distill="hidden", weight=0.5))
    assert adapting.curve[-1][1] < adapting.curve[0][1]


@pytest.mark.parametrize("distill", ["none", "logits", "hidden"])
def test_the_first_loss_is_what_one_computes_by_hand(distill: str) -> None:
    model = origin()
    ground = Ground(model, Plan(branches=("model.layers.0/attention", "model.layers.0/mlp")))
    settings = options(steps=1, distill=distill, temperature=2.0)
    found, _ = train(ground, settings)
    ids = torch.stack(
        [
            torch.from_numpy(windows().window(int(i)))
            for i in training.Windows(windows(), 4, 0).order
        ]
    )
    small, dense = ground.small(), Ground(model).small()
    made: list[torch.Tensor] = []
    for path, one in (("model.layers.0", small), ("model.layers.1", dense)):
        module = one.model.get_submodule(path)
        module.register_forward_hook(
            lambda _, given, out: made.append(out[0] if isinstance(out, tuple) else out)
        )
    own, wanted = logits(small.model, ids), logits(dense.model, ids)
    expected = {
        "none": label_loss(own, ids),
        "logits": logits_loss(own, wanted, 2.0),
        # The layer that is left is the second, and is held against the teacher's second.
        "hidden": hidden_loss([made[0]], [made[1]], [None]),
    }[distill]
    assert found.curve[0][1] == pytest.approx(float(expected), rel=1e-4)


def test_the_teacher_is_only_read(ground: Ground) -> None:
    before = {n: t.clone() for n, t in models.tiny("Llama").state_dict().items()}
    train(ground, options(distill="both"))
    assert all(torch.equal(t, before[n]) for n, t in models.tiny("Llama").state_dict().items())


def test_zeros_stay_zero_where_asked_for(ground: Ground) -> None:
    down = "model.layers.0.mlp.down_proj.weight"
    pattern = ground.origin.read(down).clone()
    pattern[:, ::2] = 0
    sparse = replace(ground, rewrites={down: pattern})
    for keep in (True, False):
        found, small = train(sparse, options(keep_zeros=keep, decay=0.1))
        learnt = small.learnt(found.state)[down]
        assert bool((learnt[:, :30:2] == 0).all()) is keep
        assert bool((learnt[:, 1:30:2] != 0).all())
    with pytest.raises(SurgeonError) as caught:
        build("compensate", "recover", {"keep_zeros": True, "method": "lora"})
    assert caught.value.code is Code.BAD_OPTION and "every element" in caught.value.why


# --- interruptions -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_training_that_was_interrupted_goes_on_to_the_same_weights(
    ground: Ground, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    settings = options(method=method, save_every=2, dropout=0.2, distill="logits")
    whole, small = train(ground, settings)
    expected = small.learnt(whole.state)

    def stop(bar: Any, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.Bar, "at", stop)
        with pytest.raises(KeyboardInterrupt):
            train(ground, settings, tmp_path / "kept")
    again, small = train(ground, settings, tmp_path / "kept")
    assert again.resumed == 4 and again.curve == whole.curve
    learnt = small.learnt(again.state)
    assert learnt.keys() == expected.keys()
    assert all(torch.equal(learnt[name], tensor) for name, tensor in expected.items())


def test_another_training_begins_anew(tmp_path: Path) -> None:
    def run(**more: Any) -> dict[str, Any]:
        given = {"steps": 2, "length": 16, "checkpoints": str(tmp_path), "save_every": 1, **more}
        made = surgeon.prune(
            models.tiny("Llama"),
            recipe="fast",
            ratio=0.2,
            calibration=DATA,
            compensate=["recover"],
            compensate_options=given,
            verify=False,
        )
        return made.report.recipe[-1]["effect"]

    assert run()["resumed"] == 0
    assert run()["resumed"] == 2  # finished: nothing is left to do
    assert run(rate=1e-3)["resumed"] == 0


# --- the pass ------------------------------------------------------------------------------------


def test_what_is_learnt_is_a_compensation_like_any_other(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from surgeon.saving import read_plan

    given = {"steps": 4, "length": 16, "rate": 1e-2, "distill": "both"}
    made = surgeon.prune(
        models.tiny("Llama"),
        recipe={
            "version": 1,
            "budget": {"roles": {"ffn": 0.3, "hidden": 0.25}},
            "passes": [
                {"transform": "rotate_hidden"},
                {"score": "magnitude"},
                {"select": "uniform"},
                {"compensate": "recover", **given},
            ],
        },
        calibration=DATA,
    )
    assert made.report.verification is not None
    assert made.report.verification["largest"] <= 1e-4
    (entry,) = (e for e in made.report.recipe if e["pass"] == "compensate/recover")
    assert entry["effect"]["tokens"] == 256 and len(entry["effect"]["curve"]) == 4
    assert "256 tokens in 4 steps" in made.report.notes[-1]
    report = made.save(tmp_path / "o")
    assert report.verification is not None and report.verification["largest"] <= 1e-4
    assert "<polyline" in (tmp_path / "o" / "loss.svg").read_text()
    assert "loss by step" in (tmp_path / "o" / "report.html").read_text()
    ids = models.tokens(100, 2, 9)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    torch.testing.assert_close(logits(loaded, ids), logits(made.model, ids))
    plan, rewrites = read_plan(tmp_path / "o")
    again = surgeon.prune(models.tiny("Llama"), plan=plan, rewrites=rewrites)
    torch.testing.assert_close(logits(again.model, ids), logits(made.model, ids))


def refused(**given: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        train(Ground(origin(), thinner(origin())), options(**given))
    return caught.value


def test_settings_that_nothing_can_be_done_with_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert "a multiple of 3" in refused(accumulate=3).try_
    assert "one process" in refused(fsdp="fsdp.json").what
    assert refused(rate=1e30, steps=8).code is Code.RUNTIME_FAILED
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU" in refused(precision="fp16").what
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    error = refused(method="lora")
    assert error.code is Code.MISSING_EXTRA and "recover" in error.try_


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 0},
        {"length": 1},
        {"rate": float("nan")},
        {"weight": 1.5},
        {"dropout": 1.0},
        {"decay": -1},
        {"seed": -1},
        {"method": "half"},
        {"stepps": 3},
    ],
)
def test_options_that_mean_nothing_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SurgeonError) as caught:
        build("compensate", "recover", given)
    assert caught.value.code is Code.BAD_OPTION


def test_hidden_states_are_not_compared_across_bases() -> None:
    made = {
        "version": 1,
        "budget": {"ratio": 0.2},
        "schedule": {"rounds": 1},
        "passes": [
            {"transform": "rotate_hidden"},
            {"score": "magnitude"},
            {"select": "uniform"},
            {"compensate": "recover", "steps": 1, "length": 16, "distill": "hidden"},
        ],
    }
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(models.tiny("Llama"), recipe=made, calibration=DATA)
    assert caught.value.code is Code.BAD_OPTION and "basis" in caught.value.why


def test_there_has_to_be_a_text() -> None:
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(models.tiny("Llama"), recipe="fast", ratio=0.2, compensate=["recover"])
    assert caught.value.code is Code.BAD_OPTION and "needs a text" in caught.value.what
