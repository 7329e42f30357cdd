"""What llama.cpp makes of GGUF results, where tools/llama_cpp has brought it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from tests.command import ROOT
from tests.vocabularies import with_vocabulary

PYTHON = ROOT / ".venv-llama" / "bin" / "python"
NEW = 4
TEXT = "The licence grants 12 rights,\n\n  to Übermensch & all <|im_end|>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="llama.cpp is not here: tools/llama_cpp brings and runs it"
    ),
]


def llama_cpp(file: Path, **asked: Any) -> dict[str, Any]:
    request, answer = file.with_suffix(".request"), file.with_suffix(".answer")
    request.write_text(json.dumps({"model": str(file), **asked}), encoding="utf-8")
    runner = ROOT / "tools" / "llama_runner.py"
    done = subprocess.run([PYTHON, runner, request, answer], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(answer.read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
@pytest.mark.parametrize("form", ["llama", "deci"])
def test_it_gives_the_model_s_logits_and_cuts_texts_the_same(
    form: str, kind: str, tmp_path: Path
) -> None:
    opened = surgeon.open_model(with_vocabulary(tmp_path / "m", kind=kind))
    only = ["model.layers.0"] if form == "deci" else None
    shares = {"ffn": 0.5, "kv_heads": 1 / 3}
    made = surgeon.prune(opened, recipe="fast", roles=shares, only=only, verify=False)
    if form == "deci":  # the second layer loses its attention
        name = next(b.name for b in opened.axes.branches[2:] if b.kind == "attention")
        plan = replace(made.plan, branches=(name,))
        made = surgeon.prune(opened, plan=plan, verify=False)
    made = replace(made, target="gguf")
    assert made.save(tmp_path / "o").target["architecture"] == form

    tokenizer = opened.source.load_tokenizer()
    prompt = tokenizer(TEXT)["input_ids"][:12]
    vocab = int(opened.source.config.vocab_size)
    found = llama_cpp(
        tmp_path / "o" / "model.gguf", prompt=prompt, new=NEW, vocab=vocab, texts=[TEXT]
    )
    ids, model = list(prompt), made.model
    with torch.no_grad():
        for token, row in zip(found["written"], found["logprobs"], strict=True):
            want = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
            torch.testing.assert_close(
                torch.tensor(row, dtype=torch.float64), want, atol=1e-3, rtol=1e-4
            )
            assert token == int(want.argmax())
            ids.append(token)
    assert found["written"]
    assert found["texts"] == [tokenizer(TEXT)["input_ids"]]
