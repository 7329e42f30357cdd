"""Short recipes drawn at random: whatever passes are put together, a model comes out or a reason.

One tiny Llama, every kind of pass that changes weights, in the order that a recipe allows.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import surgeon
from surgeon.calibrate.data import Piece, Recipe
from surgeon.opening import Model, open_model
from tests import models

pytestmark = pytest.mark.slow

FIRST = ({"transform": "value_output"}, {"transform": "group_heads"})
CHOICES = (
    {"score": "magnitude", "select": "uniform"},
    {"score": "wanda", "select": "ranked"},
    {"score": "obs", "select": "budgeted"},
)
COMPENSATES = (
    {"compensate": "least_squares"},
    {"compensate": "bias"},
    {"compensate": "gains", "epochs": 0.5},
    {"compensate": "recover", "steps": 2, "batch": 2, "length": 16},
)
LAST = (
    {"transform": "sparsify", "pattern": "2:4"},
    {"transform": "sparsify", "by": "sparsegpt", "ratio": 0.3},
    {"transform": "low_rank", "rank": 8, "by": "weights"},
    {"transform": "group_heads", "by": "mean"},
)


@cache
def origin() -> Model:
    return open_model(models.build("Llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    path = tmp_path_factory.mktemp("ids") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 90, 4000))
    return Recipe((Piece(str(path)),), 6, 16)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    passes: list[dict[str, Any]] = []
    budget: dict[str, Any] = {}
    if draw(st.booleans()):
        passes += draw(st.lists(st.sampled_from(FIRST), max_size=2, unique_by=str))
        chosen = draw(st.sampled_from(CHOICES))
        passes += [{kind: name} for kind, name in chosen.items()]
        passes += draw(st.lists(st.sampled_from(COMPENSATES), max_size=2, unique_by=str))
        budget = {"ratio": draw(st.sampled_from((0.1, 0.3)))}
    least = 0 if passes else 1
    passes += draw(st.lists(st.sampled_from(LAST), min_size=least, max_size=2, unique_by=str))
    return {"version": 1, "budget": budget, "passes": passes}


@settings(max_examples=8, deadline=None)
@given(recipe=recipes(), target=st.sampled_from(("transformers", "pt2")))
def test_a_recipe_gives_a_model_that_loads_and_runs_and_says_what_it_did(
    recipe: dict[str, Any], target: str, data: Recipe, tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        pruned = surgeon.prune(origin(), recipe=recipe, calibration=data, target=target)
    except surgeon.SurgeonError as error:
        assert error.what and error.why and error.try_
        return
    out = tmp_path_factory.mktemp("result") / "out"
    report = pruned.save(out)
    assert report.verification is not None and (out / "surgeon.json").is_file()
    assert len(report.recipe) >= len(recipe["passes"])
    ids = torch.arange(12)[None]
    if target == "transformers":
        logits = read_back(out)(ids).logits
        assert torch.isfinite(logits).all()
    replayed = surgeon.verify(out, source=origin())
    assert replayed.largest <= 1e-4


def read_back(out: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
