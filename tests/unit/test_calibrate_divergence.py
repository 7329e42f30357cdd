"""How far predictions move under several plans: each against the whole program run at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.axes.plan import Plan, Selection, cut, dropped
from surgeon.calibrate import smaller as module
from surgeon.errors import Code, SurgeonError
from surgeon.runtime.apply import kept_only, masked
from tests.calibrated import data, origin, run

pytestmark = pytest.mark.slow

FFN, LAST, DOWN = (
    "model.layers.0.mlp/ffn",
    "model.layers.1.mlp/ffn",
    "model.layers.0.mlp.down_proj.weight",
)


def nothing(name: str) -> None:
    return None


def by_hand(name: str, plan: Plan, windows: int, other: Any = nothing) -> tuple[float, float]:
    """The mean divergence and its deviation, from the logits of the whole program."""
    found = origin(name)
    selection, silent = Selection(found.axes, plan), dropped(found.axes, plan)

    def small(param: str) -> torch.Tensor:
        tensor = other(param)
        tensor = found.read(param) if tensor is None else tensor
        return torch.zeros_like(tensor) if param in silent else masked(selection, param, tensor)

    change = kept_only(found.axes, selection, found.program.producer)
    every = (run(found)[0], run(found, get=small, change=change)[0])
    dense, moved = (logits[-windows:].double().log_softmax(-1) for logits in every)
    each = torch.nn.functional.kl_div(moved, dense, log_target=True, reduction="none").sum(-1)
    return float(each.mean()), float(each.std(correction=0))


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Olmo2", "Gemma2"])
def test_many_plans_on_one_walk_are_each_as_if_alone(name: str) -> None:
    axes = origin(name).axes
    hidden = next(a for a in axes.axes if a.role == "hidden")
    inner = [a for a in axes.axes if a.role == "ffn"]
    plans = [Plan((cut(a, range(0, a.size, 2)),)) for a in (*inner, hidden)]
    plans.append(Plan(branches=(axes.branches[-1].name,)))
    found = data(name).divergences((plan, nothing) for plan in plans)
    for plan, one in zip(plans, found, strict=True):
        mean, deviation = by_hand(name, plan, module.TRIAL_WINDOWS)
        assert mean > 1e-6
        assert one.mean == pytest.approx(mean, rel=1e-3)
        assert one.deviation == pytest.approx(deviation, rel=1e-3)


def test_a_plan_may_come_with_other_tensors() -> None:
    axes = origin("Llama").axes
    plan = Plan((cut(axes.get(FFN), range(3)),))
    other = origin("Llama").read(DOWN) * 0.5

    def give(name: str) -> Any:
        return other if name == DOWN else None

    plain, (found,) = data().divergences([(plan, nothing)])[0], data().divergences([(plan, give)])
    assert found.mean == pytest.approx(
        by_hand("Llama", plan, module.TRIAL_WINDOWS, give)[0], rel=1e-3
    )
    assert abs(found.mean - plain.mean) > 1e-3 * plain.mean


def test_nothing_removed_moves_nothing() -> None:
    (found,) = data().divergences([(Plan(), nothing)])
    assert (found.mean, found.deviation) == (0.0, 0.0)


def test_it_is_taken_on_windows_that_the_walk_with_gradients_does_not_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "TRIAL_WINDOWS", 2)
    found = data(gradient_windows=3)
    seen = {tuple(row) for row in found.gradient_ids.tolist()}
    assert seen.isdisjoint({tuple(row) for row in found.trial_ids.tolist()})
    plan = Plan((cut(origin("Llama").axes.get(LAST), range(3)),))
    (one,) = found.divergences([(plan, nothing)])
    assert one.mean == pytest.approx(by_hand("Llama", plan, 2)[0], rel=1e-3)


def test_states_on_a_disk_change_nothing_and_leave_nothing(tmp_path: Path) -> None:
    plan = Plan((cut(origin("Llama").axes.get(FFN), range(3)),))
    (one,) = data().divergences([(plan, nothing)])
    (two,) = data(offload=tmp_path, tokens=11).divergences([(plan, nothing)])
    assert one.mean == pytest.approx(two.mean, rel=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_numbers_are_refused() -> None:
    plan = Plan((cut(origin("Llama").axes.get(FFN), range(3)),))

    def give(name: str) -> Any:
        return origin("Llama").read(name) * float("nan") if name == DOWN else None

    with pytest.raises(SurgeonError) as caught:
        data().divergences([(plan, give)])
    assert caught.value.code == Code.BAD_TEXT_INPUT
