"""How a checkpoint's weights are stored in fewer bits, and what goes together with what."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgeon.emit.lowbit.grid import SMALLEST
from surgeon.errors import Code, SurgeonError, near

SCHEMES = ("int8", "w8", "int4")
LIBRARY = {"int8": "torchao", "w8": "torchao", "int4": "compressed_tensors"}
"""The package that reads the weights when Transformers loads them."""

GROUP = 32


@dataclass(frozen=True)
class Scheme:
    """How the weights of maps are stored.

    Attributes:
        scheme: `int8` stores 8 bits with one scale for a row, and rounds activations to 8 bits
            with one scale for a token while it runs; `w8` stores the same and leaves activations
            alone; `int4` stores 4 bits with one scale for a few neighbours of a row.
        group: of `int4`, neighbours that share a scale; fewer where it doesn't divide a row. 32
            without it.
        embeddings: whether the embedding's table and the head are stored so too (8 bits only).
    """

    scheme: str
    group: int | None = None
    embeddings: bool = False

    def __post_init__(self) -> None:
        """Refuses what doesn't exist."""
        if self.scheme not in SCHEMES:
            raise _bad(
                f"there is no scheme {self.scheme!r}",
                "--quantize",
                f"weights are stored as {', '.join(SCHEMES)}",
                near(self.scheme, SCHEMES),
            )
        if self.group is not None and self.scheme != "int4":
            raise _bad(
                f"{self.scheme} has no groups",
                f"group {self.group}",
                "with 8 bits all weights of a row share a scale",
                "leave group out, or take int4",
            )
        if self.group is not None and self.group < SMALLEST:
            raise _bad(
                f"a group can't have {self.group} weights",
                f"group {self.group}",
                f"with fewer than {SMALLEST}, scales take as much room as what they save",
                f"group {GROUP}",
            )
        if self.embeddings and self.scheme == "int4":
            raise _bad(
                "int4 leaves embeddings as they are",
                "embeddings",
                "compressed-tensors unpacks maps when they run, and no lookup in a table",
                "leave embeddings out, or take w8",
            )

    @property
    def size(self) -> int:
        """Weights that share a scale, where they are fewer than a row."""
        return self.group or GROUP

    @property
    def library(self) -> str:
        """The package that stores and reads the weights."""
        return LIBRARY[self.scheme]

    def need_library(self) -> None:
        """Refuses where the package isn't installed.

        Raises:
            SurgeonError: `missing-extra`.
        """
        need_library(self.library, f"--quantize {self.scheme}")

    def to_data(self) -> dict[str, Any]:
        """Returns it as a recipe writes it."""
        found: dict[str, Any] = {"scheme": self.scheme}
        if self.scheme == "int4":
            found["group"] = self.size
        return {**found, "embeddings": True} if self.embeddings else found


def need_library(name: str, at: str) -> None:
    """Refuses where one of the packages that read such weights is needed and isn't installed.

    Args:
        name: of a package, or what `config.json` calls it; any other is passed over.
        at: what needs it.

    Raises:
        SurgeonError: `missing-extra`.
    """
    package = name.replace("-", "_")
    if package in LIBRARY.values() and importlib.util.find_spec(package) is None:
        raise SurgeonError(
            Code.MISSING_EXTRA,
            f"{name} is not installed",
            at=at,
            why="it stores such weights, and Transformers reads them with it",
            try_='pip install "model-surgeon[quantize]"',
        )


def scheme_of(given: str | Mapping[str, Any] | Scheme | None) -> Scheme | None:
    """Returns what a name or a recipe's keys say; None says nothing.

    Raises:
        SurgeonError: `bad-option` for what doesn't exist.
    """
    if given is None or isinstance(given, Scheme):
        return given
    data: dict[str, Any] = {"scheme": given} if isinstance(given, str) else dict(given)
    known = {"scheme": str, "group": int, "embeddings": bool}
    for key, value in data.items():
        if key not in known:
            raise _bad(
                f"quantisation has no option {key!r}",
                "--quantize-option",
                f"its options are {', '.join(known)}",
                near(key, known),
            )
        if value is not None and type(value) is not known[key]:
            raise _bad(
                f"{key} can't be {value!r}",
                f"--quantize-option {key}",
                f"it is of type {known[key].__name__}",
                "such as group=64 or embeddings=true",
            )
    if "scheme" not in data:
        raise _bad(
            "nothing says how to quantise",
            "--quantize-option",
            "an option belongs to a scheme",
            f"--quantize with {', '.join(SCHEMES)}",
        )
    return Scheme(**data)


def _bad(what: str, at: str, why: str, try_: str) -> SurgeonError:
    return SurgeonError(Code.BAD_OPTION, what, at=at, why=why, try_=try_)
