"""The graphs of a model as plain `networkx` graphs, whose attributes every file format can hold.

Three views of one analysis. `axes`: axes and the parameters that carry them. `coupling`: every
place of every tensor and the operation that makes two of them one. `program`: the captured
operations and what flows between them.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from math import prod
from typing import Any, TypeAlias

import networkx as nx

from surgeon.axes.axes import Axes, Axis, Reason
from surgeon.axes.graph import Place
from surgeon.axes.plan import Plan, Selection, dropped
from surgeon.errors import Code, SurgeonError, near
from surgeon.ir.program import ParamRef, Program, Ref, Size, TensorType, op_refs

Graph: TypeAlias = "nx.Graph[Any]"


def type_text(type_: TensorType) -> str:
    """Returns an element type and shape as `f32[batch, seq, 64]`."""
    return f"{type_.dtype}[{', '.join(map(str, type_.shape))}]"


def module_of(param: str) -> str:
    """Returns the path of the module that owns a parameter."""
    return param.rpartition(".")[0]


def elements(shape: tuple[Size, ...]) -> int:
    """Returns the number of elements of a shape without dynamic sizes."""
    return prod(size for size in shape if isinstance(size, int))


def reasons(found: tuple[Reason, ...]) -> list[str]:
    """Returns reasons as sentences, each with its place, without repeats."""
    return list(dict.fromkeys(f"{r.why} ({r.where})" if r.where else r.why for r in found))


def removed_shares(axes: Axes, plan: Plan | None) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the share of every axis and of every parameter that a plan removes."""
    if plan is None:
        return {}, {}
    selection, gone = Selection(axes, plan), dropped(axes, plan)
    params: dict[str, float] = {}
    for p in axes.program.params:
        before = elements(p.type.shape)
        left = () if p.name in gone else selection.parts(p.name)
        after = sum(elements(selection.shape(part)) for part in left)
        params[p.name] = 1 - after / before if before else 0.0
    shares: dict[str, float] = {}
    for axis in axes.axes:
        kept = selection.size(axes.number[axis.name])
        assert isinstance(kept, int)
        whole = all(m.param in gone for m in axis.members)
        shares[axis.name] = 1.0 if whole else 1 - kept / axis.size
    return shares, params


def _axis_attributes(axis: Axis) -> dict[str, Any]:
    return {
        "kind": "axis",
        "label": f"{axis.name}:{axis.size}",
        "role": axis.role,
        "size": axis.size,
        "module": axis.scope,
        "prunable": axis.prunable,
        "exact": axis.exact,
        "gauge": axis.gauge.text,
        "outer": ", ".join(axis.outer),
        "pins": "; ".join(reasons(axis.pins)),
    }


def axes_graph(axes: Axes, plan: Plan | None = None) -> Graph:
    """Returns axes and the parameters that carry them, one edge for each such dimension."""
    graph: Graph = nx.MultiGraph(view="axes")
    by_axis, by_param = removed_shares(axes, plan)
    for p in axes.program.params:
        if not axes.param_dims(p.name):
            continue
        graph.add_node(
            "$" + p.name,
            kind="parameter",
            label=p.name,
            module=module_of(p.name),
            type=type_text(p.type),
            axes=", ".join(axes.text(expr) for expr in axes.param_dims(p.name)),
            **({"removed": by_param[p.name]} if plan else {}),
        )
    for axis in axes.axes:
        more = {"removed": by_axis[axis.name]} if plan else {}
        graph.add_node(axis.name, **_axis_attributes(axis), **more)
        for member in axis.members:
            graph.add_edge(axis.name, "$" + member.param, key=member.dim, dim=member.dim)
    return graph


def _origin(program: Program) -> Callable[[str], tuple[str, str]]:
    """A function from a tensor's name, with its sigil, to its kind and module."""
    inputs = {i.name for i in program.inputs}

    def origin(tensor: str) -> tuple[str, str]:
        name = tensor[1:]
        if tensor.startswith("$"):
            return "parameter", module_of(name)
        if tensor.startswith("%") and name in inputs:
            return "input", ""
        value = name if tensor.startswith("%") else tensor.partition(":")[0]
        kind = "value" if tensor.startswith("%") else "made"
        return kind, program.ops[program.producer[value]].module

    return origin


