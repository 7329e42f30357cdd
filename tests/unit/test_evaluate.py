from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surgeon.errors import Code, SurgeonError
from surgeon.report.evaluate import Text, default_text, perplexity, read_text


class Function:
    """A model with known logits: `ids + 1` has probability p, the rest share what is left."""

    def __init__(self, vocab: int, p: float) -> None:
        self.vocab, self.p = vocab, p
        self.seen: list[np.ndarray] = []

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        self.seen.append(ids)
        rest = (1 - self.p) / (self.vocab - 1)
        probability = np.full((*ids.shape, self.vocab), rest)
        np.put_along_axis(probability, (ids[..., None] + 1) % self.vocab, self.p, axis=-1)
        # An offset per row that softmax takes out, so that unnormalised logits are what is tested.
        return np.log(probability) + 7.0


def refused(code: Code, *args, **options) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        perplexity(*args, **options)
    assert caught.value.code is code
    return caught.value


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_perplexity_of_known_probabilities(kind):
    vocab, window = 11, 200  # longer than one chunk of rows, and no multiple of it
    ids = np.arange(1000) % vocab
    ids[150] = ids[149]  # one prediction of the first window is wrong, and so is the one after it
    ids[151:] = (ids[151:] + 5) % vocab
    model = Function(vocab, 0.5)
    function = (
        (lambda x: torch.from_numpy(model(x)).to(torch.float64)) if kind == "torch" else model
    )
    result = perplexity(function, ids, window=window, max_windows=3)
    wrong = int(
        (
            (ids[: 3 * window].reshape(3, window)[:, :-1] + 1) % vocab
            != ids[: 3 * window].reshape(3, window)[:, 1:]
        ).sum()
    )
    assert wrong == 2
    total = 3 * (window - 1)
    mean = ((total - wrong) * math.log(2) + wrong * -math.log(0.05)) / total
    assert result.perplexity == pytest.approx(math.exp(mean), rel=1e-6)
    assert (result.windows, result.window, result.tokens) == (3, window, total)


def test_windows_don_t_overlap_and_start_at_the_text_s_start():
    model = Function(1000, 0.5)
    result = perplexity(model, list(range(95)), window=10)
    assert result.windows == 9
    assert np.array_equal(np.concatenate(model.seen), np.arange(90).reshape(9, 10))
    assert all(ids.dtype == np.int64 for ids in model.seen)


def test_text_is_cut_by_characters_and_gets_no_special_tokens(tiny, tiny_tokenizer):
    seen = Function(101, 0.5)
    result = perplexity(seen, tiny_tokenizer, text=Text("mine", "ab" * 50), window=10, max_chars=35)
    assert (result.windows, result.text) == (3, "mine")
    assert tiny_tokenizer.decode(np.concatenate(seen.seen, axis=1)[0]) == "ab" * 15


def test_a_model_in_half_precision_is_scored_in_single():
    ids = np.arange(64) % 7
    model = Function(7, 0.9)

    def half(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(model(x)).to(torch.bfloat16)

    rounded = perplexity(lambda x: half(x).float(), ids, window=32).perplexity
    assert perplexity(half, ids, window=32).perplexity == rounded


def test_transformers_model_agrees_with_its_own_loss(tiny):
    model = tiny("Llama")
    ids = np.random.default_rng(0).integers(3, 101, 128)
    result = perplexity(model, ids, window=64, progress=True)
    with torch.no_grad():
        losses = [
            model(part[None], labels=part[None]).loss.item()
            for part in torch.from_numpy(ids).split(64)
        ]
    assert result.perplexity == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def test_default_text_is_python_s_own_and_says_so(tiny_tokenizer):
    text = default_text()
    assert "pydoc_data.topics" in text.name and len(text.content) > 300_000
    assert text == default_text()
    result = perplexity(Function(101, 0.5), tiny_tokenizer, window=16, max_windows=1)
    assert result.text == text.name


def test_short_texts_and_bad_windows_are_refused(tiny, tiny_tokenizer):
    error = refused(Code.BAD_TEXT_INPUT, Function(101, 0.5), tiny_tokenizer, text="short")
    assert "5 tokens" in error.what
    refused(Code.BAD_OPTION, Function(101, 0.5), [1, 2, 3], window=1)
    refused(Code.BAD_OPTION, Function(101, 0.5), [1, 2, 3], window=2, max_windows=0)
    error = refused(Code.BAD_OPTION, tiny("Llama"), list(range(100)), window=65)
    assert "64 positions" in error.why
    refused(Code.MISSING_FILE, tiny("Llama"), None, window=32)
    refused(Code.NOT_A_MODEL, object(), [1, 2, 3], window=2)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda ids: np.zeros((1, 3, 9), np.float32), "shape [1, 3, 9]"),
        (lambda ids: np.zeros((*ids.shape, 5), np.float32), "5 of them for token id 8"),
        (lambda ids: np.full((*ids.shape, 9), np.nan, np.float32), "not finite"),
    ],
)
def test_logits_that_can_t_be_scored_are_refused(model, says):
    assert says in refused(Code.RUNTIME_FAILED, model, list(range(9)), window=8 + 1).what


def test_a_hopeless_model_has_infinite_perplexity():
    def model(ids):
        logits = np.zeros((*ids.shape, 9), np.float32)
        logits[..., 0] = 1e6
        return logits

    assert perplexity(model, list(range(9)), window=9).perplexity == math.inf


def test_read_text(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("zażółć", encoding="utf-8")
    bad.write_bytes(b"ab\xff")
    assert read_text(good) == Text("good.txt", "zażółć")
    for path, code in ((bad, Code.BAD_TEXT_INPUT), (tmp_path / "no", Code.MISSING_FILE)):
        with pytest.raises(SurgeonError) as caught:
            read_text(path)
        assert caught.value.code is code
