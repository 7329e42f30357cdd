"""What a prune did, as a picture and as a page."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import surgeon
from surgeon.report.colours import ink, shade
from surgeon.report.heatmap import heatmap, layer_of
from surgeon.report.page import command, report_page
from tests import models
from tests.command import checkpoint
from tests.command import surgeon as run

SVG = "{http://www.w3.org/2000/svg}"


def axis(name: str, before: int, after: int) -> dict[str, Any]:
    return {"name": name, "role": name.rpartition("/")[2], "before": before, "after": after}


AXES = [
    axis("model/hidden", 64, 64),
    axis("model.layers.0.attn/heads", 4, 4),
    axis("model.layers.0.mlp/ffn", 100, 40),
    axis("model.layers.10.mlp/ffn", 100, 90),
    axis("model.layers.2.mlp/ffn", 100, 100),
    axis("model.layers.2.experts.0/ffn", 50, 0),
]


def cells(svg: str) -> dict[str, tuple[str, str]]:
    """What each cell says and its colour, by what it is of."""
    out: dict[str, tuple[str, str]] = {}
    for group in ElementTree.fromstring(svg).iter(SVG + "g"):
        title, rect, text = group
        names = [line.partition(":")[0] for line in str(title.text).splitlines()]
        out[" ".join(names)] = (str(text.text), str(rect.get("fill")))
    return out


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.self_attn/kv_heads", 3),
        ("transformer.h.11.mlp/ffn~2", 11),
        ("0/width", 0),
        ("model/hidden", None),
        ("hidden", None),
        ("model.conv1d/width", None),
        ("net.2.experts.7/ffn", 2),
    ],
)
def test_an_axis_lies_in_a_layer(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_a_cell_is_what_is_left() -> None:
    found = cells(heatmap(AXES))
    assert found["model/hidden"] == ("64", shade(0))
    assert found["model.layers.0.mlp/ffn"] == ("40", shade(0.6))
    assert found["model.layers.10.mlp/ffn"] == ("90", shade(1 - 90 / 100))
    both = found["model.layers.2.mlp/ffn model.layers.2.experts.0/ffn"]
    assert both == ("0–100", shade(1 - 100 / 150))


def test_layers_stand_in_order_and_do_not_overlap() -> None:
    root = ElementTree.fromstring(heatmap(AXES))
    heads = [t for t in root.findall(SVG + "text") if t.get("text-anchor") == "middle"]
    assert [t.text for t in heads] == ["all", "0", "2", "10"]
    rects = [
        tuple(float(r.get(k) or 0) for k in ("x", "y", "width", "height"))
        for r in root.iter(SVG + "rect")
    ]
    for i, (x, y, w, _) in enumerate(rects):
        assert x + w <= float(root.get("width") or 0)
        assert all(y != y2 or x >= x2 + w2 or x2 >= x + w for x2, y2, w2, _ in rects[:i])


def test_what_went_with_a_branch_is_gone() -> None:
    found = cells(heatmap(AXES, {"model.layers.10.mlp/ffn"}))
    assert found["model.layers.10.mlp/ffn"] == ("0", shade(1))


def test_a_model_without_layers_or_axes_has_a_picture() -> None:
    assert len(cells(heatmap([axis("hidden", 4, 2)]))) == 1
    assert cells(heatmap([])) == {}


def test_the_scale_goes_from_light_to_dark() -> None:
    def light(colour: str) -> float:
        assert re.fullmatch("#[0-9a-f]{6}", colour)
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    shares = [n / 50 for n in range(51)]
    steps = [light(shade(s)) for s in shares]
    assert steps == sorted(steps, reverse=True) and steps[0] > 0.9 and steps[-1] < 0.25
    assert all(abs(light(shade(s)) - light(ink(s))) > 0.35 for s in shares)
    assert shade(-1) == shade(0) and shade(2) == shade(1)


# --- the page of a prune -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    source = checkpoint(folder / "llama & co", models.tiny("Llama"))
    roles = {"ffn": 0.25, "layers": 0.5}
    surgeon.prune(str(source), roles=roles, verify=False).save(folder / "o", verify=False)
    return folder / "o"


def test_a_prune_leaves_a_page(pruned: Path) -> None:
    report = json.loads((pruned / "surgeon.json").read_text())
    page = (pruned / "report.html").read_text()
    assert "llama &amp; co" in page and "llama & co" not in page
    for name in report["branches"]:
        assert name in page
    for text in (f"{report['parameters']['total']['after']:,}", "score/magnitude"):
        assert text in page
    assert "prefers-color-scheme: dark" in page
    assert not re.search(r"(src|href)=", page) and "<script" not in page
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    lost = {b.partition("/")[0] for b in report["branches"]}
    for name, (text, _) in cells(svg).items():
        if any(name.startswith(layer + ".") for layer in lost):
            assert text == "0", name
        elif name.endswith("/ffn"):
            assert text == "60", name


def test_the_command_on_the_page_makes_the_same_again(
    pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads((pruned / "surgeon.json").read_text())
    words = shlex.split(command(report))
    assert words[0] == "surgeon"
    monkeypatch.chdir(pruned)
    made = run(*words[1:], "--no-verify")
    assert made.code == 0, made.err
    again = (pruned / "again" / "model.safetensors").read_bytes()
    assert again == (pruned / "model.safetensors").read_bytes()


def test_a_comparison_is_told() -> None:
    report: dict[str, Any] = {
        "source": {"id": "m", "fingerprint": "f"},
        "recipe": [{"pass": "replay", "options": {}}],
        "parameters": {"total": {"before": 10, "after": 5}},
        "ratio": {"removed": 0.5},
        "axes": AXES,
        "branches": [],
        "seconds": {"plan": 0.5},
        "versions": {"torch": "2"},
        "notes": ["<a note>"],
        "target": {"name": "onnx", "bytes": 2**20},
        "verification": {
            "largest": 2e-6,
            "tolerance": 1e-4,
            "probes": [{"probe": "random", "largest": 2e-6}],
            "reasons": ["softmax"],
            "cast": 0.25,
        },
    }
    page = report_page(report)
    for text in ("2.0e-06", "1e-04", "2.5e-01", "softmax", "&lt;a note&gt;", "1.0 MiB", "50.0 %"):
        assert text in page, text
    assert "--to onnx" in page
    assert "--no-verify" in report_page({**report, "verification": None})


def test_a_graph_target_has_the_page_too(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
    pruned = surgeon.prune(net, ratio=0.3, example_inputs=(torch.randn(5, 6),), verify=False)
    pruned.save(tmp_path / "o", verify=False)
    page = (tmp_path / "o" / "report.html").read_text()
    assert "<svg" in page and "example_inputs=example_inputs" in page
    assert "surgeon prune module" not in page  # no such thing can be given to the command
