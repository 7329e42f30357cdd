"""Placement on CUDA, found without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import cuda_placement
from tools.cuda_placement import CPU, CUDA, Placement, PlacementError, placement, placements

TOOL = Path(cuda_placement.__file__)

needs_provider = pytest.mark.skipif(
    bool(cuda_placement.unavailable()), reason=cuda_placement.unavailable() or "available"
)


def _graph(path: Path) -> Path:
    """A graph with nodes that CUDA has a kernel for, and two that it hasn't."""
    from onnx import TensorProto, helper, save

    def value(name: str, type_: int, shape: list[Any] | None) -> Any:
        return helper.make_tensor_value_info(name, type_, shape)

    inputs, outputs, nodes = [], [], []
    for name, type_ in (("fp16", TensorProto.FLOAT16), ("fp32", TensorProto.FLOAT)):
        args = [
            f"{name}_{arg}" for arg in ("qkv", "k", "v", "past_k", "past_v", "seqlens", "total")
        ]
        inputs += [
            value(args[0], type_, ["b", "s", 64]),
            value(args[3], type_, ["b", 1, "p", 16]),
            value(args[4], type_, ["b", 1, "p", 16]),
            value(args[5], TensorProto.INT32, ["b"]),
            value(args[6], TensorProto.INT32, [1]),
        ]
        outs = [f"{name}_{out}" for out in ("y", "present_k", "present_v")]
        outputs += [
            value(outs[0], type_, ["b", "s", 32]),
            value(outs[1], type_, ["b", 1, "t", 16]),
            value(outs[2], type_, ["b", 1, "t", 16]),
        ]
        args[1] = args[2] = ""
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                args,
                outs,
                name=f"attention_{name}",
                domain="com.microsoft",
                num_heads=2,
                kv_num_heads=1,
            )
        )
    inputs += [
        value("x", TensorProto.FLOAT, ["n", 4]),
        value("w", TensorProto.FLOAT, [4, 4]),
        value("text", TensorProto.STRING, ["n"]),
    ]
    outputs += [
        value("product", TensorProto.FLOAT, ["n", 4]),
        value("words", TensorProto.STRING, None),
    ]
    nodes += [
        helper.make_node("MatMul", ["x", "w"], ["product"], name="product"),
        helper.make_node("StringNormalizer", ["text"], ["words"], name="words"),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", inputs, outputs),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
        ir_version=11,
    )
    save(model, path)
    return path


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _graph(tmp_path_factory.mktemp("placement") / "graph.onnx")


@pytest.fixture(scope="module")
def found(graph: Path) -> Placement:
    return placement(graph)


@needs_provider
def test_a_node_is_on_cuda_where_cuda_has_a_kernel_for_its_type(found: Placement):
    assert {node.name for node in found.on(CUDA)} == {"product", "attention_fp16"}
    assert {node.name for node in found.on(CPU)} == {"words", "attention_fp32"}


@needs_provider
def test_nodes_are_counted_by_provider_and_operator(found: Placement):
    assert found.counts() == {
        CPU: {"StringNormalizer": 1, "com.microsoft.GroupQueryAttention": 1},
        CUDA: {"MatMul": 1, "com.microsoft.GroupQueryAttention": 1},
    }


@needs_provider
def test_the_command_reports_each_file_and_fails_for_one_it_cannot_open(
    graph: Path, tmp_path: Path
):
    (broken := tmp_path / "broken.onnx").write_bytes(b"not a graph")
    command = [sys.executable, str(TOOL), "--json", str(broken), str(graph)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert "no session" in answer[str(broken)]["error"]
    assert answer[str(graph)]["counts"][CUDA]["MatMul"] == 1
    assert {"name": "words", "op": "StringNormalizer", "provider": CPU} in answer[str(graph)][
        "nodes"
    ]


@needs_provider
def test_only_cuda_libraries_are_replaced_and_only_what_they_must_provide():
    wanted = cuda_placement.wanted()
    assert all(name.startswith(("libcu", "libnv")) for name in wanted)
    runtime = next(symbols for name, symbols in wanted.items() if name.startswith("libcudart"))
    assert runtime["cudaMalloc"].startswith("libcudart.so"), "bound to the runtime's own version"
    names = {name for symbols in wanted.values() for name in symbols}
    assert all(name.startswith(("cu", "__cu")) for name in names), names
    assert "Provider_GetHost" not in names, "this one ONNX Runtime itself provides"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sys.platform": "darwin"}, "needs Linux on x86-64"),
        ({"platform.machine": lambda: "aarch64"}, "needs Linux on x86-64"),
        ({"shutil.which": lambda name: None}, "needs a C compiler"),
        ({"importlib.util.find_spec": lambda name: None}, "needs onnxruntime-gpu"),
    ],
)
def test_elsewhere_the_reason_is_given(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str
):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    for name, value in change.items():
        monkeypatch.setattr(name, value)
    assert reason in cuda_placement.unavailable()
    with pytest.raises(PlacementError, match=reason):
        list(placements(["model.onnx"]))


def test_the_plain_onnxruntime_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Spec:
        origin = str(tmp_path / "onnxruntime" / "__init__.py")

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: Spec)
    assert "no CUDA provider library" in cuda_placement.unavailable()
