"""Golden texts: what a test compares with, and how they are made anew.

`UPDATE_GOLDEN=1 tools/test -m "zoo or not slow" tests` writes them; look at the difference.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def without_lines(text: str) -> str:
    """Takes the line numbers off source places: they belong to a version of the library."""
    return re.sub(r'(@ "[^"]*" "[^":]*):\d+"$', r'\1"', text, flags=re.MULTILINE)


def compare(name: str, text: str) -> None:
    """Fails with the difference unless the golden file `name` reads `text`."""
    path = FOLDER / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return
    wanted = path.read_text() if path.exists() else ""
    if text != wanted:
        lines = difflib.unified_diff(
            wanted.splitlines(), text.splitlines(), name, "now", lineterm="", n=1
        )
        pytest.fail("\n".join(list(lines)[:60]), pytrace=False)
