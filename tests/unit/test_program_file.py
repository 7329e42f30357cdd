"""`.pt2` files as models that run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from surgeon import exporting
from surgeon.errors import Code, SurgeonError
from surgeon.report.evaluate import perplexity
from surgeon.runtime.program_file import open_module, program_file
from tests import models
from tests.command import checkpoint


def refused(code: Code, path: Path) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        open_module(path, device="cpu")
    assert caught.value.code is code
    return caught.value


def test_a_program_is_the_file_or_in_a_folder_without_a_checkpoint(tmp_path: Path):
    assert program_file(str(tmp_path / "none.pt2")) == tmp_path / "none.pt2"
    assert program_file(str(tmp_path)) is None
    (tmp_path / "model.pt2").touch()
    assert program_file(str(tmp_path)) == tmp_path / "model.pt2"
    (tmp_path / "config.json").touch()
    assert program_file(str(tmp_path)) is None


def test_a_program_gives_the_logits_of_its_checkpoint(tmp_path: Path):
    source = checkpoint(tmp_path / "m", models.tiny("Llama"))
    exporting.export(str(source), "pt2", tmp_path / "m.pt2", check=False)
    module, tokenizer = exporting.load(str(tmp_path / "m.pt2"), device="cpu")
    assert tokenizer is None and (module.vocab, module.device) == (101, "cpu")
    ids = np.random.default_rng(0).integers(3, 101, 64)
    own = perplexity(models.tiny("Llama"), ids, window=32).perplexity
    assert perplexity(module, ids, window=32).perplexity == pytest.approx(own, rel=1e-5)
    with pytest.raises(SurgeonError) as caught:
        perplexity(module, ids + 50, window=32)
    assert caught.value.code is Code.RUNTIME_FAILED and "no row" in caught.value.why


def test_what_is_no_program_of_a_language_model(tmp_path: Path):
    refused(Code.MISSING_FILE, tmp_path / "none.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"nothing of the kind")
    assert "bad.pt2" in refused(Code.NOT_A_MODEL, tmp_path / "bad.pt2").what
    torch.export.save(
        torch.export.export(torch.nn.Linear(2, 3), (torch.zeros(1, 2),)), tmp_path / "linear.pt2"
    )
    assert "input" in refused(Code.NOT_A_MODEL, tmp_path / "linear.pt2").why
