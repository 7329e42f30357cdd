"""ONNX files that are found, opened, or refused in words that help."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from surgeon.errors import Code, SurgeonError
from surgeon.runtime import Decoder, OrtSession, open_session
from surgeon.runtime import open as open_model
from surgeon.runtime.graph_file import is_graph_folder, locate
from tests.decoders import Tiny, write

TINY = Tiny()


def refused(code: Code, call, *args, **options) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        call(*args, **options)
    assert caught.value.code is code
    assert "\n" not in caught.value.why
    return caught.value


def test_a_folder_stands_for_its_graph(tmp_path):
    assert "empty" in refused(Code.MISSING_FILE, locate, tmp_path).why
    (tmp_path / "notes.txt").touch()
    assert ".onnx" in refused(Code.MISSING_FILE, locate, tmp_path).why
    one = write(tmp_path / "one.onnx", TINY)
    assert locate(tmp_path) == locate(str(one)) == one
    write(tmp_path / "two.onnx", TINY)
    error = refused(Code.MISSING_FILE, locate, tmp_path)
    assert "one.onnx, two.onnx" in error.why
    main = write(tmp_path / "model.onnx", TINY)
    assert locate(tmp_path) == main
    refused(Code.MISSING_FILE, locate, tmp_path / "none")


def test_a_checkpoint_with_a_graph_beside_it_is_a_checkpoint(tmp_path):
    assert not is_graph_folder(tmp_path)
    write(tmp_path / "model.onnx", TINY)
    assert is_graph_folder(tmp_path)
    (tmp_path / "plan.safetensors").touch()  # of a plan that rewrites, pruned to a graph
    assert is_graph_folder(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert not is_graph_folder(tmp_path)


def test_weights_beside_the_graph_that_are_missing_or_cut_off(tmp_path):
    path = write(tmp_path / "model.onnx", TINY, external=True)
    data = tmp_path / "model.onnx.data"
    assert Decoder(path, device="cpu").vocab == TINY.vocab
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    error = refused(Code.BAD_CHECKPOINT, Decoder, path, device="cpu")
    assert error.at == str(data) and error.data["bytes"] < error.data["needed"]
    data.unlink()
    error = refused(Code.MISSING_FILE, Decoder, path, device="cpu")
    assert error.at == str(data) and "model.onnx.data" in error.what


def test_a_graph_that_is_cut_off(tmp_path):
    path = write(tmp_path / "model.onnx", TINY)
    whole = path.read_bytes()
    for part in (whole[: len(whole) // 2], b"no protobuf", b""):
        path.write_bytes(part)
        refused(Code.NOT_A_MODEL, Decoder, path, device="cpu")


def test_an_operation_that_the_runtime_does_not_have(tmp_path):
    path = write(tmp_path / "model.onnx", TINY)
    model = onnx.load(path)
    model.graph.node[-1].op_type = "Unheard"
    path.write_bytes(model.SerializeToString())
    assert "Unheard" in refused(Code.NOT_A_MODEL, Decoder, path, device="cpu").why


def test_bf16_on_the_cpu_is_named_as_the_reason(tmp_path):
    path = write(tmp_path / "model.onnx", TINY, dtype="bf16")
    error = refused(Code.RUNTIME_FAILED, Decoder, path, device="cpu")
    assert "bf16" in error.what and "--dtype fp32" in error.try_


def _with(path: Path, change) -> Path:
    model = onnx.load(path)
    change(model.graph)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda g: g.input.append(helper.make_tensor_value_info("mel", TensorProto.FLOAT, [1])),
            "unknown: mel: tensor(float)",
        ),
        (lambda g: g.output.pop(), "present.1.value"),
        (lambda g: g.output.pop(0), "no logits"),
    ],
)
def test_graphs_that_are_no_decoder(tmp_path, change, says):
    path = _with(write(tmp_path / "model.onnx", TINY), change)
    assert says in refused(Code.NOT_A_MODEL, open_session, path, device="cpu").why


def test_a_cache_of_another_type_than_a_float(tmp_path):
    def quantised(graph) -> None:
        for value in (*graph.input, *graph.output):
            if value.name.startswith(("past", "present")):
                value.type.tensor_type.elem_type = TensorProto.INT8
        for node in list(graph.node):
            if node.op_type == "GroupQueryAttention":
                for at in (3, 4):
                    graph.node.append(
                        helper.make_node("Cast", [node.input[at]], [node.input[at] + "f"], to=1)
                    )
                    node.input[at] += "f"
                for at in (1, 2):
                    name = node.output[at]
                    node.output[at] += "f"
                    graph.node.append(
                        helper.make_node("Cast", [name + "f"], [name], to=TensorProto.INT8)
                    )

    path = _with(write(tmp_path / "model.onnx", TINY), quantised)
    assert "tensor(int8)" in refused(Code.NOT_A_MODEL, open_session, path, device="cpu").why


def test_a_graph_is_opened_as_what_it_is(tmp_path, tiny_tokenizer):
    path = write(tmp_path / "model.onnx", TINY)
    assert isinstance(open_session(path, device="cpu"), Decoder)
    refused(Code.NOT_A_MODEL, OrtSession, path, device="cpu")
    refused(Code.BAD_OPTION, open_session, path, device="cpu", cuda_graph=True)
    model = open_model(tmp_path, device="cpu", threads=1)
    assert (model.device, model.note, model.tokenizer) == ("cpu", "asked for", None)
    assert model.logits([[5, 6]]) == pytest.approx(TINY.logits([5, 6])[None], abs=2e-4)
    refused(Code.MISSING_FILE, model.generate, "a cat")
    tiny_tokenizer.save_pretrained(tmp_path)
    model = open_model(tmp_path, device="cpu", threads=1)
    expected = TINY.greedy(tiny_tokenizer("a cat")["input_ids"], 8)
    assert model.generate("a cat", max_new_tokens=8).tokens == tuple(expected)
    assert "".join(model.stream("a cat", max_new_tokens=8)) == tiny_tokenizer.decode(expected)
    both = model.generate(["a cat", "so"], max_new_tokens=8)
    assert both[0].tokens == tuple(expected)
    drawn = [
        model.generate("a cat", max_new_tokens=8, temperature=2.0, seed=n).tokens for n in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
