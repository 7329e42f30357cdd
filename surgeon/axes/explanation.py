"""Explanations as data: links of a chain, what a channel takes with it, why an axis stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgeon.axes.axes import Axis
from surgeon.axes.costs import Cost
from surgeon.axes.graph import Place
from surgeon.axes.words import explanation_html, explanation_text


@dataclass(frozen=True, slots=True)
class Link:
    """One step of a chain: an operation makes two dimensions one axis.

    Attributes:
        left: the dimension before, in words.
        right: the dimension after, in words.
        target: the operation.
        says: its rule, in words.
        where: module, value and source line.
        source: file and line in the model's code.
        meets: whether two streams of activations come together in this operation.
        places: both dimensions as nodes of the coupling graph.
    """

    left: str
    right: str
    target: str
    says: str
    where: str
    source: str
    meets: bool
    places: tuple[Place, Place]

    @property
    def short(self) -> str:
        """The operation's name without its namespace and overload."""
        return self.target.split(".")[1] if "." in self.target else self.target

    def to_json(self) -> dict[str, Any]:
        """Returns the step as plain data."""
        return {
            "from": self.left,
            "to": self.right,
            "op": self.target,
            "says": self.says,
            "where": self.where,
            "source": self.source,
            "meets": self.meets,
        }


@dataclass(frozen=True, slots=True)
class Chain:
    """The shortest chain of operations that makes two dimensions carry one axis."""

    axis: str
    size: int
    start: str
    links: tuple[Link, ...]

    @property
    def meeting(self) -> tuple[Link, ...]:
        """The steps where two streams of activations come together, one for each operation."""
        return tuple({link.where: link for link in self.links if link.meets}.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the chain as plain data."""
        return {
            "axis": self.axis,
            "size": self.size,
            "from": self.start,
            "steps": [link.to_json() for link in self.links],
        }


@dataclass(frozen=True, slots=True)
class Lost:
    """What one dimension, of size `size`, of one tensor loses: `ranges` are inclusive."""

    param: str
    dim: int
    rank: int
    size: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """How many rows, columns or slices go."""
        return sum(last - first + 1 for first, last in self.ranges)

    def to_json(self) -> dict[str, Any]:
        """Returns the loss as plain data."""
        ranges = [list(r) for r in self.ranges]
        return {"param": self.param, "dim": self.dim, "size": self.size, "ranges": ranges}


@dataclass(frozen=True, slots=True)
class Removal:
    """Everything that goes when one index of an axis goes; `cost` is what that saves."""

    index: int
    lost: tuple[Lost, ...]
    cost: Cost
    per: str

    def to_json(self) -> dict[str, Any]:
        """Returns the removal as plain data."""
        saved = {**self.cost.to_json(), "per": self.per}
        return {"channel": self.index, "saves": saved, "lost": [x.to_json() for x in self.lost]}


@dataclass(frozen=True, slots=True)
class Pin:
    """One reason why an axis has to stay, and the chain that leads to it."""

    why: str
    where: str
    start: str
    links: tuple[Link, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns the reason as plain data."""
        steps = [link.to_json() for link in self.links]
        return {"why": self.why, "where": self.where, "from": self.start, "steps": steps}


@dataclass(frozen=True, slots=True)
class About:
    """One axis: what may be selected, what goes with one of its indices, and what pins it."""

    axis: Axis
    select: str
    removal: Removal
    pins: tuple[Pin, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {
            "axis": self.axis.name,
            "role": self.axis.role,
            "size": self.axis.size,
            "prunable": self.axis.prunable,
            "select": self.select,
            "inexact": [f"{r.why} ({r.where})" for r in self.axis.inexact],
            "pins": [pin.to_json() for pin in self.pins],
            **self.removal.to_json(),
        }


@dataclass(frozen=True)
class Explanation:
    """An answer in words and as data.

    Attributes:
        a: what was asked about, by its full name.
        b: what it was compared with, or None.
        chains: one for each axis that both carry; empty if they aren't coupled.
        about: the axes that `a` carries, where nothing is compared.
        notes: what else there is to say.
    """

    a: str
    b: str | None = None
    chains: tuple[Chain, ...] = ()
    about: tuple[About, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def coupled(self) -> bool:
        """Whether both carry a common axis."""
        return bool(self.chains)

    def to_json(self) -> dict[str, Any]:
        """Returns the explanation as plain data."""
        if self.b is None:
            about = [found.to_json() for found in self.about]
            return {"a": self.a, "axes": about, "notes": list(self.notes)}
        chains = [chain.to_json() for chain in self.chains]
        return {
            "a": self.a,
            "b": self.b,
            "coupled": self.coupled,
            "chains": chains,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return explanation_text(self)

    def _repr_html_(self) -> str:
        return explanation_html(self)
