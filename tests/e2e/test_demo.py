"""The demonstration's way through its folder, on a tiny model in place of the real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.command import checkpoint, surgeon

pytestmark = pytest.mark.slow

TEXTS = ("decoder-layer parameters", "perplexity", "before:", "after:", "onnx:")


@pytest.fixture
def stand_in(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with room for the tokens and positions that the demonstration uses."""
    model = models.build("Llama", vocab_size=4096, max_position_embeddings=1024)
    folder = checkpoint(tmp_path / "m", model, tiny_tokenizer)
    from surgeon import pipeline

    real = pipeline.open_model
    monkeypatch.setattr(
        pipeline, "open_model", lambda source, **o: real(folder if source == "smollm2" else source)
    )
    return folder


def test_it_runs_again_into_its_folder(stand_in: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    first = surgeon("demo", "-o", out, "--windows", "1")
    assert first.code == 0, first.err
    timed = ("surgeon.json", "report.html")  # they say how long it took
    before = {p.name: p.read_bytes() for p in (out / "model").iterdir() if p.name not in timed}
    files = sorted(p.name for p in out.iterdir())
    again = surgeon("demo", "-o", out, "--windows", "1")
    assert again.code == 0, again.err
    for text in TEXTS:
        assert text in again.out
    assert "NOT the same" not in again.out
    for name, data in before.items():
        assert (out / "model" / name).read_bytes() == data, name
    assert sorted(p.name for p in out.iterdir()) == files
    assert not [name for name in files if name.startswith(".")]
    planned = surgeon("prune", stand_in, "--ratio", "0.2", "--dry-run", "--json", "--no-verify")
    assert planned.code == 0, planned.err
    found, report = json.loads(planned.out), json.loads((out / "demo.json").read_text())["report"]
    for key in ("parameters", "ratio", "axes", "source"):
        assert found[key] == report[key]
