"""Where plug-ins lie, and the rules of operations that they bring in a folder `ops`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import MutableMapping
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from surgeon.errors import Code, SurgeonError

GROUP = "surgeon.plugins"


def plugins() -> list[tuple[str, str]]:
    """Returns the installed plug-ins as pairs of package and name, sorted."""
    # An editable install beside a built one names the same package twice.
    return sorted({(point.module, point.name) for point in entry_points(group=GROUP)})


def folders(package: str, plugin: str) -> list[Path]:
    """Returns the folders of a plug-in's package without importing it or its parents.

    Raises:
        SurgeonError: `missing-file` where there is no such package.
    """
    locations: list[str] | None = None
    parts = package.split(".")
    for depth in range(len(parts)):
        name = ".".join(parts[: depth + 1])
        if locations is None:
            spec = importlib.util.find_spec(name)
        else:
            spec = PathFinder.find_spec(name, locations)
        if spec is None or spec.submodule_search_locations is None:
            raise SurgeonError(
                Code.MISSING_FILE,
                f"plug-in '{plugin}' names the package '{package}', which cannot be found",
                at=f"entry point '{plugin}' in group {GROUP}",
                why=f"there is no package '{name}' on the path"
                if spec is None
                else f"'{name}' is a module, not a package",
                try_="install the plug-in again, or uninstall it",
                data={"plugin": plugin, "package": package},
            )
        locations = list(spec.submodule_search_locations)
    return [Path(location) for location in locations or ()]


def import_rules(table: MutableMapping[str, Any]) -> None:
    """Imports every file in a folder `ops` of a plug-in; what it registers goes into the table.

    Args:
        table: rules by operation, that of `surgeon.ops.rule`.

    Raises:
        SurgeonError: `missing-extra` where a file needs a module that is not installed, `bad-pass`
            where it doesn't parse or has a rule for an operation that has one already.
    """
    for package, plugin in plugins():
        for folder in folders(package, plugin):
            for file in sorted((folder / "ops").glob("*.py")):
                if not file.name.startswith("_"):
                    _import(f"{package}.ops.{file.stem}", plugin, file, table)


def _import(module: str, plugin: str, file: Path, table: MutableMapping[str, Any]) -> None:
    before = set(table)
    try:
        importlib.import_module(module)
    except (ModuleNotFoundError, SyntaxError, ValueError) as error:
        for target in set(table) - before:  # none of its rules, rather than some of them
            del table[target]
        missing = isinstance(error, ModuleNotFoundError)
        raise SurgeonError(
            Code.MISSING_EXTRA if missing else Code.BAD_PASS,
            f"the operation rules of plug-in '{plugin}' can't be read",
            at=str(file),
            why=f"it needs the module '{error.name}', which is not installed"
            if isinstance(error, ModuleNotFoundError)
            else str(error),
            try_=f"install what it depends on, or uninstall '{plugin}'"
            if missing
            else f"mend the file, or uninstall '{plugin}'",
            data={"plugin": plugin},
        ) from error
