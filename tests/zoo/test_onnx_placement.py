"""Where ONNX Runtime's CUDA provider puts the nodes of decoder graphs, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surgeon.emit.onnx_decoder import Options, write_decoder
from surgeon.opening import open_model
from tests import models
from tools.cuda_placement import CPU, CUDA, placement, unavailable

pytestmark = [
    pytest.mark.zoo,
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "available"),
]

NAMES: dict[str, dict[str, Any]] = {
    "Llama": {"head_dim": 16},
    "Mistral": {"head_dim": 16, "sliding_window": 5},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16},
    "Phi3": {},
    "GPT2": {},
}


def on_cpu(name: str, options: Options, path: Path) -> list[str]:
    origin = open_model(models.tiny(name, **NAMES[name]))
    write_decoder(origin.program, origin.read, path, options=options, check=False)
    found = placement(path)
    assert set(found.counts()) <= {CPU, CUDA} and len(found.on(CUDA)) > 20
    return [node.op.split(".")[-1] for node in found.on(CPU)]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_only_the_total_length_is_counted_on_the_cpu(name: str, dtype: str, tmp_path: Path) -> None:
    options = Options("ort", dtype, positions=32)
    assert set(on_cpu(name, options, tmp_path / "model.onnx")) <= {"Shape", "Cast"}


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_standard_style_is_on_cuda_whole(name: str, dtype: str, tmp_path: Path) -> None:
    options = Options("standard", dtype, positions=32)
    assert on_cpu(name, options, tmp_path / "model.onnx") == []


def test_grouped_attention_in_fp32_would_be_on_the_cpu(tmp_path: Path) -> None:
    """What the two tests above see is the provider's own doing."""
    found = on_cpu("Llama", Options("ort", "fp32", positions=32), tmp_path / "model.onnx")
    assert "GroupQueryAttention" in found
