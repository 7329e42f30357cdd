"""What a target is, and how its file is found: adding a target is adding one file here."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

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


Kind = Literal["graph", "checkpoint"]

TRANSFORMERS = "transformers"
"""The target that is no file here: `surgeon.emit.huggingface` picks among its classes."""


def anything(axes: Axes, plan: Plan, origin: Any) -> list[Refusal]:
    """Refuses nothing: the rule of targets that take any rectangular shapes."""
    return []


def all_free(axes: Axes, asked: Mapping[str, float]) -> Mapping[str, str]:
    """Leaves nothing alone that might be pruned."""
    return {}


def any_size(axes: Axes) -> Mapping[str, int]:
    """Wants no axis to keep a multiple of anything."""
    return {}


@dataclass(frozen=True)
class Target:
    """A form that a program can be written in.

    Name, description, suffix and kind are written as literals, so that they can be listed without
    importing the target's file.

    Attributes:
        name: what `--to` is given.
        description: one line for a listing.
        suffix: of the file that is written; empty where it is a folder.
        write: of a graph, called with the program after the plan, its weights by parameter name,
            the path, and what the target asks for by keyword; writes aside and renames. Of a
            checkpoint, called with the decoder and what `surgeon.emit.decoder.Material` has, and
            writes into a folder that is not in its place yet.
        rules: the reasons why a plan can't be expressed; none where it can. Asked with the empty
            plan before anything is scored, and with the plan before anything is removed. The last
            argument has the model's `source` and `fixed`.
        multiple_of: by axis name, what the number of indices that are kept should be a multiple
            of; selection rounds to it. Asked before there is a plan.
        whole: by name of an axis or branch that has to stay whole, why. Called with the shares of
            roles that the user names.
        kind: `graph`, or `checkpoint` for weights that a runtime with its own classes reads.
        read: of a checkpoint, compares what was written with what should have been, tensor by
            tensor.
    """

    name: str
    description: str
    suffix: str
    write: Callable[..., Any]
    rules: Callable[[Axes, Plan, Any], list[Refusal]] = anything
    multiple_of: Callable[[Axes], Mapping[str, int]] = any_size
    whole: Callable[[Axes, Mapping[str, float]], Mapping[str, str]] = all_free
    kind: Kind = "graph"
    read: Callable[..., None] | None = None

    def refuse(self, axes: Axes, plan: Plan, origin: Any = None) -> list[Refusal]:
        """Returns why the plan can't be expressed; nothing where it can."""
        return self.rules(axes, plan, origin)


@dataclass(frozen=True)
class TargetInfo:
    """A target as its file shows it, before anything is imported."""

    name: str
    description: str
    suffix: str
    module: str
    kind: str = "graph"


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
    """Returns the literals of the `TARGET = Target(...)` in a file, None where it has none."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        match node:
            case ast.Assign([ast.Name("TARGET")], value=ast.Call(ast.Name("Target"), _, keywords)):
                pass
            case ast.AnnAssign(ast.Name("TARGET"), value=ast.Call(ast.Name("Target"), _, keywords)):
                pass
            case _:
                continue
        wanted = ("name", "description", "suffix", "kind")
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


def names_of(targets: str) -> tuple[str, ...]:
    """Returns the targets that are named, with commas between them.

    Raises:
        SurgeonError: `bad-option` where there is no such target, or one is named twice.
    """
    names = tuple(name.strip() for name in targets.split(","))
    for name in names:
        if name != TRANSFORMERS:
            get_target(name)
    if len(set(names)) < len(names):
        raise SurgeonError(
            Code.BAD_OPTION,
            "a target is named twice",
            at=f"--to {targets}",
            why="each is written once",
            try_="--to " + ",".join(dict.fromkeys(names)),
        )
    return names


def all_graphs(names: tuple[str, ...]) -> bool:
    """Whether all of these targets are graphs, which can express any plan."""
    known = find_targets()
    return all(name in known and known[name].kind == "graph" for name in names)


def check_targets(names: tuple[str, ...], axes: Axes, plan: Plan, origin: Any) -> None:
    """Refuses a plan that one of the targets can't express.

    Raises:
        SurgeonError: `target-refused`, with every reason.
    """
    for name in names:
        found = [] if name == TRANSFORMERS else get_target(name).refuse(axes, plan, origin)
        if found:
            raise refusal(name, found)


def refusal(name: str, found: list[Refusal]) -> SurgeonError:
    """Returns the error that reasons of a target come to."""
    return SurgeonError(
        Code.TARGET_REFUSED,
        f"target {name} can't express this model",
        at=", ".join(dict.fromkeys(r.axis for r in found if r.axis)) or f"--to {name}",
        why="; ".join(dict.fromkeys(r.why for r in found)),
        try_="; or ".join(dict.fromkeys(r.try_ for r in found)),
        data={"target": name, "reasons": [r.why for r in found]},
    )
