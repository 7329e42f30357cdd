"""What no Transformers class can say is written as a graph, verified where it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import surgeon
from surgeon.runtime import open_session
from tests.models import tiny, tokens

pytestmark = pytest.mark.slow


def test_a_plan_that_no_class_expresses_is_refused_with_the_way_out() -> None:
    with pytest.raises(surgeon.SurgeonError) as caught:
        surgeon.prune(tiny("Gemma"), roles={"v": 0.3})
    assert caught.value.code is surgeon.Code.TARGET_REFUSED
    assert "v_proj" in caught.value.why
    assert "--to onnx" in caught.value.try_


def test_the_same_plan_is_written_as_a_torch_program(tmp_path: Path) -> None:
    pruned = surgeon.prune(tiny("Gemma"), roles={"v": 0.3}, target="pt2")
    report = pruned.save(tmp_path / "out")
    assert report.target["name"] == "pt2"
    assert report.verification is not None
    assert report.verification["largest"] <= 1e-4
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    ids = tokens(101)
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    torch.testing.assert_close(
        program(ids, mask, positions), pruned.masked(ids, mask, positions), rtol=1e-4, atol=1e-4
    )
    assert surgeon.verify(tmp_path / "out", source=tiny("Gemma")).largest <= 1e-4


@pytest.mark.slow
def test_the_same_plan_runs_in_onnx_runtime(tmp_path: Path) -> None:
    pruned = surgeon.prune(tiny("Gemma"), roles={"v": 0.3}, target="onnx", verify=False)
    pruned.save(tmp_path / "out")
    ids = tokens(101)
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    got = open_session(tmp_path / "out").run(ids.numpy(), mask.numpy())
    want = pruned.masked(ids, mask, positions).numpy()
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_an_unknown_target_is_refused_before_anything_is_done() -> None:
    with pytest.raises(surgeon.SurgeonError) as caught:
        surgeon.prune(tiny("Llama"), roles={"ffn": 0.3}, target="onx")
    assert "onnx" in caught.value.try_
