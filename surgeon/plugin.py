"""What a plug-in is written against. A plug-in imports this module and nothing else of Surgeon.

A plug-in is a package named by an entry point in group `surgeon.plugins`. Its folders `score`,
`select`, `compensate` and `transform` hold one pass per file; the file's name is the pass's name.
Each such file defines one frozen dataclass that derives from the base class of its kind. The fields
of the dataclass, with their types, defaults and docstrings, are the pass's recipe keys and
command-line options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Scores = Mapping[str, NDArray[np.float64]]
    Kept = Mapping[str, NDArray[np.int64]]

__all__ = [
    "KINDS",
    "Code",
    "CompensatePass",
    "Context",
    "Pass",
    "ScorePass",
    "SelectPass",
    "SurgeonError",
    "TransformPass",
]


class Context(Protocol):
    """What the driver hands to a pass: the program, its axes, and what the pass said it needs."""

    @property
    def program(self) -> Any:
        """The captured program: operations and parameters as metadata, no tensors."""
        ...

    @property
    def axes(self) -> Any:
        """The axes found in the program, by name, with their members, uses, gauges and pins."""
        ...

    @property
    def weights(self) -> Mapping[str, Any]:
        """The tensors by parameter name, read when asked for."""
        ...


class Pass(ABC):  # noqa: B024  (each kind adds the method that it is called by)
    """Any pass. Its options are its dataclass fields; `needs` says what the driver must supply."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Such as `weights`, `gradients` or `activations: second moment`."""


class ScorePass(Pass):
    """Gives every index of every axis a number; the lowest are removed first."""

    @abstractmethod
    def score(self, context: Context) -> Scores:
        """Returns by axis name a float64 array of shape [*outer sizes, size]."""


class SelectPass(Pass):
    """Turns scores and a budget into the indices that are kept."""

    @abstractmethod
    def select(self, context: Context, scores: Scores, budget: Any) -> Kept:
        """Returns by axis name the kept indices, ascending, of shape [*outer sizes, kept]."""


class CompensatePass(Pass):
    """Makes up for what is removed by changing what is kept."""

    @abstractmethod
    def compensate(self, context: Context, kept: Kept) -> Mapping[str, Any]:
        """Returns by parameter name the linear rewrite to apply before slicing."""


class TransformPass(Pass):
    """Changes the program or its weights without removing an index by itself."""

    @abstractmethod
    def transform(self, context: Context) -> Mapping[str, Any]:
        """Returns by parameter name what replaces it."""


KINDS: Mapping[str, type[Pass]] = {
    "score": ScorePass,
    "select": SelectPass,
    "compensate": CompensatePass,
    "transform": TransformPass,
}
"""The base class of each kind of pass; the names are those of a plug-in's folders."""
