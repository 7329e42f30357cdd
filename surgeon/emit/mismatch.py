"""What is said of a written file that doesn't hold what its plan gives."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from surgeon.errors import Code, SurgeonError

_REWRITE = "write it again; if it was edited, it is no longer this plan's result"


def differs(place: Path, name: str, why: str, try_: str = _REWRITE) -> SurgeonError:
    """Returns the error of a tensor or field that isn't what it should be."""
    return SurgeonError(
        Code.VERIFY_FAILED, f"{name} is not what the plan gives", at=str(place), why=why, try_=try_
    )


def not_the_plans(folder: Path, name: str) -> SurgeonError:
    """Returns the error of a checkpoint's tensor that isn't the plan applied to the source."""
    return differs(
        folder,
        name,
        "the stored tensor differs from the plan applied to the source",
        "prune again; if the folder was edited, it is no longer this plan's result",
    )


def foreign(folder: Path, names: Collection[str], by: str) -> SurgeonError:
    """Returns the error of tensors in a checkpoint that belong to no result of the plan.

    Args:
        folder: of the checkpoint.
        names: of these tensors.
        by: what says that they don't belong, as in `its model does not have`.
    """
    return SurgeonError(
        Code.VERIFY_FAILED,
        f"{min(names)} does not belong to the plan's result",
        at=str(folder),
        why=f"the checkpoint holds {len(names)} tensors that {by}",
        try_="prune again",
    )
