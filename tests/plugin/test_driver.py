"""What the driver promises passes, and what it holds them to: with passes of another package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgeon
from surgeon.calibrate.data import Piece
from surgeon.calibrate.data import Recipe as Data
from surgeon.effects import of_plan
from surgeon.errors import Code, SurgeonError
from surgeon.opening import Model, open_model
from surgeon.plugin import Plan, cut
from surgeon.saving import read_plan
from tests import models
from tests.plugin.conftest import Install

pytestmark = pytest.mark.slow

FFN = "model.layers.0.mlp/ffn"
DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"

TIMES = '''
"""Multiplies one parameter, as it is now."""
from dataclasses import dataclass
from surgeon.plugin import KIND

@dataclass(frozen=True)
class Times(KIND):
    """A factor."""
    needs = frozenset({"weights"})
    param: str
    by: float = 2.0
    bad: str = ""

    def CALL:
        import torch
        context.notes.append(f"{self.param} times {self.by:g}")
        if self.bad == "name":
            return {"nothing.weight": torch.zeros(1)}
        if self.bad == "shape":
            return {self.param: torch.zeros(2, 2)}
        if self.bad == "nan":
            return {self.param: context.weights(self.param) * float("nan")}
        if self.bad == "integers":
            return {self.param: context.weights(self.param).long()}
        if self.bad == "list":
            return [self.param]
        if self.bad == "write":
            return {self.param: context.weights(self.param).mul_(0.5)}
        return {self.param: context.weights(self.param) * self.by}
'''

SEEN = '''
"""Scores MLP channels by the first row or column of one parameter."""
from dataclasses import dataclass
import numpy as np
from surgeon.plugin import ScorePass

@dataclass(frozen=True)
class Seen(ScorePass):
    """A parameter's own numbers."""
    param: str = "model.layers.0.mlp.down_proj.weight"
    bad: str = ""

    def score(self, context):
        column = context.weights(self.param)[0].double().numpy()
        out = {}
        for name in context.targets:
            axis = context.axes.by_name.get(name)
            size = () if axis is None else (axis.size,)
            out[name] = np.resize(column, size)
            if self.bad == "nan":
                out[name] = out[name] * np.nan
            if self.bad == "shape":
                out[name] = out[name][:1]
        return {} if self.bad == "none" else [1] if self.bad == "list" else out
'''

TAKE = '''
"""Takes the lowest of one axis, or does wrong."""
from dataclasses import dataclass, replace
import numpy as np
from surgeon.plugin import Cut, Plan, SelectPass, cut

@dataclass(frozen=True)
class Take(SelectPass):
    """The lowest."""
    axis: str
    kept: int = 8
    bad: str = ""

    def select(self, context, scores, budget):
        axis = context.axes.get(self.axis)
        found = scores([self.axis])[self.axis]
        one = cut(axis, np.argsort(-found, kind="stable")[: self.kept])
        if self.bad == "none":
            return None
        if self.bad == "rewrites":
            return Plan((one,), rewrites=(context.program.params[0].name,))
        if self.bad == "twice":
            return Plan((one, one))
        if self.bad == "order":
            return Plan((replace(one, kept=one.kept[::-1]),))
        if self.bad == "ragged":
            kept = ((0, 1), (0, 1, 2))
            return Plan((replace(one, kept=kept, outer=axis.outer[:1] or ("x",)),))
        if self.bad == "branch":
            return Plan((), (context.axes.branches[0].name,))
        return Plan((one,))
'''


LOOK = '''
"""Notes the size of what a parameter reads: in the pruned model, and beside the dense one's."""
from dataclasses import dataclass
from surgeon.plugin import CompensatePass

@dataclass(frozen=True)
class Look(CompensatePass):
    """Nothing is replaced."""
    needs = frozenset({"activations: sequential", "activations: norms"})
    param: str

    def compensate(self, context, plan):
        dense = context.norms([self.param])[self.param].square.sum()
        def solve(param, pair):
            found = (dense, pair.pruned.trace(), pair.cross.trace())
            context.notes.append(" ".join(f"{float(number):.6e}" for number in found))
            return context.weights(param)
        context.sequential(plan, [self.param], solve)
        return {}
'''


SEE = LOOK.replace("Look", "See").replace("CompensatePass", "TransformPass")
SEE = SEE.replace("compensate(self, context, plan)", "transform(self, context)")
SEE = SEE.replace("context.sequential(plan", "context.sequential(context.plan")

SAME = '''
"""Says that it changes nothing."""
from dataclasses import dataclass
from surgeon.plugin import TransformPass

