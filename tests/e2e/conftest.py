from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.command import checkpoint


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A tiny Llama with its tokenizer, for everybody: it must not be modified."""
    return checkpoint(tmp_path_factory.mktemp("llama") / "m", models.tiny("Llama"), tiny_tokenizer)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model", models.tiny("Llama"), max_shard_size="60KB")
