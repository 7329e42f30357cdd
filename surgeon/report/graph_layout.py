"""Pictures of a graph without Graphviz: places by `networkx`, drawn as SVG."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import networkx as nx

from surgeon.report.colours import shade
from surgeon.report.graph_data import Graph

Point = tuple[float, float]

FILL = {
    "parameter": "#cfe2f8",
    "buffer": "#cfe2f8",
    "computed": "#e4e4f4",
    "constant": "#e4e4f4",
    "input": "#d3efd6",
    "operation": "#f3f3f3",
    "axis": "#fde3b8",
    "value": "#f3f3f3",
    "made": "#fde3b8",
}
"""Colours of nodes by kind, for black text."""

HEIGHT, GAP_X, GAP_Y, MARGIN = 26.0, 24.0, 48.0, 20.0


def fill(data: dict[str, Any]) -> str:
    """Returns the colour of a node: what a plan removed of it where one is shown, or its kind."""
    if "removed" in data:
        return shade(data["removed"])
    return FILL.get(data["kind"], "#ffffff")


def width(label: str) -> float:
    """Returns the width of a node with this label, in pixels."""
    return 7.0 * len(label) + 18


def _ranks(graph: Graph) -> dict[Any, int]:
    """Rows: operations below what they read; axes beside the parameters that carry them."""
    if not isinstance(graph, nx.DiGraph):
        return {
            node: int(data["kind"] not in ("parameter", "input"))
            for node, data in graph.nodes(data=True)
        }
    ranks: dict[Any, int] = {}
    generations: Iterable[list[Any]] = nx.topological_generations(graph)
    for rank, found in enumerate(generations):
        ranks |= dict.fromkeys(found, rank)
    for node in graph:  # what nothing feeds stands just above its first reader
        if not graph.in_degree(node) and graph.out_degree(node):
            ranks[node] = min(ranks[other] for other in graph.successors(node)) - 1
    return ranks


def places(graph: Graph) -> dict[Any, Point]:
    """Returns the centre of every node, in pixels: in rows, none over another.

    `networkx` gives the order within each row and its own spacing, which the labels' widths
    then stretch.
    """
    ranks = _ranks(graph)
    nx.set_node_attributes(graph, ranks, "rank")
    at = nx.multipartite_layout(graph, subset_key="rank", align="horizontal")
    for data in graph.nodes.values():
        del data["rank"]
    rows: dict[int, list[Any]] = {}
    for node in sorted(graph, key=lambda n: float(at[n][0])):
        rows.setdefault(ranks[node], []).append(node)
    if not graph.is_directed():
        return _columns(graph, rows)
    out: dict[Any, Point] = {}
    for y, rank in enumerate(sorted(rows)):
        total = sum(width(graph.nodes[n]["label"]) + GAP_X for n in rows[rank]) - GAP_X
        x = -total / 2
        for node in rows[rank]:
            own = width(graph.nodes[node]["label"])
            out[node] = (x + own / 2, y * (HEIGHT + GAP_Y))
            x += own + GAP_X
    return out


def _columns(graph: Graph, rows: dict[int, list[Any]]) -> dict[Any, Point]:
    """Two sides, one below another, since their names are long."""
    out: dict[Any, Point] = {}
    x, tallest = 0.0, max((len(found) for found in rows.values()), default=0)
    order = {node: i for i, node in enumerate(graph)}
    for rank in sorted(rows):
        widest = max(width(graph.nodes[n]["label"]) for n in rows[rank])
        step = (HEIGHT + 14) * tallest / len(rows[rank])
        for i, node in enumerate(sorted(rows[rank], key=order.__getitem__)):
            out[node] = (x + widest / 2, (i + 0.5) * step)
        x += widest + 240
    return out


def svg(graph: Graph) -> str:
    """Returns a picture of a graph as SVG text."""
    at = places(graph)
    nodes = [(node, *at[node], graph.nodes[node]) for node in graph]
    left = min((x - width(d["label"]) / 2 for _, x, _, d in nodes), default=0.0) - MARGIN
    right = max((x + width(d["label"]) / 2 for _, x, _, d in nodes), default=0.0) + MARGIN
    top = min((y for _, _, y, _ in nodes), default=0.0) - HEIGHT / 2 - MARGIN
    bottom = max((y for _, _, y, _ in nodes), default=0.0) + HEIGHT / 2 + MARGIN
    size = f"{right - left:.0f}", f"{bottom - top:.0f}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="{left:.0f} {top:.0f} {size[0]} {size[1]}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="11.5">',
        '<defs><marker id="to" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="#777"/></marker></defs>',
        f'<rect x="{left:.0f}" y="{top:.0f}" width="100%" height="100%" fill="#fff"/>',
    ]
    lines += [_edge(graph, at, *edge) for edge in graph.edges(data=True)]
    lines += [_node(*node) for node in nodes]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _edge(graph: Graph, at: dict[Any, Point], a: Any, b: Any, data: dict[str, Any]) -> str:
    (x1, y1), (x2, y2) = at[a], at[b]
    title = data.get("value") or data.get("target") or f"dimension {data.get('dim', '')}"
    arrow = ""
    if graph.is_directed():
        y1, y2, arrow = y1 + HEIGHT / 2, y2 - HEIGHT / 2, ' marker-end="url(#to)"'
        middle = (y1 + y2) / 2
        path = f"M{x1:.1f} {y1:.1f}C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {y2:.1f}"
    else:
        path = f"M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"
    return (
        f'<path d="{path}" fill="none" stroke="#777" stroke-opacity="0.6"{arrow}>'
        f"<title>{escape(str(title))}</title></path>"
    )


def _node(name: Any, x: float, y: float, data: dict[str, Any]) -> str:
    own = width(data["label"])
    facts = [f"{key}: {value}" for key, value in data.items() if key != "label" and value != ""]
    dashed = ' stroke-dasharray="4 3"' if data.get("barrier") or data.get("pins") else ""
    radius = HEIGHT / 2 if data["kind"] == "axis" else 4
    return (
        f'<g><title>{escape(chr(10).join([str(name), *facts]))}</title><rect x="{x - own / 2:.1f}" '
        f'y="{y - HEIGHT / 2:.1f}" width="{own:.1f}" height="{HEIGHT:.0f}" rx="{radius:.0f}" '
        f'fill="{fill(data)}" stroke="#555"{dashed}/><text x="{x:.1f}" y="{y + 4:.1f}" '
        f'text-anchor="middle" fill="#111">{escape(data["label"])}</text></g>'
    )
