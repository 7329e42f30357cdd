"""Checkpoints whose layers are dealt out to several devices: here to memory and to the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.capture.source import resolve
from surgeon.errors import Code, SurgeonError
from surgeon.report.evaluate import Text
from surgeon.runtime.placing import check_map, load_placed
from tests import models
from tests.command import checkpoint
from tests.command import surgeon as command

pytestmark = pytest.mark.slow

APART = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "lm_head": "disk",
}
TEXT = Text("words", "the sun is a star and the earth is a stone " * 5)
SMALL: dict[str, Any] = {"window": 32, "windows": 3, "texts": (TEXT,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("placed") / "dense"
    return checkpoint(place, models.tiny("Llama"), models.tokenizer())


def test_a_model_of_which_half_lies_on_the_disk_computes_the_same(
    folder: Path, tmp_path: Path
) -> None:
    placed = load_placed(resolve(str(folder)), APART, tmp_path / "placed")
    places = {str(p.device) for p in placed.parameters()}
    assert places == {"cpu", "meta"}  # what lies on the disk is read when its turn comes
    ids = models.tokens(100, 2, 9)
    with torch.no_grad():
        assert torch.equal(placed(ids).logits, models.tiny("Llama")(ids).logits)
    assert placed.device_note == "layers on 2 devices"


@pytest.mark.parametrize("device_map", ["auto", APART])
def test_perplexity_is_that_of_one_device(folder: Path, device_map: Any) -> None:
    one = surgeon.evaluate(str(folder), device="cpu", **SMALL).models[0]
    many = surgeon.evaluate(str(folder), device_map=device_map, **SMALL).models[0]
    assert many.texts[0].found is not None and one.texts[0].found is not None
    assert many.texts[0].found.perplexity == one.texts[0].found.perplexity
    assert "layers on" in many.device


def test_the_command_deals_layers_out(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT.content, encoding="utf-8")
    given = ("--text", str(file), "--window", "32", "--windows", "2")
    out = command("eval", str(folder), *given, "--device-map", "balanced")
    assert out.code == 0, out.err
    assert "layers on 1 device" in out.out + out.err
    bad = command("eval", str(folder), *given, "--device-map", "balance")
    assert bad.code == 1
    assert "did you mean balanced" in bad.err and "Traceback" not in bad.err


@pytest.mark.parametrize(
    "options", [{"device_map": "spread"}, {"device_map": "auto", "device": "cpu"}]
)
def test_what_means_nothing_is_refused(options: Any) -> None:
    with pytest.raises(SurgeonError) as caught:
        check_map(**options)
    assert caught.value.code is Code.BAD_OPTION


def test_speed_is_not_measured_under_a_map(folder: Path) -> None:
    with pytest.raises(SurgeonError, match="speed"):
        surgeon.evaluate(str(folder), device_map="auto", speed=True, **SMALL)


@pytest.mark.parametrize(
    "device_map", [{"lm_head": "cpu", "model.layers": "disk"}, {"": "gpu"}, {"": 99}]
)
def test_a_map_that_leaves_a_module_without_a_device_is_refused(
    folder: Path, tmp_path: Path, device_map: Any
) -> None:
    with pytest.raises(SurgeonError, match="as the map says") as caught:
        load_placed(resolve(str(folder)), device_map, tmp_path)
    assert caught.value.code is Code.BAD_OPTION


def test_a_model_in_memory_has_its_devices_already(tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match="no checkpoint folder"):
        load_placed(resolve(models.tiny("Llama")), "auto", tmp_path)