def coupling_graph(axes: Axes) -> Graph:
    """Returns the coupling graph: a node is a place, an edge the operation that makes two one.

    A node is called as `Place` prints it: tensor, dimension, and the axis' position within it.
    """
    graph: Graph = nx.Graph(view="coupling")
    origin = _origin(axes.program)
    place: Place
    for place, data in axes.graph.nodes(data=True):
        axis = axes.numbered.get(data["axis"])
        kind, module = origin(place.tensor)
        graph.add_node(
            str(place),
            kind=kind,
            label=str(place),
            module=module,
            tensor=place.tensor,
            dim=place.dim,
            position=place.position,
            axis=axis.name if axis else f"#{data['axis']}",
            role=axis.role if axis else "",
            size=str(axis.size if axis else axes.sizes.get(data["axis"], "dynamic")),
            prunable=bool(axis and axis.prunable),
        )
    for left, right, index in axes.graph.edges(data="op"):
        op = axes.program.ops[index]
        graph.add_edge(
            str(left), str(right), op=index, target=op.target, module=op.module, source=op.source
        )
    return graph


def program_graph(axes: Axes, plan: Plan | None = None) -> Graph:
    """Returns operations, parameters and inputs; an edge is a value that one gives another."""
    graph: Graph = nx.MultiDiGraph(view="program")
    program = axes.program
    _, by_param = removed_shares(axes, plan)

    def dims(name: str) -> str:
        return ", ".join(axes.text(expr) for expr in axes.dims.get(name, ()))

    for given in program.inputs:
        name = "%" + given.name
        graph.add_node(name, kind="input", label=name, module="", type=type_text(given.type))
    for p in program.params:
        graph.add_node(
            "$" + p.name,
            kind=p.kind,
            label=p.name,
            module=module_of(p.name),
            type=type_text(p.type),
            axes=dims("$" + p.name),
            **({"removed": by_param[p.name]} if plan else {}),
        )
    made: dict[str, str] = {}
    barriers = set(axes.facts.barriers)
    for index, op in enumerate(program.ops):
        node = "%" + op.outputs[0]
        graph.add_node(
            node,
            kind="operation",
            label=op.target.removeprefix("aten."),
            module=op.module,
            target=op.target,
            source=op.source,
            index=index,
            type="; ".join(type_text(t) for t in op.types),
            axes="; ".join(dims("%" + name) for name in op.outputs),
            barrier=index in barriers,
            output=any(name in program.outputs for name in op.outputs),
        )
        made |= dict.fromkeys(op.outputs, node)
        for ref in op_refs(op):
            name = ("$" if isinstance(ref, ParamRef) else "%") + ref.name
            source = made.get(ref.name, name) if isinstance(ref, Ref) else name
            graph.add_edge(source, node, key=name, value=name)
    return graph


VIEWS: dict[str, str] = {
    "axes": "axes and the parameters that carry them",
    "coupling": "every place of every tensor and the operations that tie them",
    "program": "the captured operations",
}
"""What can be asked for, and what it is."""


def check_view(view: str) -> None:
    """Refuses a view that doesn't exist.

    Raises:
        SurgeonError: `bad-option`.
    """
    if view not in VIEWS:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"there is no graph of {view!r}",
            at="--of",
            why="a model has " + ", ".join(f"{name} ({what})" for name, what in VIEWS.items()),
            try_=near(view, VIEWS),
        )


def build(axes: Axes, view: str, plan: Plan | None = None, within: str | None = None) -> Graph:
    """Returns one view of a model.

    Args:
        axes: the analysis.
        view: `axes`, `coupling` or `program`.
        plan: what was removed: `axes` and `program` then carry the share as `removed`.
        within: a module path or a glob over such paths; what lies elsewhere is left out, save
            what an edge ties to a node inside.

    Raises:
        SurgeonError: `bad-option` where there is no such view, or nothing lies within.
    """
    check_view(view)
    if view == "coupling":
        graph = coupling_graph(axes)
    else:
        graph = axes_graph(axes, plan) if view == "axes" else program_graph(axes, plan)
    return graph if within is None else _within(graph, within)


def _within(graph: Graph, pattern: str) -> Graph:
    modules = nx.get_node_attributes(graph, "module")
    inside = {
        node
        for node, module in modules.items()
        if module == pattern or module.startswith(pattern + ".") or fnmatchcase(module, pattern)
    }
    if not inside:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"nothing lies within {pattern!r}",
            at="--within",
            why="no module path of this graph is that, starts with it, or matches it",
            try_=_modules_like(pattern, {m for m in modules.values() if m}),
        )
    undirected = graph.to_undirected(as_view=True)
    around = {other for node in inside for other in undirected[node]}
    found = graph.subgraph(inside | around).copy()
    # Of what only surrounds them, the ties among themselves belong to other modules.
    found.remove_edges_from(
        [edge for edge in found.edges if edge[0] not in inside and edge[1] not in inside]
    )
    return found


def _modules_like(pattern: str, known: set[str]) -> str:
    if not known:
        return "leave it out: this model has no modules"
    close = near(pattern, known)
    shortest = sorted(known, key=lambda m: (m.count("."), m))[:6]
    return close if len(close) < 400 else "such as " + ", ".join(shortest)
