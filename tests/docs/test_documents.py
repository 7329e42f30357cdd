"""Every line of output in the documents is what comes out."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import models
from tests.docs.documents import DOCS, files, run

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


@pytest.fixture
def learn() -> Iterator[Callable[[str], None]]:
    """Reads a rule's file as `surgeon.ops` would, and forgets it afterwards."""
    from surgeon.axes.analysis import rules

    known = dict(rules())

    def read(path: str) -> None:
        spec = importlib.util.spec_from_file_location("surgeon.ops.of_a_document", path)
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))

    yield read
    for target in set(rules()) - set(known):
        del rules()[target]


def check(document: str, **names: Any) -> None:
    wrong = run(document, dict(names))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("document", ["tutorial.md", "graph.md"])
def test_a_walk_through(document: str) -> None:
    check(document)


def test_a_pass_of_ones_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tomllib

    metadata = tomllib.loads(files("passes.md")["acme_passes/pyproject.toml"])["project"]
    entries = metadata["entry-points"]["surgeon.plugins"]
    info = folder / "acme_passes-1.0.dist-info"
    info.mkdir()
    name, version = metadata["name"], metadata["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[surgeon.plugins]", *lines, ""]))
    (folder / "acme_passes").mkdir()
    (folder / "acme_passes" / "__init__.py").touch()
    monkeypatch.syspath_prepend(folder)
    before = set(sys.modules)
    try:
        check("passes.md", model=models.tiny("Llama"))
    finally:
        for module in set(sys.modules) - before:
            if module.startswith("acme_passes"):
                del sys.modules[module]


def test_recipes() -> None:
    check("recipes.md", model=models.tiny("Llama"))


def test_recovery() -> None:
    check("recovery.md", model=models.tiny("Llama"))


def test_an_operation_of_ones_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch, learn: Callable[[str], None]
) -> None:
    monkeypatch.syspath_prepend(folder)
    try:
        check("operations.md", learn=learn)
    finally:
        sys.modules.pop("mirror", None)


@pytest.mark.parametrize("document", sorted(path.name for path in DOCS.glob("*.md")))
def test_links_lead_somewhere(document: str) -> None:
    import re

    text = (DOCS / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (DOCS / target).exists(), f"{document}: {target}"


def test_a_wrong_line_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.documents.DOCS", folder)
    page = "```pycon\n>>> 1 + 1\n3\n```\n\n```console\n$ surgeon inspect nowhere\nfine\n```\n"
    (folder / "page.md").write_text(page)
    python, shell = run("page.md", {})
    assert "Expected:" in python and "[not-a-model]" in shell
