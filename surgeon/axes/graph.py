"""The coupling graph: which places of which tensors an operation has made one and the same.

Nodes are places: one axis in one dimension of one tensor (a dimension may carry several, and one
axis more than once). Edges are what operations equate, with the operation. Connected components
are the axes, shortest paths the proofs of a coupling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import networkx as nx

from surgeon.axes.space import Expr, Sum, leaves

if TYPE_CHECKING:
    from surgeon.axes.analysis import Facts


@dataclass(frozen=True, slots=True)
class Place:
    """One axis in one dimension of one tensor.

    Attributes:
        tensor: `$parameter`, `%value`, or `op:label` for an axis that an operation made.
        dim: the dimension.
        position: which of the axes in that dimension, counted row-major.
    """

    tensor: str
    dim: int
    position: int

    def __str__(self) -> str:
        return f"{self.tensor}:{self.dim}" + (f"[{self.position}]" if self.position else "")


@dataclass(frozen=True, slots=True)
class Step:
    """One link of a proof: two places and the operation that makes them one."""

    left: Place
    right: Place
    op: int


def coupling_graph(facts: Facts) -> nx.Graph[Any]:
    """Returns the coupling graph; nodes carry `axis`, edges the `op` index that made them."""
    graph: nx.Graph[Any] = nx.Graph()
    owner = {axis: (name, dim) for (name, dim), axis in facts.slots.items()}
    for (op, label), expr in facts.labels.items():
        for axis in expr:
            if isinstance(axis, int):
                owner.setdefault(axis, (f"{facts.program.ops[op].outputs[0]}:{label}", 0))
    resolve = facts.space.resolve

    def places(expr: Expr) -> Iterator[tuple[Place, int]]:
        for factor in expr:
            if isinstance(factor, Sum):
                for part in factor.parts:
                    yield from places(part)
                continue
            tensor, dim = owner[factor]
            for position, axis in enumerate(leaves(resolve((factor,)))):
                yield Place(tensor, dim, position), axis

    for axis in owner:
        for place, atom in places((axis,)):
            graph.add_node(place, axis=atom)
    failed = {id(equation) for equation, _ in facts.failed}
    for equation in facts.equations:
        if id(equation) in failed:
            continue
        for (a, _), (b, _) in zip(places(equation.left), places(equation.right), strict=True):
            if a != b:
                graph.add_edge(a, b, op=equation.op)
    return graph


def proof(graph: nx.Graph[Any], left: Place, right: Place) -> tuple[Step, ...] | None:
    """Returns the shortest chain of operations that couples two places, or None."""
    try:
        path = nx.shortest_path(graph, left, right)
    except (nx.NetworkXNoPath, nx.NodeNotFound):
        return None
    return tuple(Step(a, b, graph.edges[a, b]["op"]) for a, b in pairwise(path))
