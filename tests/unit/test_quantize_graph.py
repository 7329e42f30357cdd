"""Quantised graphs compute what float graphs do on the weights that the bytes stand for."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from surgeon.emit.onnx_decoder import Options, WrittenDecoder, write_decoder
from surgeon.emit.onnx_folder import judged, options_for, write_folder
from surgeon.emit.quantize.rounding import Blocks, restore
from surgeon.emit.quantize.scheme import Grid, Scheme
from surgeon.errors import Code, SurgeonError
from surgeon.runtime.model import open_session
from tests.decoding import largest, stepwise
from tests.models import tokens
from tests.unit.test_emit_pt2 import Captured, captured, pruned

pytestmark = pytest.mark.slow

CODES = ".codes"
MODELS = {
    "Llama": {"tie_word_embeddings": True},
    "Gemma2": {},
    "GPT2": {},
    "Qwen2": {"tie_word_embeddings": False},
}


def arrays(model: Any) -> dict[str, Any]:
    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def attributes(node: Any) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def restored(model: Any) -> dict[str, Any]:
    """Every matrix of a quantised graph in fp32, as it was stored, by the name that it had."""
    data, found = arrays(model), dict[str, Any]()
    for node in model.graph.node:
        name = node.input[1].removesuffix(CODES) if len(node.input) > 1 else ""
        if node.op_type == "MatMulNBits":
            given = attributes(node)
            grid = Grid(given["bits"], given["block_size"])
            blocks = Blocks(*(data[i].astype(np.float32) if i.endswith("scales") else data[i]
                              for i in node.input[1:4]))  # fmt: skip
            rows = restore(blocks, given["K"], grid)
            found[name] = rows if name + CODES + ".rows" in data else rows.T
        elif node.op_type == "MatMulInteger":
            codes, zeros = data[node.input[1]].astype(np.float32), data[node.input[3]]
            found[name] = (codes - zeros) * data[name + ".scales"]
        elif node.op_type == "GatherBlockQuantized":
            given, name = attributes(node), node.input[0].removesuffix(CODES + ".rows")
            scales = data[node.input[2]].astype(np.float32)
            codes = data[node.input[0]].reshape(*scales.shape, -1)
            grid = Grid(given["bits"], given["block_size"])
            wide = scales.shape[1] * grid.block_size
            found[name] = restore(Blocks(codes, scales, data[node.input[3]]), wide, grid)
    return found


def exact(path: Path) -> Path:
    """A copy of a quantised graph whose products don't round activations."""
    model = onnx.load(path)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    copy = path.with_name("exact.onnx")
    onnx.save(model, copy)
    return copy


def on_restored(program: Any, weights: Any, folder: Path, options: Options, found: Any) -> Path:
    """The float graph, its matrices those that the quantised graph stands for."""
    path = folder / "float.onnx"
    write_decoder(program, weights, path, options=options, check=False)
    model = onnx.load(path)
    changed: set[str] = set()
    for tensor in model.graph.initializer:
        if tensor.name in found:
            new = found[tensor.name][:, : tensor.dims[1]]
            assert new.shape == tuple(tensor.dims)
            same = numpy_helper.from_array(np.ascontiguousarray(new, np.float32), tensor.name)
            tensor.CopyFrom(same)
            changed.add(tensor.name)
    assert changed == set(found)
    onnx.save(model, path)
    return path


def compared(made: Captured, tmp_path: Path, scheme: Scheme, style: str) -> float:
    program, weights = made
    path, options = tmp_path / "model.onnx", Options(style, positions=64, quantize=scheme)
    write_decoder(program, weights, path, options=options)
    same = on_restored(
        program, weights, tmp_path, Options(style, positions=64), restored(onnx.load(path))
    )
    vocab = program.types[program.outputs[0]].shape[2]
    assert isinstance(vocab, int)
    ids = tokens(vocab)
    mask = torch.ones_like(ids)
    pieces = [9, 1, 1, 1]
    wanted = stepwise(same, ids, mask, pieces)
    return largest(stepwise(exact(path), ids, mask, pieces), wanted, mask)


