"""What a target wants kept counts to be multiples of is asked before anything is selected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

import surgeon
from surgeon.axes import Axes
from surgeon.emit.huggingface import multiple_of
from surgeon.emit.target import Target, any_size, get_target
from surgeon.opening import Model, open_model
from surgeon.pipeline import Pruned, prune
from tests import models

pytestmark = pytest.mark.slow


def opened(name: str, **overrides: Any) -> Model:
    return open_model(models.tiny(name, **overrides))


def sizes(made: Pruned, role: str) -> set[int]:
    return {a["after"] for a in made.report.axes if a["role"] == role}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("Gemma2", 6), ("Gemma3Text", 6), ("Llama", 1), ("Gemma", 1), ("Olmo2", 1), ("GPT2", 1)],
)
def test_classes_whose_heads_divide_the_width_are_found_by_asking(name: str, wanted: int) -> None:
    model = models.tiny(name)
    axes = opened(name).axes
    found = multiple_of(axes, model.config, type(model))
    assert found == ({"hidden": wanted} if wanted > 1 else {})


@pytest.mark.parametrize("share", [1 / 3, 0.1, 0.4])
def test_a_width_that_would_be_refused_is_rounded(share: float) -> None:
    made = prune(opened("Gemma2"), roles={"hidden": share}, score="random", verify=False)
    (kept,) = sizes(made, "hidden")
    assert kept % 6 == 0 and abs(kept - (1 - share) * 48) <= 3
    assert made.emission.architecture == "Gemma2ForCausalLM"
    other = prune(opened("Gemma"), roles={"hidden": share}, score="random", verify=False)
    assert sizes(other, "hidden") == {48 - round(share * 48)}


def even_heads(axes: Axes) -> Mapping[str, int]:
    return {a.name: 4 for role in ("v", "rotary", "ffn") for a in axes.of_role(role)}


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> Target:
    made = replace(get_target("pt2"), multiple_of=even_heads)
    monkeypatch.setattr("surgeon.emit.target.get_target", lambda name: made)
    return made


@pytest.mark.parametrize(
    ("role", "share", "kept"), [("v", 0.4, 4), ("v", 0.1, 8), ("ffn", 0.2, 64)]
)
def test_any_axis_of_any_target_is_rounded(
    target: Target, role: str, share: float, kept: int
) -> None:
    made = prune(opened("Llama"), roles={role: share}, target="pt2", verify=False)
    assert sizes(made, role) == {kept}
    free = replace(target, multiple_of=any_size)
    assert free.multiple_of(made.axes) == {}


def test_a_ratio_is_met_in_steps_of_the_multiple(target: Target) -> None:
    made = prune(opened("Llama"), ratio=0.2, target="pt2", verify=False)
    assert all(n % 4 == 0 for n in sizes(made, "ffn"))
    assert abs(made.report.ratio["removed"] - 0.2) < 0.02


def test_both_multiples_hold(target: Target) -> None:
    made = surgeon.prune(
        opened("Llama"),
        roles={"ffn": 0.2},
        select_options={"multiple_of": 6},
        target="pt2",
        verify=False,
    )
    assert sizes(made, "ffn") == {60}
