"""A checkpoint shared out among devices gives what it gives on one."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgeon.comparing import evaluate
from surgeon.errors import Code, SurgeonError
from surgeon.report.evaluate import Text
from tests import models
from tests.command import checkpoint

pytestmark = pytest.mark.slow

TEXTS = [Text("text", "The heart is a muscle that pumps blood. " * 4)]
HALVES = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "disk",
    "lm_head": "disk",
}


def test_half_of_a_model_on_the_disk(tmp_path: Path) -> None:
    folder = str(checkpoint(tmp_path / "m", models.tiny("Llama"), models.tokenizer()))
    options = {"texts": TEXTS, "window": 16, "windows": 3}
    whole = evaluate(folder, **options).models[0]
    spread = evaluate(folder, **options, device_map=HALVES, prompts=["The"], new_tokens=4).models[0]
    assert spread.texts[0].perplexity is not None and whole.texts[0].perplexity is not None
    found, own = (m.texts[0].perplexity.perplexity for m in (spread, whole))
    assert found == pytest.approx(own, rel=1e-5)
    assert spread.device == "shared out among cpu, disk"
    assert spread.facts.memory_bytes < 0.6 * whole.facts.memory_bytes
    assert spread.written[0].tokens == 4
    for refused in ("nowhere", {"model": "cpu"}):
        with pytest.raises(SurgeonError) as caught:
            evaluate(folder, **options, device_map=refused)
        assert caught.value.code is Code.BAD_OPTION and caught.value.at == "--device-map"
