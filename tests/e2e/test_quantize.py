"""`surgeon export --quantize`, as a user runs it, and where its nodes go on a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from surgeon.emit.onnx_decoder import Options, write_decoder
from surgeon.emit.quantize.scheme import Scheme
from tests.command import surgeon
from tests.refusals import refused
from tests.unit.test_emit_pt2 import captured
from tools import cuda_placement
from tools.cuda_placement import CPU, Placement, placements

pytestmark = pytest.mark.slow

POSITIONS = ("--positions", "64")


def test_a_folder_reports_what_quantisation_cost(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = surgeon("export", llama, "--to", "onnx", "--quantize", "w8", *POSITIONS, "-o", out)
    assert found.code == 0, found.err
    report = json.loads((out / "surgeon.json").read_text())
    cost = report["target"]["quantize"]
    assert (cost["scheme"], cost["block_size"], cost["shared_table"]) == ("w8", 32, False)
    assert cost["embedding"]["bytes_after"] < cost["embedding"]["bytes_before"] / 2
    assert cost["perplexity"]["after"] == pytest.approx(cost["perplexity"]["before"], rel=0.1)
    assert cost["perplexity"]["after"] != cost["perplexity"]["before"]
    assert f"{cost['perplexity']['after']:.3f} after" in found.out
    assert "head: " in found.out
    evaluated = surgeon(
        "eval", out, "--window", "64", "--windows", "2", "--json", "--device", "cpu"
    )
    assert json.loads(evaluated.out)["models"][0]["texts"][0]["windows"] == 2


def test_a_graph_alone_is_quantised_too(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    args = ("--quantize", "int4", "--block-size", "16", "--rounding", "nearest", "--no-check")
    found = surgeon("export", llama, "--to", "onnx", *args, *POSITIONS, "-o", path)
    assert found.code == 0, found.err
    assert "perplexity was not measured" in found.out
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "MatMulNBits"]
    assert nodes
    for node in nodes:
        assert {a.name: a.i for a in node.attribute}["block_size"] == 16


@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (("--quantize", "int5"), ("no scheme 'int5'", "int4")),
        (("--quantize", "int4", "--block-size", "48"), ("48", "--block-size 32")),
        (("--quantize", "int4", "--rounding", "up"), ("no rounding 'up'", "nearest")),
        (("--quantize", "int8", "--dtype", "bf16"), ("int8 can't be had in bf16", "w8")),
        (("--quantize", "w8", "--style", "generic"), ("generic style", "--style ort")),
        (("--block-size", "64"), ("--block-size is of a quantised graph",)),
        (("--rounding", "nearest"), ("--rounding is of a quantised graph",)),
    ],
)
def test_what_means_nothing(
    args: tuple[str, ...], texts: tuple[str, ...], llama: Path, tmp_path: Path
) -> None:
    found = surgeon("export", llama, "--to", "onnx", *args, "-o", tmp_path / "out")
    refused(found, "bad-option", *texts)
    assert not list(tmp_path.iterdir())


def test_a_program_of_torch_is_not_quantised(llama: Path, tmp_path: Path) -> None:
    args = ("--to", "pt2", "--quantize", "w8", "-o", tmp_path / "m.pt2")
    refused(surgeon("export", llama, *args), "bad-option", "--to pt2 isn't quantised")


@pytest.mark.skipif(
    bool(cuda_placement.unavailable()), reason=cuda_placement.unavailable() or "available"
)
def test_where_the_nodes_go_on_a_gpu(tiny: Any, tmp_path: Path) -> None:
    """All of them where weights alone are quantised; integers have no kernel, as is said."""
    program, weights = captured(tiny("Llama", tie_word_embeddings=True))
    cases = [
        ("standard", "fp32", "w8"),
        ("ort", "fp16", "w8"),
        ("ort", "bf16", "int4"),
        ("standard", "fp32", "int8"),
    ]
    paths = [tmp_path / f"{'-'.join(case)}.onnx" for case in cases]
    for path, (style, dtype, scheme) in zip(paths, cases, strict=True):
        options = Options(style, dtype, 64, Scheme(scheme))
        write_decoder(program, weights, path, options=options, check=False)
    left: list[set[str]] = []
    for _, found in placements(paths):
        assert isinstance(found, Placement), found
        left.append({node.op for node in found.on(CPU)})
    assert left[0] == set()
    assert left[1] <= {"Cast"} and left[2] <= {"Cast"}
    assert left[3] >= {"MatMulInteger", "DynamicQuantizeLinear"}