@pytest.mark.parametrize(
    ("name", "style"),
    [("Llama", "ort"), ("Gemma2", "standard"), ("GPT2", "ort"), ("Qwen2", "standard")],
)
def test_4_bits_are_the_weights_they_stand_for(
    name: str, style: str, tiny: Any, tmp_path: Path
) -> None:
    made = captured(tiny(name, **MODELS[name]))
    assert compared(made, tmp_path, Scheme("int4", 16), style) < 1e-5


@pytest.mark.parametrize("scheme", [Scheme("w8"), Scheme("w8", 64, "nearest")])
def test_8_bits_are_the_weights_they_stand_for(scheme: Scheme, tiny: Any, tmp_path: Path) -> None:
    made = captured(tiny("Llama", tie_word_embeddings=True))
    assert compared(made, tmp_path, scheme, "ort") < 1e-5


def test_widths_that_are_no_multiple_of_a_block(tiny: Any, tmp_path: Path) -> None:
    made = pruned(tiny("Llama", tie_word_embeddings=True))
    widths = {s for p in made[0].params for s in p.type.shape if isinstance(s, int) and s > 1}
    assert any(width % 32 for width in widths)
    assert compared(made, tmp_path, Scheme("int4", table_bits=4), "ort") < 1e-5


@pytest.mark.parametrize("style", ["ort", "standard"])
def test_integers_are_the_weights_but_for_rounded_activations(
    style: str, tiny: Any, tmp_path: Path
) -> None:
    made = captured(tiny("Llama", tie_word_embeddings=False))
    assert 1e-4 < compared(made, tmp_path, Scheme("int8"), style) < 0.1


# --- what is in the file -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    program, weights = captured(tiny("Llama", tie_word_embeddings=True))
    path = tmp_path_factory.mktemp("tied") / "model.onnx"
    options = Options(positions=64, quantize=Scheme("int4", 16))
    written = write_decoder(program, weights, path, options=options, check=False)
    assert isinstance(written, WrittenDecoder) and written.quantised is not None
    return SimpleNamespace(path=path, found=written.quantised, program=program, weights=weights)


def outside(path: Path) -> dict[str, dict[str, str]]:
    model = onnx.load(path, load_external_data=False)
    return {
        i.name: {e.key: e.value for e in i.external_data}
        for i in model.graph.initializer
        if i.external_data
    }


def test_a_tied_table_is_stored_once(tied: SimpleNamespace) -> None:
    assert tied.found.shared
    name = tied.found.head.name
    assert tied.found.embedding.bits == 8
    where = outside(tied.path)
    assert where[name + CODES] == where[name + CODES + ".rows"]
    assert name not in where
    kinds = [n.op_type for n in onnx.load(tied.path, load_external_data=False).graph.node]
    assert kinds.count("GatherBlockQuantized") == 1
    assert not {"MatMul", "FusedMatMul", "Gather"} & set(kinds)
    data = tied.path.with_name("model.onnx.data").stat().st_size
    inside = tied.path.stat().st_size
    counted = sum(m.after for m in tied.found.matrices) + tied.found.rest
    assert data <= counted + 64 <= data + inside
    before = sum(m.before for m in tied.found.matrices)
    shapes = (p.type.shape for p in tied.program.params)
    assert before == 4 * sum(prod(s) for s in shapes if len(s) == 2)


def test_the_graph_says_how_it_was_quantised(tied: SimpleNamespace) -> None:
    props = {p.key: p.value for p in onnx.load(tied.path).metadata_props}
    assert props["surgeon.quantize"] == "int4"
    assert props["surgeon.style"] == "ort"


def test_the_runtime_reads_it(tied: SimpleNamespace) -> None:
    session = open_session(tied.path, device="cpu")
    assert np.isfinite(session.run(np.array([[3, 4, 5]]))).all()


def test_an_untied_head_and_its_embedding_are_told_apart(tiny: Any, tmp_path: Path) -> None:
    program, weights = captured(tiny("Llama", tie_word_embeddings=False))
    options = Options(positions=64, quantize=Scheme("int4", 16))
    written = write_decoder(program, weights, tmp_path / "m.onnx", options=options, check=False)
    found = written.quantised
    assert found is not None and not found.shared
    assert found.embedding is not None and found.embedding.bits == 8
    assert found.head is not None and found.head.name != found.embedding.name
    assert found.head.before == found.embedding.before


