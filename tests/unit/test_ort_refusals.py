"""What a graph with a cache can't hold is refused, with the operation and its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from torch import nn

from surgeon.emit.onnx_decoder import Options, write_decoder
from surgeon.errors import Code, SurgeonError
from surgeon.ir import DType, Op, Program, Ref, TensorType
from surgeon.opening import open_model
from tests import models
from tests.decoding import Steps

pytestmark = pytest.mark.slow


def llama() -> tuple[Program, Callable[[str], torch.Tensor]]:
    origin = open_model(models.tiny("Llama", head_dim=16))
    return origin.program, origin.read


def with_last(program: Program, op: Op) -> Program:
    """Returns the program with one more operation after its last."""
    return Program(
        program.symbols,
        program.inputs,
        program.params,
        (*program.ops, op),
        (op.outputs[0],),
        program.guards,
    )


def refusal(program: Program, get: Any, path: Path, **options: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        write_decoder(program, get, path / "model.onnx", options=Options(**options))
    assert not list(path.iterdir())
    return caught.value


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "why"),
    [
        ("aten.roll.default", ((1,), (1,)), (), "no rule"),
        ("aten.softmax.int", (1,), (), "mixes tokens"),
        ("aten.special_i0e.default", (), (), "no rule"),
    ],
)
def test_operations_that_a_step_cannot_do(
    target: str, args: Any, kwargs: Any, why: str, tmp_path: Path
) -> None:
    program, get = llama()
    last = program.outputs[0]
    op = Op(("odd",), (program.types[last],), target, (Ref(last), *args), kwargs, "odd", "x.py:7")
    error = refusal(with_last(program, op), get, tmp_path)
    assert error.code is Code.TARGET_REFUSED
    assert target in error.what and "x.py:7" in error.at
    assert why in error.why and "--style generic" in error.try_


def test_a_mean_over_all_tokens_is_refused(tmp_path: Path) -> None:
    program, get = llama()
    last = program.outputs[0]
    batch, _, vocab = program.types[last].shape
    type_ = TensorType("f32", (batch, 1, vocab))
    op = Op(("mean_",), (type_,), "aten.mean.dim", (Ref(last), (1,), True), (), "pool", "x.py:7")
    assert "new ones only" in refusal(with_last(program, op), get, tmp_path).why


def test_another_use_of_the_mask_is_refused(tmp_path: Path) -> None:
    program, get = llama()
    mask = program.types["attention_mask"]
    kind = TensorType("f32", mask.shape)
    made = Op(("m",), (kind,), "aten.to.dtype", (Ref("attention_mask"), DType("f32")))
    again = Op(("n",), (kind,), "aten.neg.default", (Ref("m"),), (), "alibi", "x.py:9")
    found = with_last(with_last(program, made), again)
    error = refusal(found, get, tmp_path)
    assert "earlier tokens too" in error.why and "x.py:9" in error.at


def test_what_is_no_language_model_goes_the_generic_way(tmp_path: Path) -> None:
    origin = open_model(nn.Linear(4, 4), example_inputs=(torch.zeros(2, 4),))
    error = refusal(origin.program, origin.read, tmp_path)
    assert "--style generic" in error.try_
    path = tmp_path / "model.onnx"
    found = write_decoder(origin.program, origin.read, path, options=Options("generic"))
    assert found.largest is not None and found.largest < 1e-6


def test_attention_that_is_spelled_out_has_no_cache(tmp_path: Path) -> None:
    config: Any = transformers.BloomConfig(vocab_size=101, hidden_size=32, n_layer=1, n_head=4)
    origin = open_model(transformers.BloomForCausalLM(config).eval())
    error = refusal(origin.program, origin.read, tmp_path)
    assert error.code is Code.TARGET_REFUSED and "modeling_bloom.py" in error.at


@pytest.mark.parametrize(
    "options",
    [{"style": "orrt"}, {"dtype": "fp64"}, {"style": "generic", "dtype": "fp16"}, {"positions": 0}],
)
def test_options_that_mean_nothing(options: dict[str, Any]) -> None:
    with pytest.raises(SurgeonError) as caught:
        Options(**options)
    assert caught.value.code is Code.BAD_OPTION and caught.value.try_


def test_left_padding_gives_no_numbers_where_it_would_be_read_as_tokens(tmp_path: Path) -> None:
    program, get = llama()
    path = tmp_path / "model.onnx"
    write_decoder(program, get, path, options=Options(positions=32))
    ids = models.tokens(100, 2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    found = Steps(path).step(ids, mask)
    assert torch.isnan(found[0]).all() and torch.isfinite(found[1]).all()


def test_past_and_present_may_be_one_buffer(tmp_path: Path) -> None:
    program, get = llama()
    path = tmp_path / "model.onnx"
    write_decoder(program, get, path, options=Options(positions=32))
    ids = models.tokens(100, 1, 9)
    mask = torch.ones_like(ids)
    apart = Steps(path, 1)
    wanted = torch.cat([apart.step(ids[:, i : i + 1], mask[:, : i + 1]) for i in range(9)], 1)
    session: Any = apart.session
    binding, found = session.io_binding(), []
    buffers = {
        v.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.zeros((1, v.shape[1], 16, v.shape[3]), np.float32)
        )
        for v in session.get_inputs()
        if v.name in apart.cache
    }
    for i in range(9):
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        binding.bind_output("logits", "cpu")
        binding.bind_cpu_input("input_ids", ids[:, i : i + 1].numpy())
        binding.bind_cpu_input("attention_mask", mask[:, : i + 1].numpy())
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        session.run_with_iobinding(binding)
        found.append(torch.from_numpy(binding.copy_outputs_to_cpu()[0]))
    torch.testing.assert_close(torch.cat(found, 1), wanted)


@pytest.mark.parametrize("style", ["ort", "standard"])
@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("fp16", 2)])
def test_a_tied_table_is_stored_once(dtype: str, width: int, style: str, tmp_path: Path) -> None:
    tied = open_model(models.build("Llama", head_dim=16, tie_word_embeddings=True))
    apart = open_model(models.build("Llama", head_dim=16, tie_word_embeddings=False))
    sizes: list[int] = []
    for i, origin in enumerate((tied, apart)):
        path = tmp_path / f"{i}.onnx"
        options = Options(style, dtype, positions=8)
        found = write_decoder(origin.program, origin.read, path, options=options)
        assert found.largest is not None and found.largest < 1e-2
        sizes.append(path.with_name(path.name + ".data").stat().st_size)
    assert sizes[1] - sizes[0] == 101 * 48 * width


def test_weights_are_read_one_at_a_time(tmp_path: Path) -> None:
    program, get = llama()
    alive: list[Any] = []
    most = 0

    def counted(name: str) -> torch.Tensor:
        nonlocal most
        import weakref

        tensor = get(name).clone()
        alive.append(weakref.ref(tensor))
        most = max(most, sum(ref() is not None for ref in alive))
        return tensor

    write_decoder(program, counted, tmp_path / "m.onnx", options=Options(positions=8), check=False)
    assert len(alive) > 15 and most <= 4  # three are packed into one
