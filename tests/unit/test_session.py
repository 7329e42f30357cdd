from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from surgeon.errors import Code, SurgeonError
from surgeon.report.evaluate import perplexity
from surgeon.runtime import device
from surgeon.runtime.generate import generate
from surgeon.runtime.session import CPU, CUDA, INPUTS, OrtSession

VOCAB = 101
TABLE = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
PLACES = np.random.default_rng(1).normal(size=(64, VOCAB)).astype(np.float32)


def write(
    path: Path, inputs: Sequence[str] = INPUTS, dtype: int = TensorProto.INT64, extra: bool = False
) -> Path:
    """Writes logits = TABLE[input_ids] · attention_mask + PLACES[position_ids], as far as given.

    Args:
        extra: put an output that isn't the logits first.
    """
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x0"])]
    last = "x0"
    if "attention_mask" in inputs:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["m", "minus_one"], ["m1"]),
            helper.make_node("Mul", [last, "m1"], ["x1"]),
        ]
        last = "x1"
    if "position_ids" in inputs:
        nodes += [
            helper.make_node("Gather", ["places", "position_ids"], ["p"]),
            helper.make_node("Add", [last, "p"], ["x2"]),
        ]
        last = "x2"
    nodes.append(helper.make_node("Identity", [last], ["logits"]))
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s", VOCAB])]
    if extra:
        nodes.append(helper.make_node("Neg", [last], ["other"]))
        outputs.insert(0, helper.make_tensor_value_info("other", TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(name, dtype, ["b", "s"]) for name in inputs],
        outputs,
        [
            numpy_helper.from_array(TABLE, "table"),
            numpy_helper.from_array(PLACES, "places"),
            numpy_helper.from_array(np.array([-1]), "minus_one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def refused(code: Code, call, *args, **options) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        call(*args, **options)
    assert caught.value.code is code
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "model.onnx")


IDS = np.array([[3, 4, 5, 6], [7, 8, 9, 10]])


def test_missing_inputs_are_filled_in(file):
    session = OrtSession(file, providers=[CPU], threads=1)
    assert session.inputs == INPUTS and session.providers == (CPU,)
    assert np.allclose(session.run(IDS), TABLE[IDS] + PLACES[:4])


def test_positions_are_counted_over_the_mask_s_tokens(file):
    mask = np.array([[0, 0, 1, 1], [1, 1, 1, 0]])
    got = OrtSession(file).run(IDS, mask)
    assert np.allclose(got[0], TABLE[IDS[0]] * mask[0, :, None] + PLACES[[0, 0, 0, 1]])
    assert np.allclose(got[1, :3], TABLE[IDS[1, :3]] + PLACES[:3])


def test_given_positions_are_used(file):
    positions = np.array([[5, 6, 7, 8], [0, 0, 0, 9]])
    assert np.allclose(OrtSession(file).run(IDS, None, positions), TABLE[IDS] + PLACES[positions])


@pytest.mark.parametrize("dtype", [TensorProto.INT32, TensorProto.INT64])
def test_ids_are_given_in_the_graph_s_own_type(tmp_path, dtype):
    session = OrtSession(write(tmp_path / "m.onnx", ("input_ids",), dtype, extra=True))
    for given in (np.int32, np.int64):
        assert np.allclose(session.run(IDS.astype(given)), TABLE[IDS])


def test_padding_is_not_ignored_where_the_graph_has_no_mask(tmp_path):
    session = OrtSession(write(tmp_path / "m.onnx", ("input_ids",)))
    assert np.allclose(session.run(IDS, np.ones_like(IDS)), TABLE[IDS])
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert "attention_mask" in refused(Code.RUNTIME_FAILED, session.run, IDS, mask).what
    assert "position_ids" in refused(Code.RUNTIME_FAILED, session.run, IDS, None, IDS).what


def test_shapes_that_don_t_fit_are_refused(file):
    session = OrtSession(file)
    refused(Code.BAD_TEXT_INPUT, session.run, IDS[0])
    refused(Code.BAD_TEXT_INPUT, session.run, IDS[:, :0])
    error = refused(Code.BAD_TEXT_INPUT, session.run, IDS, np.ones((2, 5)))
    assert "attention_mask has [2, 5]" in error.why


def test_a_failure_inside_the_runtime_is_told(file):
    session = OrtSession(file)
    error = refused(Code.RUNTIME_FAILED, session.run, np.full((1, 2), VOCAB))
    assert "Gather" in error.why and "\n" not in error.why


def test_files_that_are_no_model_are_refused(tmp_path):
    refused(Code.MISSING_FILE, OrtSession, tmp_path / "none.onnx")
    assert "empty" in refused(Code.MISSING_FILE, OrtSession, tmp_path).why
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no protobuf")
    refused(Code.NOT_A_MODEL, OrtSession, bad)
    whole = write(tmp_path / "whole.onnx").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    refused(Code.NOT_A_MODEL, OrtSession, bad)


@pytest.mark.parametrize(
    ("inputs", "dtype", "says"),
    [
        (("input_ids", "past"), TensorProto.INT64, "past"),
        (("input_ids", "attention_mask"), TensorProto.INT8, "tensor(int8)"),
    ],
)
def test_graphs_of_another_kind_are_refused(tmp_path, inputs, dtype, says):
    nodes = [helper.make_node("Cast", [inputs[-1]], ["logits"], to=TensorProto.FLOAT)]
    infos = [helper.make_tensor_value_info(name, dtype, ["b", "s"]) for name in inputs]
    out = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "s"])]
    opset = [helper.make_opsetid("", 18)]
    graph = helper.make_graph(nodes, "other", infos, out)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    assert says in refused(Code.NOT_A_MODEL, OrtSession, path).why