def test_integers_have_no_float_matrix_left(tiny: Any, tmp_path: Path) -> None:
    program, weights = captured(tiny("Llama", tie_word_embeddings=False))
    options = Options("standard", positions=64, quantize=Scheme("int8"))
    write_decoder(program, weights, tmp_path / "m.onnx", options=options, check=False)
    model = onnx.load(tmp_path / "m.onnx")
    stored = {i.name for i in model.graph.initializer}
    assert not [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in stored]
    nodes = [n.op_type for n in model.graph.node]
    # Gate and up, and query, key and value, read one rounding of their input.
    assert 0 < nodes.count("DynamicQuantizeLinear") < nodes.count("MatMulInteger")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_has_scales_of_its_own_type(dtype: str, tiny: Any, tmp_path: Path) -> None:
    program, weights = captured(tiny("Llama", tie_word_embeddings=True))
    options = Options(dtype=dtype, positions=64, quantize=Scheme("w8"))
    written = write_decoder(program, weights, tmp_path / "m.onnx", options=options)
    types = {
        i.name: i.data_type for i in onnx.load(tmp_path / "m.onnx").graph.initializer
    }  # fmt: skip
    wanted = onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.BFLOAT16
    assert {t for n, t in types.items() if n.endswith(".scales")} == {wanted}
    if dtype == "fp16":
        assert written.largest is not None and written.largest < 0.1
    else:
        assert written.largest is None


# --- what is reported ----------------------------------------------------------------------------


def letters(text: str, **_: Any) -> dict[str, list[int]]:
    return {"input_ids": [3 + ord(c) % 90 for c in text[:2000]]}


def folder(tiny: Any, tmp_path: Path, scheme: Scheme, **given: Any) -> Any:
    program, weights = captured(tiny("Llama", tie_word_embeddings=True))
    options = options_for(program, None, positions=64, quantize=scheme)
    path = tmp_path / "model.onnx"
    written = write_decoder(program, weights, path, options=options, check=False)
    source: Any = SimpleNamespace(load_tokenizer=lambda: letters)
    return judged(written, program, weights, source, options, **given)


def test_perplexity_before_and_after(tiny: Any, tmp_path: Path) -> None:
    report, notes = folder(tiny, tmp_path, Scheme("int4", 16))
    found = report["perplexity"]
    assert found["window"] == 64 and found["windows"] == 2
    assert found["before"] != found["after"]
    assert abs(np.log(found["after"] / found["before"])) < 1
    assert f"{found['after']:.3f} after" in notes[0]
    assert report["shared_table"] and report["embedding"] == report["head"]
    assert report["bytes_after"] < report["bytes_before"] / 3
    json.dumps(report)


def test_without_a_check_it_says_so(tiny: Any, tmp_path: Path) -> None:
    report, notes = folder(tiny, tmp_path, Scheme("w8"), check=False)
    assert report["perplexity"] is None
    assert "perplexity was not measured: it was not asked for" in notes


def test_integers_say_that_cuda_has_no_kernel(tiny: Any, tmp_path: Path) -> None:
    _, notes = folder(tiny, tmp_path, Scheme("int8"), check=False)
    assert any("no CUDA kernel" in note for note in notes)


def test_a_folder_without_a_source(tiny: Any, tmp_path: Path) -> None:
    program, weights = captured(tiny("Llama"))
    options = options_for(program, None, positions=64, quantize=Scheme("w8"))
    found = write_folder(tmp_path, program, weights, None, options, check=False)
    assert found.target()["quantize"]["scheme"] == "w8"
    plain = tmp_path / "plain"
    plain.mkdir()
    options = options_for(program, None, positions=64)
    assert (
        "quantize" not in write_folder(plain, program, weights, None, options, check=False).target()
    )
    shutil.rmtree(plain)


@pytest.mark.parametrize(
    ("style", "dtype", "scheme", "text"),
    [
        ("generic", "fp32", "int4", "generic style"),
        ("ort", "bf16", "int8", "int8 can't be had in bf16"),
        ("ort", "fp16", "int8", "int8 can't be had in fp16"),
    ],
)
def test_what_has_no_kernels(style: str, dtype: str, scheme: str, text: str) -> None:
    with pytest.raises(SurgeonError, match=text) as caught:
        Options(style, dtype, 64, Scheme(scheme))
    assert caught.value.code is Code.BAD_OPTION
