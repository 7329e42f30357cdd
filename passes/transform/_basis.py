"""What changes of basis share: maps put on the indices of an axis, in whatever carries it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgeon.plugin import Axis, Context


@dataclass
class Changed:
    """Tensors in the making: those that were changed before are read as they are now.

    Attributes:
        weights: reads a parameter.
        found: by name, in fp32: all of a model may be among them.
    """

    weights: Callable[[str], Any]
    found: dict[str, Any] = field(default_factory=dict[str, Any])

    def read(self, param: str) -> Any:
        """Returns a parameter as it is now, float64."""
        return (self.found[param] if param in self.found else self.weights(param)).double()

    def along(self, param: str, dim: int, groups: Any, maps: Any) -> None:
        """Puts maps on the indices of an axis within one dimension of a parameter.

        Args:
            param: its name.
            dim: the dimension.
            groups: [n, size, g], the places of each index; each of the g places is a copy.
            maps: [n, size, size], from the old to the new.
        """
        import torch

        places = torch.from_numpy(groups)
        tensor = self.read(param).movedim(dim, 0).clone()
        tensor[places] = torch.einsum("nij,njg...->nig...", maps, tensor[places])
        self.found[param] = tensor.movedim(0, dim).float().contiguous()


def open_to_change(context: Context) -> list[Axis]:
    """Returns the axes that are not pinned, and of these the ones that may be cut."""
    budget = context.budget.axes
    return [a for a in context.axes.axes if a.prunable and (not budget or a.name in budget)]


def flat(groups: Any) -> Any:
    """Returns places [*outer, size, g] as [n, size, g]."""
    return groups.reshape(-1, *groups.shape[-2:])


def shared(context: Context, params: Sequence[str]) -> str | None:
    """Returns the first of some parameters that several operations read."""
    readers = context.program.readers
    return next((param for param in params if len(readers.get(param, ())) > 1), None)
