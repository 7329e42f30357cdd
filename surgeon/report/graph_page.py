"""A model's graphs as one page: everything in one file, and no request leaves it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.axes.space import leaves
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import ParamRef, op_refs
from surgeon.report.colours import shade
from surgeon.report.graph_data import elements, reasons, removed_shares, type_text

PAGE_VIEWS = ("axes", "program")
SCRIPTS = ("model.js", "layout.js", "view.js", "panel.js", "page.js")
STOPS = 9
"""Colours of the scale that the page gets; it mixes what lies between."""


class _Strings:
    """Texts that occur often, each written once."""

    def __init__(self) -> None:
        self.number: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.number.setdefault(text, len(self.number))


def check_page_view(view: str) -> None:
    """Refuses a view that the page doesn't draw.

    Raises:
        SurgeonError: `bad-option`.
    """
    if view not in PAGE_VIEWS:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"a page doesn't open with the graph of {view!r}",
            at="--of",
            why="it draws axes and program, and shows the coupling as members and proofs",
            try_="--of axes, or another format: .graphml, .json or .dot",
        )


def page_data(axes: Axes, plan: Plan | None = None, view: str = "axes") -> dict[str, Any]:
    """Returns what the page is told: operations, parameters, axes and the coupling graph."""
    program = axes.program
    strings = _Strings()
    by_axis, by_param = removed_shares(axes, plan)
    given = {"%" + i.name: n for n, i in enumerate(program.inputs)}
    given |= {"$" + p.name: len(given) + n for n, p in enumerate(program.params)}
    ops: list[Any] = []
    for index, op in enumerate(program.ops):
        names = (("$" if isinstance(r, ParamRef) else "%") + r.name for r in op_refs(op))
        reads = [given[name] for name in dict.fromkeys(names)]
        kind = "; ".join(type_text(t) for t in op.types)
        ops.append([*map(strings, (op.target, op.module, op.source, kind)), op.outputs, reads])
        first = len(program.inputs) + len(program.params)
        given |= dict.fromkeys(("%" + name for name in op.outputs), first + index)
    number = {axis.name: n for n, axis in enumerate(axes.axes)}
    param_number = {p.name: n for n, p in enumerate(program.params)}
    return {
        "view": view,
        "pruned": plan is not None,
        "summary": _summary(axes, by_axis),
        "scale": [_rgb(shade(n / (STOPS - 1))) for n in range(STOPS)],
        "inputs": [[i.name, type_text(i.type)] for i in program.inputs],
        "params": [
            {
                "name": p.name,
                "type": type_text(p.type),
                "shape": p.type.shape,
                "elements": elements(p.type.shape),
                "aliases": p.aliases,
                "dims": [
                    {
                        "text": axes.text(expr),
                        "axes": [
                            number[axes.numbered[a].name]
                            for a in dict.fromkeys(leaves(expr))
                            if a in axes.numbered
                        ],
                    }
                    for expr in axes.param_dims(p.name)
                ],
                **({"removed": round(by_param[p.name], 4)} if plan else {}),
            }
            for p in program.params
        ],
        "ops": ops,
        "barriers": axes.facts.barriers,
        "gone": _gone(axes, plan),
        "axes": [_axis(axes, axis, param_number, by_axis) for axis in axes.axes],
        "coupling": _coupling(axes, number),
        "strings": list(strings.number),
    }


def _summary(axes: Axes, removed: Mapping[str, float]) -> str:
    free = sum(axis.prunable for axis in axes.axes)
    text = (
        f"{len(axes.axes):,} axes, {free:,} of them prunable; {len(axes.program.params):,} "
        f"parameters; {len(axes.program.ops):,} operations"
    )
    touched = sum(share > 0 for share in removed.values())
    return text + (f"; {touched:,} axes are narrower now" if removed else "")


def _rgb(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _gone(axes: Axes, plan: Plan | None) -> list[int]:
    """Operations that go with dropped branches."""
    names = set(plan.branches) if plan else set[str]()
    return sorted({op for b in axes.branches if b.name in names for op in b.ops})


def _axis(
    axes: Axes, axis: Axis, param_number: Mapping[str, int], removed: Mapping[str, float]
) -> dict[str, Any]:
    """An axis, and what goes with one index of it."""
    one = Selection(axes, Plan((cut(axis, range(axis.size - 1)),)))
    lost = 0
    for name in dict.fromkeys(m.param for m in axis.members):
        lost += elements(axes.program.param[name].type.shape) - elements(one.shape(name))
    members: list[dict[str, int]] = []
    for m in axis.members:
        expr = axes.param_dims(m.param)[m.dim]
        lines = one.full_width(expr) - one.width(expr)
        members.append({"param": param_number[m.param], "dim": m.dim, "lines": lines})
    out: dict[str, Any] = {
        "name": axis.name,
        "role": axis.role,
        "size": axis.size,
        "scope": axis.scope,
        "outer": axis.outer,
        "gauge": axis.gauge.text,
        "pins": reasons(axis.pins),
        "inexact": reasons(axis.inexact),
        "lost": lost,
        "members": members,
    }
    if removed:
        share = removed[axis.name]
        out |= {"removed": round(share, 4), "kept": round(axis.size * (1 - share))}
    return out


def _coupling(axes: Axes, number: Mapping[str, int]) -> dict[str, Any]:
    """The coupling graph as flat lists of numbers, less what has no axis (dynamic sizes)."""
    tensors = _Strings()
    index: dict[Any, int] = {}
    places: list[int] = []
    for place, data in axes.graph.nodes(data=True):
        axis = axes.numbered.get(data["axis"])
        if axis is not None:
            index[place] = len(index)
            places += [tensors(place.tensor), place.dim, place.position, number[axis.name]]
    edges: list[int] = []
    for left, right, op in axes.graph.edges(data="op"):
        if left in index:
            edges += [index[left], index[right], op]
    return {"tensors": list(tensors.number), "places": places, "edges": edges}


def _read(name: str) -> str:
    return files("surgeon.report").joinpath("web", name).read_text(encoding="utf-8")


def filled(template: str, parts: Mapping[str, str]) -> str:
    """Returns a template with each `{{name}}` replaced once, whatever the parts contain."""
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def page(axes: Axes, title: str, plan: Plan | None = None, view: str = "axes") -> str:
    """Returns the page of a model.

    Args:
        axes: the analysis.
        title: what the model is called.
        plan: what a prune removed of it, shown as colour.
        view: the graph it opens with, `axes` or `program`.

    Raises:
        SurgeonError: `bad-option` for another view.
    """
    check_page_view(view)
    data = json.dumps(page_data(axes, plan, view), ensure_ascii=False, separators=(",", ":"))
    stops = ", ".join(shade(n / (STOPS - 1)) for n in range(STOPS))
    parts = {
        "title": escape(title),
        "css": filled(_read("page.css"), {"scale": f"linear-gradient(to right, {stops})"}),
        "data": data.replace("<", "\\u003c"),
        "library": _read("cytoscape.js"),
        "script": "\n".join(_read(name) for name in SCRIPTS),
    }
    return filled(_read("page.html"), parts)
