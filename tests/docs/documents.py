"""Runs the documents: files they show are written, commands and Python run, output compared.

A fenced block with a file name after its language is that file. A block of `pycon` is a session of
Python, a block of `console` one of a shell in which `surgeon` alone is known; the blocks of one
document share their names and their folder.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.command import ROOT, surgeon

DOCS = ROOT / "docs"
_FENCE = re.compile(r"^```(\w+)(?: +(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file it shows if it does, its text and first line."""

    language: str
    file: str | None
    text: str
    line: int


def blocks(document: str) -> Iterator[Block]:
    """Yields the fenced blocks of a document."""
    text = (DOCS / document).read_text(encoding="utf-8")
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield Block(found[1], found[2], found[3], line)


def files(document: str) -> dict[str, str]:
    """Returns the files that a document shows."""
    return {b.file: b.text for b in blocks(document) if b.file}


def run(document: str, names: dict[str, Any]) -> list[str]:
    """Runs a document in the current folder and returns what differs from what it shows."""
    wrong: list[str] = []
    for block in blocks(document):
        if block.file:
            path = Path(block.file)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "pycon":
            wrong += _python(document, block, names)
        elif block.language == "console":
            wrong += _shell(document, block)
    return wrong


def _python(document: str, block: Block, names: dict[str, Any]) -> list[str]:
    found = doctest.DocTestParser().get_doctest(block.text, names, document, document, block.line)
    runner, out = doctest.DocTestRunner(verbose=False), io.StringIO()
    runner.run(found, out=out.write, clear_globs=False)
    names.update(found.globs)
    return [out.getvalue()] if runner.failures else []


def _shell(document: str, block: Block) -> list[str]:
    wrong: list[str] = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, expected = part.partition("\n")
        name, *arguments = shlex.split(command)
        assert name == "surgeon", f"{document}: {command}"
        with contextlib.redirect_stderr(io.StringIO()):
            outcome = surgeon(*arguments)
        shown = _plain(outcome.out + outcome.err)
        if not doctest.OutputChecker().check_output(_plain(expected), shown, 0):
            wrong.append(
                f"{document}:{block.line}: $ {command}\n--- shown\n{expected}--- is\n{shown}"
            )
    return wrong


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip() + "\n"
