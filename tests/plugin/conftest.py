from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

Install = Callable[[str, Mapping[str, str]], Path]

LOUD = '''
"""Scores every index by how loud it is.

More about it.
"""
import acme_probe
from dataclasses import dataclass, field
from typing import Literal
from surgeon.plugin import ScorePass

@dataclass(frozen=True)
class Loud(ScorePass):
    """A score of a third party."""

    power: float
    """The exponent.

    Larger is louder."""
    norm: Literal["l1", "l2"] = "l2"
    tags: list[str] = field(default_factory=list, metadata={"doc": "Free words."})
    keep_top: int | None = None

    def __post_init__(self) -> None:
        if self.power == 13:
            raise ValueError("13 is unlucky")

    def score(self, context):
        return {}
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a distribution of this name on the path as an installer would, with its metadata."""

    def put(name: str, files: Mapping[str, str]) -> Path:
        site = tmp_path / f"site-{name}"
        package = f"{name}_passes"
        for file, source in files.items():
            target = site / package / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(textwrap.dedent(source))
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[surgeon.plugins]\n{name} = {package}\n")
        # Every import of the probe is seen, so that the tests know when a pass was imported.
        (site / f"{name}_probe.py").write_text("")
        monkeypatch.syspath_prepend(site)
        return site

    return put


@pytest.fixture
def acme(install: Install) -> Path:
    return install(
        "acme", {"__init__.py": "", "score/loud_one.py": LOUD, "score/_shared.py": "boom("}
    )
