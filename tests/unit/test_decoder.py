"""The cached session, against a reference that has no cache and no padding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgeon.errors import Code, SurgeonError
from surgeon.report.evaluate import perplexity
from surgeon.runtime import Decoder
from surgeon.runtime.cache import allocate
from surgeon.runtime.device_ops import ELEMENTS
from surgeon.runtime.generate import generate
from surgeon.runtime.logits import logits_of, positions_of
from tests.decoders import KV, LONGEST, WIDTH, Tiny, told, write

KINDS = {
    "shared": Tiny(("gqa", "gqa")),
    "passed on": Tiny(("concat", "concat")),
    "mixed": Tiny(("concat", "gqa")),
}
IDS = np.random.default_rng(0).integers(3, 101, (3, 9))
ROWS = [IDS[0].tolist(), IDS[1, :2].tolist(), IDS[2, :5].tolist()]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("decoders")
    return {kind: write(folder / kind / "model.onnx", tiny) for kind, tiny in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def decoder(files, kind) -> Decoder:
    return Decoder(files[kind], device="cpu", threads=1)


def shared(files: dict[str, Path], **options: Any) -> Decoder:
    return Decoder(files["shared"], device="cpu", threads=1, **options)


def refused(code: Code, call, *args, **options) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        call(*args, **options)
    assert caught.value.code is code
    return caught.value


def follow(decoder: Decoder, tiny: Tiny, cache: Any, rows: list[list[int]], steps: int) -> None:
    """Goes on for some steps and compares every row with the reference."""
    texts = [list(row) for row in rows]
    for step in range(steps):
        new = [[5 + step], [6], [7 + 2 * step]][: len(rows)]
        found = decoder.extend(cache, np.array(new))
        for row, text in enumerate(texts):
            text += new[row]
            assert found[row] == pytest.approx(tiny.logits(text)[-1], abs=2e-4)


# --- what it computes ----------------------------------------------------------------------------

MASKS = {
    "none": [[1] * 9] * 3,
    "right": [[1] * 6 + [0] * 3, [1] * 9, [1] + [0] * 8],
    "left": [[0] * 3 + [1] * 6, [1] * 9, [0] * 8 + [1]],
    "holes": [[0, 1, 1, 0, 0, 1, 1, 1, 0], [1] * 9, [1, 0] * 4 + [1]],
}


@pytest.mark.parametrize("padding", MASKS)
def test_logits_of_a_batch_with_padding_anywhere(decoder, kind, padding):
    mask = np.array(MASKS[padding])
    found = decoder.run(IDS, mask)
    for row in range(3):
        real = mask[row] == 1
        assert found[row, real] == pytest.approx(KINDS[kind].logits(IDS[row, real]), abs=2e-4)


@pytest.mark.parametrize("capacity", [0, 3, LONGEST])
def test_prefill_and_decode_of_rows_of_several_lengths(decoder, kind, capacity):
    cache = decoder.cache(3, capacity)
    found = decoder.prefill(cache, ROWS)
    for row, text in enumerate(ROWS):
        assert found[row] == pytest.approx(KINDS[kind].logits(text)[-1], abs=2e-4)
    assert cache.lengths.tolist() == [9, 2, 5]
    follow(decoder, KINDS[kind], cache, ROWS, 6)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_prompt_may_be_read_in_parts(decoder, kind, chunk, monkeypatch):
    widest = 0
    step = decoder._step

    def seen(cache, ids, *args, **options):
        nonlocal widest
        widest = max(widest, ids.shape[1])
        return step(cache, ids, *args, **options)

    monkeypatch.setattr(decoder, "_step", seen)
    for rows in (ROWS[:1], ROWS):
        cache = decoder.cache(len(rows), 20)
        found = decoder.prefill(cache, rows, chunk=chunk)
        for row, text in enumerate(rows):
            assert found[row] == pytest.approx(KINDS[kind].logits(text)[-1], abs=2e-4)
        follow(decoder, KINDS[kind], cache, rows, 3)
        if kind != "mixed":
            assert widest == chunk


def test_several_tokens_may_follow_a_past(decoder, kind):
    cache = decoder.cache(3, 20)
    decoder.prefill(cache, ROWS)
    more = np.array([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    found = decoder.extend(cache, more)
    texts = [row + more[n].tolist() for n, row in enumerate(ROWS)]
    for row, text in enumerate(texts):
        assert found[row] == pytest.approx(KINDS[kind].logits(text)[-1], abs=2e-4)
    follow(decoder, KINDS[kind], cache, texts, 3)


def test_new_tokens_may_be_padded_where_rows_can_be_had_one_by_one(files):
    decoder = shared(files)
    for rows, mask in ((ROWS, [[1, 1, 1], [1, 0, 0], [1, 1, 0]]), (ROWS[:1], [[1, 1, 0]])):
        cache = decoder.cache(len(rows), 20)
        decoder.prefill(cache, rows)
        more, lengths = np.full((len(rows), 3), 9), np.sum(mask, axis=1)
        found = decoder.extend(cache, more, np.array(mask))
        texts = [row + [9] * int(n) for row, n in zip(rows, lengths, strict=True)]
        for row, text in enumerate(texts):
            assert found[row] == pytest.approx(KINDS["shared"].logits(text)[-1], abs=2e-4)
        follow(decoder, KINDS["shared"], cache, texts, 3)


def test_a_cache_is_used_again(decoder, kind):
    cache = decoder.cache(3, 20)
    for rows in (ROWS, [[50], [51, 52, 53], [54]]):
        cache.reset()
        found = decoder.prefill(cache, rows)
        for row, text in enumerate(rows):
            assert found[row] == pytest.approx(KINDS[kind].logits(text)[-1], abs=2e-4)
        follow(decoder, KINDS[kind], cache, rows, 2)


@pytest.mark.parametrize("kind", ["shared", "passed on"])
def test_half_precision(tmp_path, kind):
    decoder = Decoder(write(tmp_path / "m.onnx", KINDS[kind], dtype="fp16"), device="cpu")
    assert decoder.signature.dtype == "fp16"
    cache = decoder.cache(3, 4)
    found = decoder.prefill(cache, ROWS)
    assert found.dtype == np.float32
    for row, text in enumerate(ROWS):
        assert found[row] == pytest.approx(KINDS[kind].logits(text)[-1], abs=0.1)
    assert decoder.run(IDS).dtype == np.float16


def test_greedy_text_of_a_batch(files, kind, tiny_tokenizer):
    decoder = Decoder(files[kind], device="cpu", threads=1)
    prompts = ["a cat", "so", "the moon"]
    found = generate(decoder, tiny_tokenizer, prompts, max_new_tokens=16)
    for prompt, written in zip(prompts, found, strict=True):
        expected = KINDS[kind].greedy(tiny_tokenizer(prompt)["input_ids"], 16)
        end = expected.index(2) + 1 if 2 in expected else None
        assert written.tokens == tuple(expected[:end])


def test_perplexity(files, kind):
    decoder = Decoder(files[kind], device="cpu", threads=1)
    ids = np.random.default_rng(1).integers(3, 101, 64)
    expected = perplexity(lambda x: KINDS[kind].logits(x[0])[None], ids, window=16).perplexity
    assert perplexity(decoder, ids, window=16).perplexity == pytest.approx(expected, rel=1e-4)
    assert logits_of(decoder) == decoder.run and positions_of(decoder) == LONGEST


# --- what it copies ------------------------------------------------------------------------------


def test_buffers_with_room_stay_where_they_are_and_are_written_in_place(files):
    decoder = shared(files)
    cache = decoder.cache(3, 20)
    address = {name: value.data_ptr() for name, value in cache.values.items()}
    decoder.prefill(cache, ROWS, chunk=4)
    decoder.extend(cache, np.array([[5], [6], [7]]))
    assert {name: value.data_ptr() for name, value in cache.values.items()} == address
    held = cache.values["past_key_values.0.key"].numpy()
    assert held.shape == (3, KV, 20, WIDTH)
    filled = [int((held[row, 0] != 0).any(axis=-1).sum()) for row in range(3)]
    assert filled[0] == 10 and filled[1] >= 3


def test_what_grows_is_passed_on_as_it_came_out(files, monkeypatch):
    decoder = Decoder(files["passed on"], device="cpu", threads=1)
    cache = decoder.cache(1, 0)
    decoder.prefill(cache, ROWS[:1])
    name = "past_key_values.1.value"
    before = cache.values[name]
    # On a GPU this would copy it.
    monkeypatch.setattr(type(before), "numpy", lambda self: pytest.fail("copied to the host"))
    decoder.extend(cache, np.array([[5]]))
    after = cache.values[name]
    assert list(after.shape()) == [1, KV, 10, WIDTH] and after is not before


def test_growing_keeps_what_is_there(files):
    decoder = shared(files)
    cache = decoder.cache(3, 10)
    decoder.prefill(cache, ROWS)
    before = {name: value.numpy().copy() for name, value in cache.values.items()}
    decoder.extend(cache, np.array([[5], [6], [7]]))
    assert cache.capacity == 10
    decoder.extend(cache, np.array([[5], [6], [7]]))
    assert cache.capacity == 20
    for name, value in cache.values.items():
        assert np.array_equal(value.numpy()[0, :, :9], before[name][0, :, :9])
    for _ in range(12):
        decoder.extend(cache, np.array([[5], [6], [7]]))
    assert cache.capacity == 40
    for _ in range(LONGEST - 23):
        decoder.extend(cache, np.array([[5], [6], [7]]))
    assert cache.capacity == cache.width == LONGEST, "no room beyond the model's positions"


def test_nothing_is_copied_to_pick_a_row_of_logits_on_the_device(files):
    """What runs on a GPU after each step, here on the CPU."""
    import onnxruntime as ort

    decoder = shared(files)
    logits = np.random.default_rng(0).normal(size=(3, 4, 7))
    for dtype, exact in ((np.float32, 1e-6), (np.float16, 1e-2)):
        value = ort.OrtValue.ortvalue_from_numpy(logits.astype(dtype))
        found = decoder._ops.rows(value, np.array([3, 0, 2]))
        assert found.dtype == np.float32
        assert found == pytest.approx(logits[[0, 1, 2], [3, 0, 2]], abs=exact)
    half = (logits.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(half, 16)
    assert decoder._ops.host(value) == pytest.approx(logits, rel=1e-2)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_buffers_of_every_type_start_as_zeros(files, dtype):
    value = allocate((2, 1, 3, 4), dtype, "cpu")
    assert (list(value.shape()), value.element_type()) == ([2, 1, 3, 4], ELEMENTS[dtype])
    found = shared(files)._ops.host(value)
    assert found.shape == (2, 1, 3, 4) and not found.any()


# --- steps of fixed shapes -----------------------------------------------------------------------


@pytest.fixture
def replaying(files) -> Decoder:
    """A decoder that runs its steps as under CUDA graphs: same shapes, same addresses."""
    decoder = shared(files)
    decoder._replays = True
    return decoder


def test_steps_of_fixed_shapes_say_the_same(replaying):
    cache = replaying.cache(3, 20)
    replaying.prefill(cache, ROWS, chunk=4)
    follow(replaying, KINDS["shared"], cache, ROWS, 3)
    assert cache.replay is not None


def test_steps_of_fixed_shapes_follow_the_cache_when_it_grows(replaying):
    cache = replaying.cache(3, 11)
    replaying.prefill(cache, ROWS)
    follow(replaying, KINDS["shared"], cache, ROWS, 2)
    first, texts = cache.replay, [[*row, 5 + n, [6, 6, 9][n]] for n, row in enumerate(ROWS)]
    follow(replaying, KINDS["shared"], cache, texts, 4)
    assert cache.replay is not first and cache.capacity == 22
    cache.close()
    assert cache.replay is None


def test_replaying_is_refused_where_it_can_t_be(files):
    error = refused(Code.BAD_OPTION, shared, files, cuda_graph=True)
    assert "cpu" in error.why


# --- what it refuses -----------------------------------------------------------------------------


def test_a_sequence_beyond_the_model_s_positions_is_refused(decoder):
    long = list(range(3, 3 + LONGEST))
    error = refused(Code.BAD_TEXT_INPUT, decoder.prefill, decoder.cache(1, 4), [long + [5]])
    assert f"{LONGEST} positions" in error.why
    refused(Code.BAD_TEXT_INPUT, decoder.run, np.array([long + [5]]))
    cache = decoder.cache(1, LONGEST)
    decoder.prefill(cache, [long])
    refused(Code.BAD_TEXT_INPUT, decoder.extend, cache, np.array([[5]]))


def test_input_that_does_not_fit_is_refused(decoder):
    cache = decoder.cache(2, 8)
    for wrong in (
        lambda: decoder.run(IDS[0]),
        lambda: decoder.run(IDS[:, :0]),
        lambda: decoder.run(IDS, np.ones((3, 8))),
        lambda: decoder.run(IDS, np.array([[1] * 9, [0] * 9, [1] * 9])),
        lambda: decoder.run(IDS, None, IDS),
        lambda: decoder.run(IDS + 100),
        lambda: decoder.run(IDS - 100),
        lambda: decoder.prefill(cache, [[5], []]),
        lambda: decoder.prefill(cache, [[5]]),
        lambda: decoder.prefill(cache, [[5], [101]]),
        lambda: decoder.extend(cache, IDS),
        lambda: decoder.cache(0, 8),
    ):
        refused(Code.BAD_TEXT_INPUT, wrong)
    assert cache.width == 0


def test_padding_that_a_graph_can_t_have_is_refused(files):
    for kind in ("shared", "mixed"):
        decoder = Decoder(files[kind], device="cpu")
        cache = decoder.cache(2, 8)
        mask = np.array([[0, 1], [1, 1]])
        refused(Code.BAD_TEXT_INPUT, decoder.extend, cache, IDS[:2, :2], mask)
    decoder.extend(cache, IDS[:2, :2])
    refused(Code.BAD_TEXT_INPUT, decoder.extend, cache, IDS[:2, :2], mask[:, ::-1])
    assert cache.width == 2


def test_a_step_that_fails_leaves_the_cache_as_it_was(tmp_path):
    tiny = KINDS["shared"]
    said = {k: v for k, v in told(tiny).items() if k != "surgeon.positions"}
    decoder = Decoder(write(tmp_path / "m.onnx", tiny, metadata=said), device="cpu")
    assert decoder.positions is None
    cache = decoder.cache(1, 8)
    decoder.prefill(cache, ROWS[:1])
    error = refused(Code.RUNTIME_FAILED, decoder.extend, cache, np.full((1, LONGEST), 5))
    assert "GroupQueryAttention" in error.why
    assert cache.width == 9
    follow(decoder, tiny, cache, ROWS[:1], 3)


def test_graphs_that_have_no_kernels_for_cuda(files, tmp_path, monkeypatch):
    from surgeon.runtime import decoder as module
    from surgeon.runtime.graph_file import open_graph

    def on_cuda(path, *, device="auto", **options):
        graph = open_graph(path, device="cpu")
        return replace(graph, device="cuda" if device != "cpu" else "cpu", asked=device)

    monkeypatch.setattr(module, "open_graph", on_cuda)
    error = refused(Code.RUNTIME_FAILED, Decoder, files["shared"], device="cuda")
    assert "GroupQueryAttention" in error.why and "--dtype fp16" in error.try_
    taken = Decoder(files["shared"], device="auto")
    assert taken.device == "cpu" and "GroupQueryAttention" in taken.note
    assert Decoder(files["passed on"], device="cuda").device == "cuda"
    tiny = KINDS["passed on"]
    said = {**told(tiny), "surgeon.quantize": "int8"}
    dynamic = write(tmp_path / "m.onnx", tiny, metadata=said)
    assert "8-bit" in refused(Code.RUNTIME_FAILED, Decoder, dynamic, device="cuda").why
    assert Decoder(dynamic, device="auto").device == "cpu"


# --- graphs from elsewhere -----------------------------------------------------------------------


def test_a_graph_without_metadata_shares_nothing(tmp_path):
    tiny = KINDS["mixed"]
    path = write(tmp_path / "m.onnx", tiny, metadata={}, position_ids=True)
    decoder = Decoder(path, device="cpu")
    assert not any(slot.shared for slot in decoder.signature.slots)
    assert decoder.positions is None
    cache = decoder.cache(3, 0)
    decoder.prefill(cache, ROWS)
    follow(decoder, tiny, cache, ROWS, 3)


def test_what_onnxruntime_genai_writes_beside_a_graph_is_read(tmp_path):
    tiny = KINDS["shared"]
    path = write(tmp_path / "m.onnx", tiny, metadata={}, open_sizes=True)
    error = refused(Code.NOT_A_MODEL, Decoder, path, device="cpu")
    assert "head size" in error.why
    beside = {
        "model": {"context_length": 40, "decoder": {"head_size": WIDTH}, "eos_token_id": [7, 8]},
        "search": {"past_present_share_buffer": True},
    }
    (tmp_path / "genai_config.json").write_text(json.dumps(beside))
    decoder = Decoder(tmp_path, device="cpu")
    assert decoder.signature.shared and decoder.positions == 40
    assert decoder.stop_tokens == (7, 8)
    decoder.signature = replace(decoder.signature, vocab=None)  # as if ONNX Runtime couldn't tell
    cache = decoder.cache(3, 20)
    decoder.prefill(cache, ROWS)
    follow(decoder, tiny, cache, ROWS, 3)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert Decoder(tmp_path, device="cpu").stop_tokens == (9,)
    (tmp_path / "generation_config.json").write_text("[1, 2]")
    refused(Code.BAD_CHECKPOINT, Decoder, tmp_path, device="cpu")
