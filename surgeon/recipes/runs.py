"""The recipe of an earlier run."""

from __future__ import annotations

import json
from pathlib import Path

from surgeon.errors import Code, SurgeonError
from surgeon.recipes import from_data
from surgeon.recipes.schema import Recipe

REPORT_FILE = "surgeon.json"


def of_run(path: Path) -> Recipe:
    """Returns the recipe of a folder that a prune wrote, or of its `surgeon.json`.

    Raises:
        SurgeonError: `missing-file` where there is no report, `bad-recipe` where it is none, or
            has no recipe because it replayed a plan.
    """
    file = path / REPORT_FILE if path.is_dir() else path
    try:
        report = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise SurgeonError(
            Code.MISSING_FILE,
            "there is no report of a run to read",
            at=str(file),
            why=error.strerror or str(error),
            try_="a folder that prune wrote, or the name of a recipe: 'surgeon recipe' lists them",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _none(file, f"it is no JSON: {error}") from error
    if not isinstance(report, dict) or "recipe" not in report:
        raise _none(file, "it is not what a prune writes")
    if not report.get("as_recipe"):
        raise _none(file, "the run replayed a plan, or was made before recipes were kept")
    return from_data(report["as_recipe"], str(file))


def _none(file: Path, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_RECIPE,
        "this run has no recipe",
        at=str(file),
        why=why,
        try_="the folder of a prune by recipe or options; plans are replayed with --plan",
    )
