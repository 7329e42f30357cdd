"""A model's graphs as files for other tools, as pictures and as a page."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from torch import nn

from surgeon.axes import Axes
from surgeon.axes.plan import Plan, cut
from surgeon.errors import SurgeonError
from surgeon.ir import Ref
from surgeon.ir.program import op_refs
from surgeon.opening import open_model
from surgeon.report import graph_data, graph_files, graph_layout, graph_page
from tests import models
from tests.command import surgeon
from tests.refusals import refused

pytestmark = pytest.mark.slow

SVG = "{http://www.w3.org/2000/svg}"
VIEWS = tuple(graph_data.VIEWS)


@pytest.fixture(scope="module")
def axes() -> Axes:
    return open_model(models.tiny("Llama")).axes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    models.tiny("Llama").config.save_pretrained(folder)
    return folder / "config.json"


class Rolled(nn.Module):
    """Two linears with an operation between them that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.special.bessel_j0(self.up(x)))


@pytest.fixture(scope="module")
def barrier() -> Axes:
    return open_model(Rolled(), example_inputs=(torch.randn(5, 6),)).axes


# --- data ----------------------------------------------------------------------------------------


def read(content: bytes, suffix: str, path: Path) -> Any:
    if suffix == ".json":
        return nx.node_link_graph(json.loads(content), edges="edges")
    path.write_bytes(content)
    return nx.read_graphml(path)


