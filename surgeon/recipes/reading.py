"""Reads YAML that may come from anywhere: small, of plain values, each key once, no references."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from surgeon.errors import Code, SurgeonError

LARGEST = 64 * 1024
"""Bytes of a recipe. One of a page has two kilobytes."""

DEEPEST = 16
"""Levels of a recipe's values; it needs five."""


class _Refused(yaml.YAMLError):
    """What is YAML, but nothing that a recipe may hold."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem)
        self.problem, self.problem_mark = problem, mark


class _Loader(yaml.SafeLoader):
    """Plain values only; what a reader would overlook, or what grows when read, is refused."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # pyright: ignore[reportUnknownVariableType]  (untyped)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _Refused("anchors and aliases are not read: write it out", event.start_mark)
        self.depth += 1
        if self.depth > DEEPEST:
            raise _Refused(f"it is more than {DEEPEST} levels deep", event.start_mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key is a word", key.start_mark)
            if key.value in seen:
                raise _Refused(f"the key '{key.value}' is given twice", key.start_mark)
            if key.value == "<<":
                raise _Refused("merge keys are not read: write it out", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=True)


def read_yaml(path: Path) -> Any:
    """Returns the values of a recipe's file.

    Raises:
        SurgeonError: `missing-file` or `bad-recipe`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise SurgeonError(
            Code.MISSING_FILE,
            f"the recipe '{path}' can't be read",
            at=str(path),
            why=error.strerror or str(error),
            try_="the path of a YAML file, or the name of a recipe that ships with Surgeon",
        ) from error
    if len(content) > LARGEST:
        raise no_recipe(str(path), f"it has more than {LARGEST:,} bytes")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise no_recipe(str(path), f"it is not UTF-8 text: {error.reason}") from error
    return parse(text, str(path))


def parse(text: str, where: str) -> Any:
    """Returns the values that a YAML text spells.

    Raises:
        SurgeonError: `bad-recipe`, with the line.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = where if mark is None else f"{where}:{mark.line + 1}"
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise no_recipe(at, why) from error
    except (ValueError, OverflowError) as error:  # a date or a number that there can't be
        raise no_recipe(where, f"a value can't be read: {error}") from error


def no_recipe(at: str, why: str) -> SurgeonError:
    """Returns the refusal of a text that is no recipe at all."""
    return SurgeonError(
        Code.BAD_RECIPE,
        "this is no recipe",
        at=at,
        why=why,
        try_="see 'surgeon recipe fast' for what one looks like",
    )
