"""`passes`: what can be installed in a recipe, with options, needs and where it comes from."""

from __future__ import annotations

import inspect
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.commands.arguments import JsonOption
from surgeon.errors import Code, SurgeonError, near

if TYPE_CHECKING:
    from surgeon.registry import Option, PassInfo

_REFERENCE = re.compile(r"^References?: *(.+?)(?:\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Found:
    """A pass as it is shown.

    Attributes:
        info: what its file says.
        doc: the file's docstring.
        options: its fields; none where it can't be loaded.
        needs: what the driver must supply, with options by default.
        fault: why it can't be loaded.
    """

    info: PassInfo
    doc: str = ""
    options: tuple[Option, ...] = ()
    needs: tuple[str, ...] = ()
    fault: str = ""

    @property
    def reference(self) -> str:
        """The papers that its docstring names, as one line."""
        found = _REFERENCE.search(self.doc)
        return " ".join(found[1].split()) if found else ""

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {
            "kind": self.info.kind,
            "name": self.info.name,
            "plugin": self.info.plugin,
            "file": str(self.info.path),
            "summary": self.info.summary,
            "doc": self.doc,
            "reference": self.reference,
            "needs": list(self.needs),
            "options": [
                {
                    "name": option.name,
                    "type": option.type_text,
                    "required": option.required,
                    "default": None if option.required else option.default,
                    "doc": option.doc,
                }
                for option in self.options
            ],
            **({"fault": self.fault} if self.fault else {}),
        }


def _found(info: PassInfo) -> Found:
    """Loads a pass to see its options; one that can't be loaded is shown with the reason."""
    from surgeon import registry

    try:
        cls = registry.load(info.kind, info.name)
        options = registry.options(cls)
    except SurgeonError as error:
        return Found(info, fault=f"{error.what}: {error.why}")
    # What a pass needs may depend on its options: as it stands with those by default.
    made: Any = cls if any(option.required for option in options) else cls()
    needs = made.needs if isinstance(made.needs, frozenset) else frozenset[str]()
    doc = inspect.getdoc(inspect.getmodule(cls)) or inspect.getdoc(cls) or ""
    return Found(info, doc, options, tuple(sorted(needs)))


def _asked(name: str | None) -> list[PassInfo]:
    from surgeon.registry import available

    every = [info for found in available().values() for info in found.values()]
    if name is None:
        return every
    kind, _, rest = name.rpartition("/")
    stem = rest.replace("-", "_")
    named = [i for i in every if i.name == stem and kind in ("", i.kind)]
    if not named:
        raise SurgeonError(
            Code.NO_SUCH_PASS,
            f"there is no pass named '{name}'",
            at=name,
            why="no plug-in installed here has one",
            try_=near(stem, {info.name for info in every}),
            data={"name": name, "known": sorted(f"{i.kind}/{i.name}" for i in every)},
        )
    return named


def passes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="show one whole, such as obs or score/obs"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the passes with their options and what they need; or show one, with its reference."""
    found = [_found(info) for info in _asked(name)]
    if as_json:
        data = [one.to_json() for one in found]
        typer.echo(json.dumps(data, indent=1, ensure_ascii=False, default=str))
    elif name is None:
        _table(found)
    else:
        typer.echo("\n\n".join(_whole(one) for one in found))


def _table(found: list[Found]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "name", "what it does", "options", "needs", "from", box=box.SIMPLE_HEAD)
    for one in found:
        options = "\n".join(_option(option) for option in one.options)
        row = (one.info.summary, one.fault or options, "\n".join(one.needs), one.info.plugin)
        table.add_row(one.info.kind, one.info.name, *row)
    console = Console(highlight=False, markup=False)
    console.print(table)


def _option(option: Option) -> str:
    default = "" if option.required else f" = {option.default}"
    return f"{option.name}: {option.type_text}{default}"


def _whole(one: Found) -> str:
    info = one.info
    lines = [f"{info.kind}/{info.name}, from {info.plugin} ({info.path})", "", one.doc]
    if one.fault:
        return "\n".join([*lines[:1], "", info.summary, "", f"It can't be loaded. {one.fault}"])
    lines += ["", "needs: " + (", ".join(one.needs) or "nothing")]
    lines += ["", "options:" if one.options else "It has no options."]
    for option in one.options:
        lines.append(f"  {_option(option)}{' (has to be given)' if option.required else ''}")
        lines += [f"      {line}".rstrip() for line in option.doc.strip().splitlines()]
    return "\n".join(lines)
