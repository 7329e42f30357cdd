"""Graphs as files: GraphML, node-link JSON, DOT, SVG, PNG. The name's extension says which."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import networkx as nx

from surgeon.errors import Code, SurgeonError, near
from surgeon.report.graph_data import Graph
from surgeon.report.graph_layout import fill, svg

FORMATS: dict[str, str] = {
    ".html": "a page to search, fold and click in, for any browser",
    ".graphml": "GraphML, for Gephi, yEd, Cytoscape or networkx",
    ".json": "node-link JSON, for networkx or d3",
    ".dot": "DOT, for Graphviz",
    ".svg": "a picture",
    ".png": "a picture",
}
LAYOUTS = ("graphviz", "networkx")
PICTURE_NODES = 2500
"""Nodes beyond which no picture is made: Graphviz would take minutes, and nobody could read it."""
SECONDS = 300


def check_format(file: Path, layout: str) -> str:
    """Returns the extension of a file to be written, in lower case.

    Raises:
        SurgeonError: `bad-option` where the extension or the layout doesn't exist.
    """
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"no graph is written as {suffix!r}" if suffix else "the file's name has no extension",
            at=str(file),
            why="the extension says what to write: "
            + ", ".join(f"{name} ({what})" for name, what in FORMATS.items()),
            try_=near(suffix, FORMATS) if suffix else f"{file.name or 'graph'}.html",
        )
    if layout not in LAYOUTS:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"there is no layout {layout!r}",
            at="--layout",
            why="pictures are laid out by Graphviz, or by networkx where that isn't installed",
            try_=near(layout, LAYOUTS),
        )
    if suffix in (".svg", ".png") and layout == "graphviz":
        _dot_program()
    if suffix == ".png" and layout == "networkx":
        _cairosvg()
    return suffix


def write_graph(graph: Graph, suffix: str, layout: str = "graphviz") -> bytes:
    """Returns a graph as the content of a file.

    Args:
        graph: a view of a model, as `graph_data.build` gives it.
        suffix: `.graphml`, `.json`, `.dot`, `.svg` or `.png`.
        layout: of pictures: `graphviz` or `networkx`.

    Raises:
        SurgeonError: `missing-extra` where a picture needs what isn't installed, `bad-option` where
            it would be too large, `runtime-failed` where Graphviz fails.
    """
    if suffix == ".graphml":
        out = io.BytesIO()
        nx.write_graphml_xml(graph, out)
        return out.getvalue()
    if suffix == ".json":
        data = nx.node_link_data(graph, edges="edges")
        return (json.dumps(data, ensure_ascii=False, indent=0) + "\n").encode()
    if suffix == ".dot":
        return dot(graph).encode()
    if len(graph) > PICTURE_NODES:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"a picture of {len(graph):,} nodes can't be read",
            at=suffix,
            why=f"pictures have {PICTURE_NODES:,} nodes at most",
            try_="--within a module, --of axes, or a page: .html folds what isn't looked at",
        )
    if layout == "graphviz":
        return _graphviz(dot(graph), suffix)
    text = svg(graph).encode()
    return text if suffix == ".svg" else _cairosvg().svg2png(bytestring=text)


def _quoted(text: object) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _id(node: object) -> str:
    """A node's name in DOT, where Graphviz keeps names that start with % for itself."""
    text = str(node)
    return _quoted("value " + text[1:] if text.startswith("%") else text)


def dot(graph: Graph) -> str:
    """Returns a graph in the DOT language, modules as nested clusters."""
    directed = graph.is_directed()
    lines = [
        ("digraph" if directed else "graph") + " {",
        f"  rankdir={'TB' if directed else 'LR'}; compound=true; newrank=true;",
        '  node [shape=box, style="filled", fontname="Helvetica", fontsize=10, color="#555555"];',
        '  edge [color="#77777799", fontname="Helvetica", fontsize=9];',
    ]
    modules: dict[str, list[Any]] = {}
    for node, data in graph.nodes(data=True):
        modules.setdefault(data["module"], []).append(node)
    children: dict[str, set[str]] = {}
    for path in modules:
        while path:
            parent = path.rpartition(".")[0]
            children.setdefault(parent, set()).add(path)
            path = parent

    def module(path: str, indent: str) -> None:
        for node in modules.get(path, ()):
            lines.append(indent + _dot_node(node, graph.nodes[node]))
        for child in sorted(children.get(path, ()), key=_natural):
            lines.append(f"{indent}subgraph {_quoted('cluster ' + child)} {{")
            name = child[len(path) :].lstrip(".")
            lines.append(f'{indent}  label={_quoted(name)}; color="#aaaaaa"; fontcolor="#555555";')
            module(child, indent + "  ")
            lines.append(indent + "}")

    module("", "  ")
    arrow = "->" if directed else "--"
    for left, right, data in graph.edges(data=True):
        shown = {k: v for k, v in data.items() if v != ""}
        facts = ", ".join(f"{k}={_quoted(v)}" for k, v in shown.items())
        lines.append(f"  {_id(left)} {arrow} {_id(right)} [{facts}];")
    return "\n".join([*lines, "}"]) + "\n"


def _natural(path: str) -> tuple[tuple[int, str], ...]:
    """Sorts layer 10 after layer 9."""
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in path.split("."))


def _dot_node(node: Any, data: dict[str, Any]) -> str:
    shown = {k: v for k, v in data.items() if v != "" and k not in ("label", "size")}
    if "size" in data:
        shown["channels"] = data["size"]
    facts = [f"{k}={_quoted(v)}" for k, v in shown.items()]
    looks = [f"label={_quoted(data['label'])}", f"fillcolor={_quoted(fill(data))}"]
    if data["kind"] == "axis":
        looks.append("shape=ellipse")
    if data.get("barrier") or data.get("pins"):
        looks.append('style="filled,dashed"')
    return f"{_id(node)} [{', '.join([*looks, *facts])}];"


def _dot_program() -> str:
    found = shutil.which("dot")
    if found is None:
        raise SurgeonError(
            Code.MISSING_EXTRA,
            "Graphviz is not installed",
            at="its program `dot`, which is not on the PATH",
            why="it lays out SVG and PNG pictures",
            try_="install Graphviz; or --layout networkx, which needs nothing; or write .html",
        )
    return found


def _graphviz(text: str, suffix: str) -> bytes:
    try:
        done = subprocess.run(
            [_dot_program(), "-T" + suffix[1:]],
            input=text.encode(),
            capture_output=True,
            check=True,
            timeout=SECONDS,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = (error.stderr or b"").decode(errors="replace").strip().replace("\n", "; ")
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            "Graphviz made no picture",
            at="dot -T" + suffix[1:],
            why=said or f"it took more than {SECONDS} s",
            try_="--within a module, or --layout networkx",
        ) from error
    return done.stdout


def _cairosvg() -> Any:
    try:
        import cairosvg  # pyright: ignore[reportMissingImports]
    except (ImportError, OSError) as error:  # OSError: the cairo library itself is missing
        raise SurgeonError(
            Code.MISSING_EXTRA,
            "a PNG without Graphviz needs cairosvg",
            at=".png with --layout networkx",
            why=str(error).splitlines()[0],
            try_="pip install cairosvg; or write .svg, which needs nothing",
        ) from error
    return cairosvg