def test_unknown_providers_are_refused_by_name(file):
    error = refused(Code.RUNTIME_FAILED, OrtSession, file, providers=["CPUExecutionProvidr"])
    assert CPU in error.try_ and "CPUExecutionProvidr" in error.what
    refused(Code.RUNTIME_FAILED, OrtSession, file, providers=[])


@pytest.fixture
def cuda_that_does_not_load(monkeypatch):
    """A machine where nothing seems to be missing, and CUDA does not come up all the same."""
    if not device.missing_for_cuda():
        pytest.skip("CUDA works here")
    monkeypatch.setattr(device, "missing_for_cuda", lambda: ())


def test_a_provider_asked_for_is_never_replaced_silently(file, cuda_that_does_not_load):
    for asked in ({"providers": [CUDA, CPU]}, {"device": "cuda"}):
        error = refused(Code.RUNTIME_FAILED, OrtSession, file, **asked)
        assert CUDA in error.what and error.data["loaded"] == [CPU]


def test_the_default_says_so_when_cuda_does_not_load(file, cuda_that_does_not_load):
    with pytest.warns(UserWarning, match=r"CUDAExecutionProvider did not load; using CPU"):
        session = OrtSession(file)
    assert (session.providers, session.device) == ((CPU,), "cpu")
    assert session.note == "CUDAExecutionProvider did not load"


def test_providers_and_a_device_contradict_each_other(file):
    refused(Code.BAD_OPTION, OrtSession, file, providers=[CPU], device="cpu")
    refused(Code.BAD_OPTION, OrtSession, file, threads=0)


def test_a_session_is_measured_and_generates_like_any_model(file, tiny_tokenizer):
    session = OrtSession(file)
    ids = np.random.default_rng(0).integers(3, VOCAB, 64)

    def same(ids: np.ndarray) -> np.ndarray:
        return TABLE[ids] + PLACES[: ids.shape[1]]

    expected = perplexity(same, ids, window=32).perplexity
    assert perplexity(session, ids, window=32).perplexity == pytest.approx(expected, rel=1e-5)
    written = generate(session, tiny_tokenizer, "a cat", max_new_tokens=8)
    assert written.tokens == generate(same, tiny_tokenizer, "a cat", max_new_tokens=8).tokens
