"""Sources as tests make and refuse them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from surgeon.capture.source import resolve
from surgeon.errors import Code, SurgeonError
from tests import models


def refused(source: Any, code: Code, match: str, **options: Any) -> SurgeonError:
    with pytest.raises(SurgeonError, match=match) as caught:
        resolve(source, **options)
    assert caught.value.code is code, caught.value
    assert caught.value.at and caught.value.why and caught.value.try_
    return caught.value


def saved(folder: Path, name: str = "Llama", **overrides: Any) -> Path:
    models.tiny(name, **overrides).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    """Changes fields of a config; None takes one out."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder
