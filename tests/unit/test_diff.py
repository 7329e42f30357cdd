"""`surgeon diff`: models, plans, and a model beside its pruned output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.command import checkpoint, surgeon
from tests.refusals import refused

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, its output `a`, and another `b` that lost a branch and other channels."""
    here = tmp_path_factory.mktemp("diff")
    checkpoint(here / "m", models.tiny("Llama"))
    for name, options in (
        ("a", ("--role", "ffn=0.25")),
        ("b", ("--role", "ffn=0.5", "--role", "layers=0.5", "--score", "random")),
        ("c", ("--role", "ffn=0.25", "--score", "random")),
    ):
        made = surgeon("prune", here / "m", "-o", here / name, *options, "--no-verify")
        assert made.code == 0, made.err
    return here


def diff(a: Path, b: Path, *options: object) -> dict[str, Any]:
    found = surgeon("diff", a, b, "--json", *options)
    assert (found.code, found.err) == (0, ""), found.err
    return json.loads(found.out)


def widths(found: dict[str, Any]) -> dict[str, tuple[int | None, int | None]]:
    return {axis["name"]: (axis["before"], axis["after"]) for axis in found["axes"]}


def test_a_model_and_its_output(folder: Path) -> None:
    found = diff(folder / "m", folder / "a")
    report = json.loads((folder / "a" / "surgeon.json").read_text())
    assert found["totals"]["parameters"] == report["parameters"]["total"]
    assert widths(found) == {a["name"]: (a["before"], a["after"]) for a in report["axes"]}
    assert widths(found)["model.layers.0.mlp/ffn"] == (80, 60)
    for layer in found["layers"].values():
        saved = layer["parameters"]["before"] - layer["parameters"]["after"]
        assert saved == 20 * 3 * 48
        assert layer["flops"]["before"] - layer["flops"]["after"] == 2 * saved
        assert layer["cache_bytes"]["before"] == layer["cache_bytes"]["after"] == 192
    assert not found["same"]


def test_the_other_way_round(folder: Path) -> None:
    there, back = diff(folder / "m", folder / "b"), diff(folder / "b", folder / "m")
    assert widths(back) == {name: (b, a) for name, (a, b) in widths(there).items()}
    assert there["branches"]["dropped"] == back["branches"]["added"] != []
    assert not there["branches"]["added"]


def test_an_output_as_a_plan_and_as_a_model_are_the_same(folder: Path, tmp_path: Path) -> None:
    """What the plan predicts is what was written: the folder is captured anew."""
    shutil.copytree(folder / "a", tmp_path / "a")
    (tmp_path / "a" / "plan.json").unlink()
    found = diff(folder / "a" / "plan.json", tmp_path / "a")
    assert found["same"]
    assert "nothing differs" in surgeon("diff", folder / "a" / "plan.json", tmp_path / "a").out


def test_dropped_layers(folder: Path) -> None:
    found = diff(folder / "m", folder / "b")
    gone = found["branches"]["dropped"]
    assert len(gone) == 2
    layer = gone[0].partition("/")[0]
    figures = found["layers"][layer]
    assert figures["parameters"]["after"] == figures["cache_bytes"]["after"] == 0
    assert widths(found)[f"{layer}.mlp/ffn"] == (80, None)


def test_two_plans_say_what_both_keep(folder: Path) -> None:
    import numpy as np

    plans = [json.loads((folder / n / "plan.json").read_text())["cuts"] for n in "ac"]
    kept = [{c["axis"]: c["kept"] for c in cuts} for cuts in plans]
    found = diff(folder / "a" / "plan.json", folder / "c")
    for axis in found["axes"]:
        if axis["role"] == "ffn":
            both = np.intersect1d(kept[0][axis["name"]], kept[1][axis["name"]]).size
            assert axis["overlap"] == both / 60 < 1
        else:
            assert "overlap" not in axis
    assert not found["same"]
    assert "kept by both" in surgeon("diff", folder / "a", folder / "c").out
    assert diff(folder / "a", folder / "a" / "plan.json")["same"]


def test_plans_with_choices_of_their_own_inside_groups(folder: Path, tmp_path: Path) -> None:
    for name, score in (("x", "magnitude"), ("y", "random")):
        options = ("--role", "v=0.5", "--score", score, "--no-verify", "--to", "pt2")
        made = surgeon("prune", folder / "m", "-o", tmp_path / name, *options)
        assert made.code == 0, made.err
    found = diff(tmp_path / "x", tmp_path / "y")
    shares = [axis["overlap"] for axis in found["axes"] if axis["role"] == "v"]
    assert len(shares) == 2 and all(0 < share < 1 for share in shares)


def test_two_models(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    other = checkpoint(
        tmp_path / "n", models.tiny("Llama", num_hidden_layers=3, intermediate_size=64)
    )
    found = diff(folder / "m", other)
    assert widths(found)["model.layers.1.mlp/ffn"] == (80, 64)
    assert widths(found)["model.layers.2.mlp/ffn"] == (None, 64)
    assert found["layers"]["model.layers.2"]["parameters"]["before"] is None
    assert found["branches"]["added"] == ["model.layers.2/attention", "model.layers.2/mlp"]
    shown = surgeon("diff", folder / "m", other)
    assert shown.code == 0 and "model.layers.0–1.mlp/ffn" in shown.out
    assert diff(folder / "m", folder / "m")["same"]


# --- bad input -----------------------------------------------------------------------------------


def test_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    refused(surgeon("diff", folder / "m", tmp_path / "none"), "not-a-model", "none")
    broken = tmp_path / "plan.json"
    broken.write_text('{"cuts": []}')
    refused(surgeon("diff", folder / "m", broken), "bad-plan", "plan.json")
    broken.write_text("{")
    refused(surgeon("diff", broken, folder / "m"), "bad-plan", "plan.json")


def test_a_plan_whose_model_is_gone(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "c"):
        plan = json.loads((folder / name / "plan.json").read_text())
        plan["source"]["id"] = str(tmp_path / "gone")
        (tmp_path / f"{name}.json").write_text(json.dumps(plan))
    pair = (tmp_path / "a.json", tmp_path / "c.json")
    refused(surgeon("diff", *pair), "not-a-model", "name it with --source")
    assert not diff(*pair, "--source", folder / "m")["same"]


def test_a_plan_that_does_not_fit(folder: Path, tmp_path: Path) -> None:
    plan = json.loads((folder / "a" / "plan.json").read_text())
    plan["cuts"][0]["size"] = 81
    file = tmp_path / "other.json"
    file.write_text(json.dumps(plan))
    refused(surgeon("diff", folder / "m", file), "plan-mismatch")