@dataclass(frozen=True)
class Same(TransformPass):
    """Nothing is replaced."""
    exact = True

    def transform(self, context):
        return {}
'''


@pytest.fixture(scope="module")
def llama() -> Model:
    return open_model(models.tiny("Llama"))


@pytest.fixture(autouse=True)
def acme(install: Install) -> Iterator[None]:
    calls = {"transform": "transform(self, context)", "compensate": "compensate(self, context, _)"}
    files = {
        f"{kind}/times.py": TIMES.replace("KIND", f"{kind.title()}Pass").replace("CALL", call)
        for kind, call in calls.items()
    }
    before = set(sys.modules)
    install(
        "acme",
        {
            **files,
            "score/seen.py": SEEN,
            "select/take.py": TAKE,
            "compensate/look.py": LOOK,
            "transform/see.py": SEE,
            "transform/same.py": SAME,
        },
    )
    yield
    for name in set(sys.modules) - before:
        if name.startswith("acme"):
            del sys.modules[name]


def recipe(*passes: dict[str, Any], **budget: Any) -> dict[str, Any]:
    return {"version": 1, "passes": list(passes), "budget": budget or {"ratio": 0.1}}


def take(bad: str = "", axis: str = FFN, kept: int = 8) -> dict[str, Any]:
    return {"select": "take", "axis": axis, "kept": kept, "bad": bad}


def times(kind: str, param: str, by: float = 2.0, bad: str = "") -> dict[str, Any]:
    return {kind: "times", "param": param, "by": by, "bad": bad}


def entries(pruned: Any) -> list[tuple[str, Any]]:
    return [(entry["pass"], entry) for entry in pruned.report.recipe]


# --- what passes see -----------------------------------------------------------------------------


def test_what_is_scored_is_what_transforms_left(llama: Model) -> None:
    steps = ({"score": "seen"}, take())
    plain = surgeon.prune(llama, recipe=recipe(*steps), verify=False)
    turned = surgeon.prune(llama, recipe=recipe(times("transform", DOWN, -1), *steps), verify=False)
    column = llama.read(DOWN)[0]
    (kept,) = (c.array for c in plain.plan.cuts)
    assert kept.tolist() == sorted(column.argsort(descending=True)[:8].tolist())
    (kept,) = (c.array for c in turned.plan.cuts)
    assert kept.tolist() == sorted(column.argsort()[:8].tolist())


def test_each_rewrite_is_seen_by_those_after_it(llama: Model) -> None:
    pruned = surgeon.prune(
        llama,
        recipe=recipe(
            times("transform", DOWN, 3),
            times("transform", DOWN, 5),
            times("transform", GATE, 13),
            {"score": "seen"},
            take(),
            times("compensate", DOWN, 7),
            times("compensate", UP, 2),
            times("compensate", DOWN, 11),
        ),
    )
    assert pruned.rewrites.keys() == {DOWN, UP, GATE}
    torch.testing.assert_close(pruned.rewrites[DOWN], llama.read(DOWN) * (3 * 5 * 7 * 11))
    torch.testing.assert_close(pruned.rewrites[UP], llama.read(UP) * 2)
    torch.testing.assert_close(pruned.rewrites[GATE], llama.read(GATE) * 13)
    # The smaller model is the masked one, with what was rewritten in both.
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-4


def test_the_models_that_passes_look_at_are_those_of_the_passes_before(llama: Model) -> None:
    data = Data((Piece([3 + 7 * i % 89 for i in range(400)]),), 4, 16)
    whole = take(kept=79)  # next to nothing is gone

    def looked(*steps: dict[str, Any]) -> tuple[float, ...]:
        made = surgeon.prune(llama, recipe=recipe(*steps), calibration=data, verify=False)
        dense, pruned, cross = map(float, made.report.notes[-1].split())
        return dense, pruned, cross

    seen, look = {"score": "seen"}, {"compensate": "look", "param": DOWN}
    dense, pruned, cross = looked(seen, whole, look)
    twice = times("compensate", UP, 2)  # what the map reads is twice as large
    assert looked(seen, whole, twice, look) == pytest.approx((dense, 4 * pruned, 2 * cross))
    assert looked(seen, whole, twice, times("compensate", UP, 3), look) == pytest.approx(
        (dense, 36 * pruned, 6 * cross)
    )
    # A transform is the model's own from then on.
    turned = times("transform", UP, 2)
    assert looked(turned, seen, whole, look) == pytest.approx((4 * dense, 4 * pruned, 4 * cross))
    assert looked(turned, seen, whole, twice, look) == pytest.approx(
        (4 * dense, 16 * pruned, 8 * cross)
    )


def test_the_record_says_what_each_did(llama: Model) -> None:
    pruned = surgeon.prune(
        llama,
        recipe=recipe(
            times("transform", DOWN, 3), {"score": "seen"}, take(), times("compensate", UP, 2)
        ),
        verify=False,
    )
    labels = ["transform/times", "score/seen", "select/take", "compensate/times"]
    assert [label for label, _ in entries(pruned)] == labels
    moved, scored, selected, mended = (entry for _, entry in entries(pruned))
    assert moved["options"] == {"param": DOWN, "by": 3.0, "bad": ""}
    assert moved["effect"] == mended["effect"] == {"replaced": 1, "elements": 80 * 48}
    assert moved["notes"] == [f"{DOWN} times 3"] and mended["notes"] == [f"{UP} times 2"]
    assert pruned.report.notes == (f"{DOWN} times 3", f"{UP} times 2")
    assert scored["effect"] == {"axes": 1, "branches": 0}
    assert selected["effect"] == {"removed": {"ffn": 72}, "parameters": 72 * 48 * 3}
    assert all(entry["seconds"] >= 0 for _, entry in entries(pruned))
    again = pruned.report.as_recipe["passes"]
    assert again[0] == times("transform", DOWN, 3) and again[2] == take()


def test_the_model_is_not_changed(llama: Model) -> None:
    before = llama.read(DOWN).clone()
    steps = (times("transform", DOWN), {"score": "seen"}, take(), times("compensate", DOWN))
    surgeon.prune(llama, recipe=recipe(*steps), verify=False)
    assert torch.equal(llama.read(DOWN), before)


@pytest.mark.parametrize("kind", ["transform", "compensate"])
def test_writing_to_the_model_is_found_out(kind: str) -> None:
    model = models.build("Llama")
    step = times(kind, DOWN, bad="write")
    middle = [{"score": "seen"}, take()]
    steps = [step, *middle] if kind == "transform" else [*middle, step]
    error = refusal(open_model(model), f"{kind}/times", *steps)
    assert error.code is Code.BAD_PASS and error.at == DOWN


# --- transforms after the selection --------------------------------------------------------------


def test_a_transform_at_the_end_sees_the_plan_and_the_weights_as_compensated(llama: Model) -> None:
    steps = (
        times("transform", DOWN, 3),
        {"score": "seen"},
        take(),
        times("compensate", DOWN, 5),
        times("transform", DOWN, 7),
        times("transform", UP, 11),
    )
    pruned = surgeon.prune(llama, recipe=recipe(*steps))
    torch.testing.assert_close(pruned.rewrites[DOWN], llama.read(DOWN) * (3 * 5 * 7))
    torch.testing.assert_close(pruned.rewrites[UP], llama.read(UP) * 11)
    assert [c.axis for c in pruned.plan.cuts] == [FFN]
    # The order survives in what a result keeps of its recipe, and gives the same once more.
    assert [next(iter(step.items())) for step in pruned.report.as_recipe["passes"]] == [
        next(iter(step.items())) for step in steps
    ]
    again = surgeon.prune(llama, recipe=pruned.report.as_recipe)
    assert again.plan == pruned.plan
    assert all(torch.equal(again.rewrites[n], t) for n, t in pruned.rewrites.items())


def test_a_transform_at_the_end_looks_at_the_smaller_model_beside_the_dense_one(
    llama: Model,
) -> None:
    data = Data((Piece([3 + 7 * i % 89 for i in range(400)]),), 4, 16)

    def looked(*steps: dict[str, Any]) -> list[float]:
        made = surgeon.prune(llama, recipe=recipe(*steps), calibration=data, verify=False)
        return [float(number) for number in made.report.notes[-1].split()]

    def chosen(kept: int, *steps: dict[str, Any]) -> list[float]:
        return looked({"score": "seen"}, take(kept=kept), *steps)

    see = {"transform": "see", "param": DOWN}
    look = {"compensate": "look", "param": DOWN}
    dense, pruned, cross = chosen(8, see)
    assert pruned < dense and [dense, pruned, cross] == chosen(8, look)
    twice = times("transform", UP, 2)
    assert chosen(8, twice, see) == pytest.approx([dense, 4 * pruned, 2 * cross])
    assert chosen(8, times("compensate", UP, 3), twice, see) == pytest.approx(
        [dense, 36 * pruned, 6 * cross]
    )


def test_without_a_selection_nothing_is_removed_and_the_dense_model_stays(llama: Model) -> None:
    data = Data((Piece([3 + 7 * i % 89 for i in range(400)]),), 4, 16)
    steps = [{"transform": "same"}, times("transform", UP, 2), {"transform": "see", "param": DOWN}]
    told = {"version": 1, "passes": steps}
    pruned = surgeon.prune(llama, recipe=told, calibration=data)
    dense, seen, cross = (float(number) for number in pruned.report.notes[-1].split())
    assert [seen, cross] == pytest.approx([4 * dense, 2 * dense])
    assert pruned.plan.cuts == () and pruned.rewrites.keys() == {UP}
    assert pruned.report.parameters["total"]["before"] == pruned.report.parameters["total"]["after"]
    assert pruned.report.verification is not None  # the same shapes with other weights
    assert [step["transform"] for step in pruned.report.as_recipe["passes"]] == [
        step["transform"] for step in steps
    ]


def test_a_result_of_the_same_shape_is_written_verified_and_replayed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    models.build("Llama").save_pretrained(source)
    told = {"version": 1, "passes": [times("transform", UP, 2)]}
    out, again = tmp_path / "out", tmp_path / "again"
    surgeon.prune(source, recipe=told).save(out)
    assert surgeon.verify(out).largest <= 1e-4
    written = surgeon.open_model(out)
    torch.testing.assert_close(written.read(UP), surgeon.open_model(source).read(UP) * 2)
    plan, rewrites = read_plan(out)
    assert plan.cuts == () and plan.rewrites == (UP,)
    surgeon.prune(source, plan=plan, rewrites=rewrites).save(again)
    assert torch.equal(surgeon.open_model(again).read(UP), written.read(UP))
    from surgeon.recipes.runs import of_run

    assert [step.to_data() for step in of_run(out).passes] == told["passes"]


@pytest.mark.parametrize(
    ("passes", "more", "at", "says"),
    [
        ([times("transform", UP)], {"ratio": 0.1}, "--ratio", "removes anything"),
        ([times("transform", UP)], {"roles": {"ffn": 0.1}}, "--role", "transform/times"),
        ([times("transform", UP)], {"multiple_of": {"ffn": 2}}, "--multiple-of", "removes"),
        ([{"transform": "same"}], {}, "transform/same", "every pass is exact"),
        ([times("transform", UP)], {"score": "seen"}, "transform times, score seen", "of kind sel"),
        ([times("transform", UP)], {"transform": []}, "--transform none", "no pass is left"),
    ],
)
def test_what_says_nothing_without_a_selection_is_refused(
    llama: Model, passes: list[dict[str, Any]], more: dict[str, Any], at: str, says: str
) -> None:
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(llama, recipe={"version": 1, "passes": passes}, verify=False, **more)
    assert caught.value.code is Code.BAD_OPTION and caught.value.at == at
    assert says in caught.value.why


def test_rounds_without_a_selection_are_refused(llama: Model) -> None:
    told = {"version": 1, "schedule": {"rounds": 2}, "passes": [times("transform", UP)]}
    with pytest.raises(SurgeonError, match="schedule would not be looked at"):
        surgeon.prune(llama, recipe=told)


def test_transforms_at_the_end_can_be_named_beside_a_recipe(llama: Model) -> None:
    steps = recipe({"score": "seen"}, take())
    options = {"param": UP, "by": 3}
    pruned = surgeon.prune(llama, recipe=steps, then=["times"], then_options=options, verify=False)
    torch.testing.assert_close(pruned.rewrites[UP], llama.read(UP) * 3)
    assert pruned.report.as_recipe["passes"][-1] == times("transform", UP, 3)


# --- predicted loss ------------------------------------------------------------------------------


@pytest.mark.parametrize(("cumulative", "expected"), [(False, 0 + 1 + 2 + 7.0), (True, 2 + 7.0)])
def test_the_predicted_loss_adds_up_what_went(
    llama: Model, cumulative: bool, expected: float
) -> None:
    axes = llama.axes
    branch = axes.branches[0].name
    plan = Plan((cut(axes.get(FFN), range(3, 80)),), (branch,))
    scores = {FFN: np.arange(80.0), branch: np.asarray(7.0)}
    effect = of_plan(axes, plan, (), scores, unit="loss", cumulative=cumulative)
    assert effect["predicted_loss"] == expected
    assert "predicted_loss" not in of_plan(axes, plan, (), {}, unit="loss", cumulative=False)
    assert "predicted_loss" not in of_plan(axes, plan, (), scores, unit="role", cumulative=False)


def test_the_predicted_loss_of_a_choice_by_group(llama: Model) -> None:
    axes = llama.axes
    axis = next(a for a in axes.axes if a.role == "q_per_kv")
    kv = axes.get(axis.outer[0]).size
    scores = np.arange(float(kv * axis.size)).reshape(kv, axis.size)
    own = cut(axis, [[i % axis.size] for i in range(kv)], axis.outer[:1])
    gone = scores.sum() - sum(scores[i, i % axis.size] for i in range(kv))

    def predicted(plan: Plan, found: Any) -> float:
        effect = of_plan(axes, plan, (), {axis.name: found}, unit="loss", cumulative=False)
        return effect["predicted_loss"]

    assert predicted(Plan((own,)), scores) == gone
    same = cut(axis, [0])  # one choice everywhere takes its index from every group
    assert predicted(Plan((same,)), scores) == scores[:, 1:].sum()


# --- what passes are held to ---------------------------------------------------------------------


def refusal(llama: Model, by: str, *passes: dict[str, Any], **budget: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(llama, recipe=recipe(*passes, **budget), verify=False)
    error = caught.value
    assert by in error.what and error.data["pass"] == by, error
    return error


@pytest.mark.parametrize("kind", ["transform", "compensate"])
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("name", "no such one"),
        ("shape", "[2, 2]"),
        ("nan", "NaN"),
        ("integers", "floating-point"),
        ("list", "must be a mapping"),
    ],
)
def test_tensors_that_cannot_be_used(llama: Model, kind: str, bad: str, says: str) -> None:
    step = times(kind, DOWN, bad=bad)
    middle = [{"score": "seen"}, take()]
    steps = [step, *middle] if kind == "transform" else [*middle, step]
    error = refusal(llama, f"{kind}/times", *steps)
    assert error.code is Code.BAD_PLAN and says in str(error)


@pytest.mark.parametrize("bad", ["nan", "shape", "none", "list"])
def test_scores_that_cannot_be_used(llama: Model, bad: str) -> None:
    error = refusal(llama, "score/seen", {"score": "seen", "bad": bad}, take())
    assert error.code is Code.BAD_PLAN


@pytest.mark.parametrize(
    ("step", "code", "says"),
    [
        (take("none"), Code.BAD_PLAN, "NoneType"),
        (take("rewrites"), Code.BAD_PLAN, "compensate"),
        (take("twice"), Code.BAD_PLAN, "two cuts"),
        (take("order"), Code.BAD_PLAN, "out of order"),
        (take("ragged"), Code.BAD_PLAN, "different numbers"),
        (take(kept=0), Code.EMPTY_AXIS, "nothing would be left"),
    ],
)
def test_plans_that_cannot_be_applied(
    llama: Model, step: dict[str, Any], code: Code, says: str
) -> None:
    error = refusal(llama, "select/take", {"score": "seen"}, step)
    assert error.code is code and says in str(error)


def test_what_is_pinned_stays(llama: Model) -> None:
    pinned = next(a for a in llama.axes.axes if a.pins)
    error = refusal(llama, "select/take", {"score": "seen"}, take(axis=pinned.name))
    assert error.code is Code.PINNED and error.why == pinned.pins[0].why


def test_what_is_frozen_stays(llama: Model) -> None:
    seen = {"score": "seen"}
    error = refusal(llama, "select/take", seen, take(), ratio=0.1, freeze="model.layers.0")
    assert error.code is Code.BAD_PLAN and "frozen" in error.why and error.at == FFN
    branch = llama.axes.branches[0].name
    error = refusal(llama, "select/take", seen, take("branch"), ratio=0.1, only="*/ffn")
    assert error.code is Code.BAD_PLAN and "drops" in error.what and error.at == branch


def test_a_target_gets_the_multiples_it_wants(
    llama: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.emit.huggingface.multiple_of", lambda *_: {FFN: 16})
    seen = {"score": "seen"}
    surgeon.prune(llama, recipe=recipe(seen, take(kept=32)), verify=False)
    error = refusal(llama, "select/take", seen, take(kept=24))
    assert error.code is Code.BAD_PLAN and "multiple of 16" in error.why