@pytest.mark.parametrize("suffix", [".graphml", ".json"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_file_is_read_back_as_the_same_graph(
    axes: Axes, view: str, suffix: str, tmp_path: Path
) -> None:
    graph = graph_data.build(axes, view)
    back = read(graph_files.write_graph(graph, suffix), suffix, tmp_path / "g")
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert back.is_directed() == graph.is_directed()
    ends = [sorted(map(str, e)) for e in graph.edges()]
    assert sorted(sorted(map(str, e)) for e in back.edges()) == sorted(ends)


def test_the_coupling_file_proves_what_the_analysis_proves(axes: Axes) -> None:
    graph = graph_data.build(axes, "coupling")
    assert len(graph) == len(axes.graph) and graph.size() == axes.graph.size()
    for found in nx.connected_components(graph):
        assert len({graph.nodes[node]["axis"] for node in found}) == 1
    layer = "$model.layers.1.self_attn"
    path = nx.shortest_path(graph, f"{layer}.q_proj.weight:0", f"{layer}.k_proj.weight:0")
    made = [graph.edges[a, b] for a, b in nx.utils.pairwise(path)]
    assert "surgeon.attention" in {edge["target"] for edge in made}
    assert all(edge["source"].startswith("modeling_llama.py:") for edge in made)


def test_the_axes_file_has_every_member(axes: Axes) -> None:
    graph = graph_data.build(axes, "axes")
    told = {(*sorted((a, b), reverse=True), k) for a, b, k in graph.edges(keys=True)}
    told = {(axis, param[1:], dim) for axis, param, dim in told}
    assert told == {(a.name, m.param, m.dim) for a in axes.axes for m in a.members}
    assert graph.nodes["model.layers.0.mlp/ffn"]["size"] == 80
    assert not graph.nodes["model.embed_tokens/vocab"]["prunable"]


def test_the_program_file_has_every_value_that_flows(axes: Axes) -> None:
    graph = graph_data.build(axes, "program")
    ops = [d for _, d in graph.nodes(data=True) if d["kind"] == "operation"]
    assert [d["target"] for d in sorted(ops, key=lambda d: d["index"])] == [
        op.target for op in axes.program.ops
    ]
    reads = sum(len({(isinstance(r, Ref), r.name) for r in op_refs(op)}) for op in axes.program.ops)
    assert graph.size() == reads
    assert nx.is_directed_acyclic_graph(graph)
    assert sum(d["output"] for d in ops) == 1


def test_within_keeps_a_module_and_its_ties(axes: Axes) -> None:
    found = graph_data.build(axes, "axes", within="model.layers.1.mlp")
    params = {n for n, d in found.nodes(data=True) if d["kind"] == "parameter"}
    assert params == {f"$model.layers.1.mlp.{n}_proj.weight" for n in ("gate", "up", "down")}
    assert set(found) - params == {"model.layers.1.mlp/ffn", "hidden"}
    assert found.degree("hidden") == 3
    by_glob = graph_data.build(axes, "axes", within="model.layers.?.mlp*")
    assert by_glob.degree("hidden") == 6


def test_a_plan_is_shown_as_the_share_that_goes(axes: Axes) -> None:
    ffn = axes.get("model.layers.0.mlp/ffn")
    plan = Plan((cut(ffn, range(20)),), ("model.layers.1/mlp",))
    shares = nx.get_node_attributes(graph_data.build(axes, "axes", plan), "removed")
    assert shares[ffn.name] == 0.75 == shares["$model.layers.0.mlp.up_proj.weight"]
    assert shares["model.layers.1.mlp/ffn"] == 1 == shares["$model.layers.1.mlp.up_proj.weight"]
    assert shares["hidden"] == 0 == shares["$model.norm.weight"]
    data = graph_page.page_data(axes, plan)
    dropped = next(b for b in axes.branches if b.name == "model.layers.1/mlp")
    assert data["gone"] == sorted(dropped.ops)
    assert {a["name"]: a["kept"] for a in data["axes"]}[ffn.name] == 20


# --- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["axes", "program"])
def test_a_picture_without_graphviz_shows_every_node_beside_the_others(
    axes: Axes, view: str
) -> None:
    graph = graph_data.build(axes, view)
    root = ElementTree.fromstring(graph_layout.svg(graph))
    shown = [text.text for text in root.iter(SVG + "text")]
    assert sorted(map(str, shown)) == sorted(d["label"] for d in graph.nodes.values())
    assert len(root.findall(SVG + "path")) == graph.size()
    boxes = [
        [float(r.get(k) or 0) for k in ("x", "y", "width", "height")]
        for r in root.iter(SVG + "rect")
        if r.get("rx")
    ]
    assert len(boxes) == len(graph)
    for i, (x, y, w, h) in enumerate(boxes):
        for x2, y2, w2, h2 in boxes[:i]:
            assert x >= x2 + w2 or x2 >= x + w or y >= y2 + h2 or y2 >= y + h


def test_nothing_in_a_name_breaks_a_picture() -> None:
    graph: Any = nx.DiGraph()
    for name in ('a"b\\', "<c>&"):
        graph.add_node(name, kind="operation", label=name, module="m", note="x\ny")
    graph.add_edge('a"b\\', "<c>&", value='"')
    ElementTree.fromstring(graph_layout.svg(graph))
    text = graph_files.dot(graph)
    assert '"a\\"b\\\\" -> "<c>&" [value="\\""];' in text
    if shutil.which("dot"):
        assert b"&lt;c&gt;&amp;" in graph_files.write_graph(graph, ".svg")


def test_a_picture_that_nobody_could_read_is_refused() -> None:
    graph: Any = nx.path_graph(graph_files.PICTURE_NODES + 1)
    with pytest.raises(SurgeonError, match=r"bad-option.*2,501 nodes"):
        graph_files.write_graph(graph, ".svg", "networkx")


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
@pytest.mark.parametrize(("view", "suffix"), [("axes", ".png"), ("program", ".svg")])
def test_graphviz_draws(axes: Axes, view: str, suffix: str) -> None:
    graph = graph_data.build(axes, view, within="model.layers.0.mlp")
    content = graph_files.write_graph(graph, suffix)
    if suffix == ".png":
        assert content.startswith(b"\x89PNG")
    else:
        titles = [t.text for t in ElementTree.fromstring(content).iter(SVG + "title")]
        names = {node: node.replace("%", "value ") for node in graph}
        assert set(names.values()) <= set(titles)
        assert {f"{names[a]}->{names[b]}" for a, b in graph.edges()} <= set(titles)


def test_without_graphviz_a_picture_says_what_to_do(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = surgeon("graph", config, "-o", tmp_path / "g.svg")
    refused(outcome, "missing-extra", "Graphviz is not installed", "--layout networkx")
    assert not list(tmp_path.iterdir())
    done = surgeon("graph", config, "-o", tmp_path / "g.svg", "--layout", "networkx")
    assert done.code == 0, done.err
    assert ElementTree.parse(tmp_path / "g.svg").getroot().tag == SVG + "svg"


def test_a_png_without_graphviz_needs_one_package(
    axes: Axes, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("graph", config, "-o", tmp_path / "g.png", "--layout", "networkx")
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    refused(surgeon(*arguments), "missing-extra", "pip install cairosvg")
    fake = types.SimpleNamespace(svg2png=lambda bytestring: b"PNG of " + bytestring[:4])
    monkeypatch.setitem(sys.modules, "cairosvg", fake)
    graph = graph_data.build(axes, "axes")
    assert graph_files.write_graph(graph, ".png", "networkx") == b"PNG of <svg"


# --- the page ------------------------------------------------------------------------------------


class Parts(HTMLParser):
    """Collects what a page refers to, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.scripts: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for key, value in attrs if key in ("src", "href")]
        if tag == "script":
            self.scripts.append("")
            self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "script"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def test_the_page_is_one_file_with_everything_in_it(axes: Axes) -> None:
    text = graph_page.page(axes, "a </script><b>model</b>")
    parts = Parts(text)
    assert parts.links == [] and len(parts.scripts) == 3
    assert "{{" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    data = json.loads(parts.scripts[0])
    assert data == json.loads(json.dumps(graph_page.page_data(axes)))
    assert [a["name"] for a in data["axes"]] == [a.name for a in axes.axes]
    assert "<b>model</b>" not in text
    assert "default-src 'none'" in text


def test_the_page_is_told_what_goes_with_one_index(axes: Axes) -> None:
    data = graph_page.page_data(axes)
    params = [p["name"] for p in data["params"]]
    told = {
        a["name"]: {(params[m["param"]], m["dim"]): m["lines"] for m in a["members"]}
        for a in data["axes"]
    }
    layer = "model.layers.0.self_attn"
    assert told[f"{layer}/kv_heads"] == {
        (f"{layer}.q_proj.weight", 0): 16,
        (f"{layer}.k_proj.weight", 0): 8,
        (f"{layer}.v_proj.weight", 0): 8,
        (f"{layer}.o_proj.weight", 1): 16,
    }
    lost = next(a["lost"] for a in data["axes"] if a["name"] == f"{layer}/kv_heads")
    assert lost == (16 + 8 + 8 + 16) * 48


def test_the_page_has_the_coupling_of_every_axis(axes: Axes) -> None:
    coupling = graph_page.page_data(axes)["coupling"]
    places, edges = coupling["places"], coupling["edges"]
    ours = [p for p in axes.graph if axes.graph.nodes[p]["axis"] in axes.numbered]
    assert len(places) == 4 * len(ours)
    assert len(edges) == 3 * axes.graph.subgraph(ours).size()
    assert set(places[3::4]) == set(range(len(axes.axes)))


def test_the_library_is_shipped_with_its_licence() -> None:
    web = files("surgeon.report").joinpath("web")
    licence = web.joinpath("cytoscape.LICENSE.txt").read_text()
    assert "The Cytoscape Consortium" in licence and "Permission is hereby granted" in licence
    assert "self.cytoscape = " in web.joinpath("cytoscape.js").read_text()


# --- odd models ----------------------------------------------------------------------------------


def test_a_barrier_is_marked(barrier: Axes) -> None:
    assert barrier.facts.barriers, "the operation has a rule now: take another for this test"
    graph = graph_data.build(barrier, "program")
    marked = [d["target"] for d in graph.nodes.values() if d.get("barrier")]
    assert marked == ["aten.special_bessel_j0.default"]
    assert "stroke-dasharray" in graph_layout.svg(graph)
    data = graph_page.page_data(barrier)
    assert data["barriers"] == barrier.facts.barriers
    stuck = [a for a in data["axes"] if a["size"] == 9]
    assert stuck and all("no axis rule for" in a["pins"][0] for a in stuck)
    for view in VIEWS:
        for suffix in (".graphml", ".json", ".dot"):
            assert graph_files.write_graph(graph_data.build(barrier, view), suffix)


def test_a_model_without_layers_has_graphs(tmp_path: Path) -> None:
    settings = models.config("Llama", num_hidden_layers=0)
    settings.architectures = ["LlamaForCausalLM"]
    settings.save_pretrained(tmp_path)
    for name in ("g.html", "g.graphml", "g.json", "g.dot"):
        found = surgeon("graph", tmp_path / "config.json", "-o", tmp_path / name)
        assert found.code == 0, found.err
        assert found.out.startswith(str(tmp_path / name))
    shown = ("--layout", "networkx", "--of", "program")
    found = surgeon("graph", tmp_path / "config.json", "-o", tmp_path / "g.svg", *shown)
    assert found.code == 0, found.err


def test_an_empty_graph_is_drawn() -> None:
    for kind in (nx.Graph, nx.MultiDiGraph):
        ElementTree.fromstring(graph_layout.svg(kind()))


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "code", "texts"),
    [
        ("g.htm", (), "bad-option", ["'.htm'", "did you mean .html"]),
        ("g.graphm", (), "bad-option", ["did you mean .graphml"]),
        ("g.xlsx", (), "bad-option", [".graphml", ".png"]),
        ("graph", (), "bad-option", ["no extension", "graph.html"]),
        ("g.dot", ("--of", "axis"), "bad-option", ["'axis'", "did you mean axes?"]),
        ("g.svg", ("--layout", "networks"), "bad-option", ["did you mean networkx?"]),
        ("g.html", ("--of", "coupling"), "bad-option", [".graphml"]),
        ("g.html", ("--within", "model"), "bad-option", ["--within"]),
        ("g.dot", ("--within", "model.layer.1"), "bad-option", ["model.layers.1"]),
        ("g.dot", ("--source", "smollm2"), "bad-option", ["plan.json"]),
        ("file/g.dot", (), "bad-output", ["file"]),
        ("file", (), "bad-option", ["no extension"]),
        ("old.dot", (), "bad-output", ["the file exists"]),
    ],
)
def test_a_mistake_leaves_nothing(
    config: Path, tmp_path: Path, name: str, arguments: Any, code: str, texts: list[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "old.dot").write_text("mine")
    refused(surgeon("graph", config, "-o", tmp_path / name, *arguments), code, *texts)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "file": "mine",
        "old.dot": "mine",
    }


def test_an_old_file_is_replaced_when_asked(config: Path, tmp_path: Path) -> None:
    (tmp_path / "g.dot").write_text("mine")
    found = surgeon("graph", config, "-o", tmp_path / "g.dot", "--overwrite")
    assert found.code == 0, found.err
    assert (tmp_path / "g.dot").read_text().startswith("graph {")


def test_a_pruned_folder_whose_model_is_gone_says_so(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    plan = Plan(source=(("id", str(tmp_path / "moved")),))
    (tmp_path / "p" / "plan.json").write_text(plan.to_json())
    outcome = surgeon("graph", tmp_path / "p", "-o", tmp_path / "g.html")
    refused(outcome, "not-a-model", "moved", "--source")
