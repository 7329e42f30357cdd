"""What a target is, and how its file is found: adding a target is adding one file here."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import surgeon.emit
from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan
from surgeon.errors import Code, SurgeonError, near


@dataclass(frozen=True)
class Refusal:
    """One reason why a target can't express a plan, found before anything is pruned."""

    axis: str
    """The axis or branch that is in the way."""
    why: str
    try_: str


def anything(axes: Axes, plan: Plan) -> list[Refusal]:
    """Refuses nothing: the rule of targets that take any rectangular shapes."""
    return []


def any_size(axes: Axes) -> Mapping[str, int]:
    """Wants no axis to keep a multiple of anything."""
    return {}


@dataclass(frozen=True)
class Target:
    """A form that a program can be written in.

    Name, description and suffix are written as literals, so that they can be listed without
    importing the target's file.

    Attributes:
        name: what `--to` is given.
        description: one line for a listing.
        suffix: of the file that is written; empty where it is a folder.
        write: called with the program after the plan, its weights by parameter name, the path,
            and what the target asks for by keyword; writes aside and renames.
        rules: the reasons why a plan can't be expressed; none where it can.
        multiple_of: by axis name, what the number of indices that are kept should be a multiple
            of; selection rounds to it. Asked before there is a plan.
    """

    name: str
    description: str
    suffix: str
    write: Callable[..., Any]
    rules: Callable[[Axes, Plan], list[Refusal]] = anything
    multiple_of: Callable[[Axes], Mapping[str, int]] = any_size

    def refuse(self, axes: Axes, plan: Plan) -> list[Refusal]:
        """Returns why the plan can't be expressed; nothing where it can."""
        return self.rules(axes, plan)


@dataclass(frozen=True)
class TargetInfo:
    """A target as its file shows it, before anything is imported."""

    name: str
    description: str
    suffix: str
    module: str


def find_targets() -> Mapping[str, TargetInfo]:
    """Returns the targets by name. Their files are read and not imported."""
    return _find(tuple(surgeon.emit.__path__), surgeon.emit.__name__)


@cache
def _find(folders: tuple[str, ...], package: str) -> Mapping[str, TargetInfo]:
    found: dict[str, TargetInfo] = {}
    for module in sorted(pkgutil.iter_modules(folders), key=lambda m: m.name):
        file = next((p for f in folders if (p := Path(f) / f"{module.name}.py").is_file()), None)
        fields = _literals(file) if file is not None else None
        if fields is not None:
            info = TargetInfo(**fields, module=f"{package}.{module.name}")
            found[info.name] = info
    return found


def _literals(file: Path) -> dict[str, str] | None:
    """Returns name, description and suffix of the `TARGET = Target(...)` in a file, if any."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign([ast.Name("TARGET")], value=ast.Call(ast.Name("Target"), _, keywords)):
                pass
            case ast.AnnAssign(ast.Name("TARGET"), value=ast.Call(ast.Name("Target"), _, keywords)):
                pass
            case _:
                continue
        wanted = ("name", "description", "suffix")
        return {k.arg: ast.literal_eval(k.value) for k in keywords if k.arg in wanted}
    return None


def get_target(name: str) -> Target:
    """Returns the target of this name, its file imported.

    Raises:
        SurgeonError: `bad-option` where there is none, with the nearest names.
    """
    known = find_targets()
    if name not in known:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"there is no target {name!r}",
            at=f"--to {name}",
            why="no file of surgeon/emit has that name",
            try_=near(name, known),
            data={"targets": sorted(known)},
        )
    return importlib.import_module(known[name].module).TARGET
