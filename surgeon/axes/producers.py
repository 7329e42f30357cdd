"""Which maps make an axis, and which one ends a branch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.branches import Branch
from surgeon.axes.channels import along
from surgeon.axes.consumers import together
from surgeon.axes.contractions import Contraction, contractions
from surgeon.ir.program import ParamRef, Ref, op_refs

EMBEDDING = "aten.embedding.default"


@dataclass(frozen=True)
class Producer:
    """A map whose outputs carry an axis.

    Attributes:
        param: its weight, of two dimensions.
        dim: the weight's dimension that is not summed over, or that of an embedding's rows.
        groups: [*outer sizes, size, g]: the outputs that go with each index of the axis. Where the
            weight doesn't carry an enclosing axis, that dimension is 1.
        bias: the parameter that the map adds to its outputs, if it has one.
    """

    param: str
    dim: int
    groups: NDArray[np.int64]
    bias: str | None = None


def producers(axes: Axes, axis: Axis) -> tuple[Producer, ...]:
    """Returns the maps and embeddings whose outputs carry an axis, each once, embeddings first."""
    out: dict[str, Producer] = {}
    carried = {(member.param, member.dim) for member in axis.members}
    tables = [op.arg(0) for op in axes.program.ops if op.target == EMBEDDING]
    made = [(table.name, 1, None) for table in tables if isinstance(table, ParamRef)]
    made += [(found.param, 1 - found.dim, found.bias) for found in contractions(axes.program)]
    for param, dim, bias in made:
        dims = axes.param_dims(param)
        if len(dims) == 2 and (param, dim) in carried and param not in out:
            out[param] = Producer(param, dim, together(along(axes, axis, dims[dim])), bias)
    return tuple(out.values())


def ending(axes: Axes, branch: Branch) -> Contraction | None:
    """Returns the map that everything which a branch adds comes from; None where several do."""
    program = axes.program
    made = {found.out: found for found in contractions(program)}
    start = program.ops[branch.add].arg(branch.operand)
    found: dict[str, Contraction] = {}
    seen: set[str] = set()
    queue = [start.name] if isinstance(start, Ref) else []
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in made:
            found[name] = made[name]
            continue
        index = program.producer.get(name)
        if index not in branch.ops:
            return None  # something reaches the sum without a map in between
        queue += [r.name for r in op_refs(program.ops[index]) if isinstance(r, Ref)]
    return next(iter(found.values())) if len(found) == 1 else None
