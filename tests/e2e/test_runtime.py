"""Exported folders, opened and run as a user opens and runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgeon import exporting, runtime
from surgeon.errors import SurgeonError
from surgeon.report.evaluate import perplexity
from surgeon.runtime import Decoder
from surgeon.runtime.generate import generate
from tests import models
from tests.command import checkpoint, surgeon

PROMPTS = ["a cat and a dog", "so", "the moon"]
STYLES = ("ort", "standard")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    source = checkpoint(root / "source", models.tiny("Llama"), tiny_tokenizer)
    for style in STYLES:
        exporting.export(str(source), "onnx", root / style, style=style, check=False)
    return {name: root / name for name in ("source", *STYLES)}


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_a_batch_is_written_as_transformers_writes_it(
    folders: dict[str, Path], style: str, tiny_tokenizer: Any
) -> None:
    model = runtime.open(folders[style], device="cpu", threads=1)
    own = generate(models.tiny("Llama"), tiny_tokenizer, PROMPTS, max_new_tokens=40)
    found = model.generate(PROMPTS, max_new_tokens=40)
    assert [f.tokens for f in found] == [o.tokens for o in own]
    assert [f.text for f in found] == [o.text for o in own]
    assert "".join(model.stream(PROMPTS[0], max_new_tokens=40)) == own[0].text
    with pytest.raises(SurgeonError, match="64 positions"):
        model.generate("x" * 64)


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_batches_padded_on_either_side_and_read_in_parts(
    folders: dict[str, Path], style: str
) -> None:
    decoder = Decoder(folders[style], device="cpu", threads=1)
    ids = np.random.default_rng(0).integers(3, 101, (2, 8))

    def reference(row: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return models.tiny("Llama")(torch.from_numpy(row)[None]).logits[0].numpy()

    for mask in ([[1] * 8, [0] * 5 + [1] * 3], [[1] * 8, [1] * 3 + [0] * 5]):
        real = np.array(mask) == 1
        found = decoder.run(ids, np.array(mask))
        for row in range(2):
            assert found[row, real[row]] == pytest.approx(reference(ids[row, real[row]]), abs=2e-4)
    cache = decoder.cache(2, 4)
    rows = [ids[0].tolist(), ids[1, :3].tolist()]
    found = decoder.prefill(cache, rows, chunk=3)
    for step in range(6):
        for row in range(2):
            expected = reference(np.array(rows[row]))[-1]
            assert found[row] == pytest.approx(expected, abs=2e-4)
            rows[row].append(10 + step)
        found = decoder.extend(cache, np.full((2, 1), 10 + step))


@pytest.mark.slow
def test_the_commands_agree_on_a_checkpoint_and_its_folders(folders: dict[str, Path]) -> None:
    write = ["hello", "--max-new-tokens", 12]
    score = ["--window", 32, "--windows", 2, "--json"]
    shown = {name: surgeon("generate", folder, *write) for name, folder in folders.items()}
    assert {s.code for s in shown.values()} == {0}
    assert len({s.out for s in shown.values()}) == 1
    assert all("running on c" in s.err for s in shown.values())
    found = [json.loads(surgeon("eval", folder, *score).out) for folder in folders.values()]
    scores = [data["models"][0]["texts"][0]["perplexity"] for data in found]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-4)
    several = surgeon("generate", folders["ort"], *write[:1], "world", *write[1:]).out
    assert several.startswith(shown["ort"].out) and "\nworld" in several


@pytest.mark.real
@pytest.mark.slow
def test_smollm2_writes_the_same_text(smollm2: Any, tmp_path: Path) -> None:
    own, tokenizer = smollm2
    exporting.export("smollm2", "onnx", tmp_path / "m", check=False)
    model = runtime.open(tmp_path / "m", device="cpu")
    prompts = ["The capital of France is", "def fibonacci(n):\n", "Zażółć gęślą jaźń 東京"]
    expected = generate(own, tokenizer, prompts, max_new_tokens=40)
    found = model.generate(prompts, max_new_tokens=40)
    assert [f.tokens for f in found] == [e.tokens for e in expected]
    assert [f.text for f in found] == [e.text for e in expected]
    scores = [perplexity(m, tokenizer, window=256, max_windows=2) for m in (own, model.session)]
    assert scores[1].perplexity == pytest.approx(scores[0].perplexity, rel=1e-4)
