"""The published table of what holds of which architecture, measured again for a few rows."""

from __future__ import annotations

import pytest

from tools.conformance.measure import Cell, Line, measure
from tools.conformance.sweep import shrunk
from tools.conformance.table import HEAD, NAMES, Table, read, row, text, updated, worse

AGAIN = ("Glm", "Mixtral", "Bert", "ResNet")
"""Pairs side by side, experts, attention without a mask, convolutions: what no other test has."""

FOUND = Line(
    "Glm",
    {
        "ffn": Cell("class", "", 1e-7, False, 2e-7),
        "hidden": Cell("graph", "no field | so", 1e-7, True),
    },
    pt2=0.0,
    onnx="no kernel",
)


@pytest.mark.zoo
@pytest.mark.parametrize("name", AGAIN)
def test_no_cell_of_the_published_table_is_worse_than_it_says(name: str):
    # Graphs are measured by tests of their own; a row is compared without them.
    published = {**read().cells(name), "pt2": "", "ONNX": ""}
    found = row(measure(name, graphs=False))
    assert worse(published, dict(zip(HEAD, found, strict=True))) == []


def test_a_row_is_read_back_as_it_was_written(tmp_path):
    path = tmp_path / "table.md"
    path.write_text(text(updated(Table(), [FOUND])), encoding="utf-8")
    table = read(path)
    assert table.cells("Glm") == dict(zip(HEAD, row(FOUND), strict=True))
    assert table.cells("Glm")["hidden"] == "graph~" and table.cells("Glm")["ONNX"] == "refused"
    assert text(table) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("before", "now", "lost"),
    [
        ("class", "file", True),
        ("class", "class~", True),
        ("graph", "wrong", True),
        ("graph", "pinned", True),
        ("pinned", "wrong", True),
        ("graph", "class", False),
        ("pinned", "graph~", False),
        ("", "graph", False),
        ("graph", "", True),
    ],
)
def test_what_is_worse_than_what(before: str, now: str, lost: bool):
    plain = dict.fromkeys(HEAD, "")
    found = worse({**plain, "ffn": before}, {**plain, "ffn": now})
    assert bool(found) == lost


def test_a_graph_that_is_no_longer_written_is_worse():
    plain = dict.fromkeys(HEAD, "")
    assert worse({**plain, "ONNX": "4e-07 ort"}, {**plain, "ONNX": "refused"})
    assert not worse({**plain, "ONNX": "refused"}, {**plain, "ONNX": "refused"})


def test_published_rows_are_of_known_architectures():
    assert set(read().rows) <= set(NAMES)


def test_a_configuration_is_shrunk_in_depth_only():
    fields = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "layer_types": ["full"] * 32,
        "n_routed_experts": 256,
        "text_config": {"n_layer": 12, "vocab_size": 50000},
    }
    assert shrunk(fields) == {
        "hidden_size": 4096,
        "num_hidden_layers": 2,
        "layer_types": ["full", "full"],
        "n_routed_experts": 16,
        "text_config": {"n_layer": 2, "vocab_size": 50000},
    }
