"""The weights that may be made sparse: what something is multiplied or convolved with."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from surgeon.plugin import Context, ParamRef, Selection, contractions, dropped

_CONVOLVES = frozenset(
    f"aten.conv{n}d.{overload}" for n in (1, 2, 3) for overload in ("default", "padding")
)
"""Operations whose second operand is a kernel [out, in over groups, *places]."""


@dataclass(frozen=True)
class Matrix:
    """What is left of one weight after a plan, as rows that each make one output.

    Attributes:
        param: its name.
        dim: its dimension that is summed over.
        kernel: whether it is a convolution's.
        selection: which of its rows and columns are left.
    """

    param: str
    dim: int
    kernel: bool
    selection: Selection

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter after the plan."""
        return self.selection.shape(self.param)

    @property
    def inputs(self) -> Any:
        """The numbers of the inputs that are left, or None for all of them."""
        return self.selection.kept(self.param)[self.dim]

    @property
    def outputs(self) -> Any:
        """The numbers of a map's outputs that are left, or None for all of them."""
        return self.selection.kept(self.param)[0 if self.kernel else 1 - self.dim]

    @property
    def separable(self) -> bool:
        """Whether every row has the same inputs left."""
        return self.selection.separable(self.param)

    @property
    def size(self) -> int:
        """How many weights are left."""
        return prod(self.shape)

    @cached_property
    def _whole(self) -> bool:
        return all(kept is None for kept in self.selection.kept(self.param))

    def take(self, full: Any) -> Any:
        """Returns what is left of the full-size tensor, [out, runs, d]."""
        import torch

        left = full
        if not self._whole:
            flat = torch.from_numpy(self.selection.flat(self.param))
            left = full.reshape(-1)[flat].reshape(self.shape)
        if self.kernel:
            return left.movedim(1, -1).flatten(1, -2)
        return (left if self.dim == 1 else left.T)[:, None]

    def put(self, full: Any, rows: Any) -> Any:
        """Returns the full-size tensor, fp32, with what is left replaced by [out, runs, d]."""
        import torch

        if self.kernel:
            places = self.shape[2:]
            left = rows.unflatten(1, places).movedim(-1, 1)
        else:
            left = rows[:, 0] if self.dim == 1 else rows[:, 0].T
        if self._whole:
            return left.float().contiguous()
        flat = torch.from_numpy(self.selection.flat(self.param))
        out = full.float().clone().reshape(-1)
        out[flat] = left.float().reshape(-1)
        return out.reshape(full.shape)


def matrices(context: Context) -> tuple[Matrix, ...]:
    """Returns the weights of maps and convolutions that may change, in the program's order.

    An embedding's table stays what it is, and so do the map to the logits of a language model,
    whether it is that table or not, and maps that are products of two by now.

    Raises:
        SurgeonError: `bad-option` where there are none.
    """
    axes, program, budget = context.axes, context.program, context.budget
    found = {c.param: (c.dim, False, c.out) for c in contractions(program)}
    uses = [c.param for c in contractions(program)]
    for op in program.ops:
        kernel = op.arg(1) if op.target in _CONVOLVES else None
        if isinstance(kernel, ParamRef):
            found[kernel.name] = (1, True, op.outputs[0])
            uses.append(kernel.name)
    words = axes.of_role("vocab")
    tables = {m.param for axis in words for m in axis.members}
    gone = dropped(axes, context.plan)
    selection = Selection(axes, context.plan)
    out: list[Matrix] = []
    for param, (dim, kernel, made) in found.items():
        elsewhere = len(program.readers[param]) != uses.count(param)
        head = bool(words) and made in program.outputs
        if elsewhere or head or param in tables or param in gone or param in context.factored:
            continue
        if budget.counted and param not in budget.counted:
            continue
        if budget.params is None or param in budget.params:
            out.append(Matrix(param, dim, kernel, selection))
    if not out:
        raise context.unable(
            "the weights", "nothing that is multiplied or convolved with an input may change"
        )
    return tuple(out)
