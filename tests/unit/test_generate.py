from __future__ import annotations

import numpy as np
import pytest
import torch

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.generate import GREEDY, Sampling, generate, stream
from surgeon.runtime.sampling import next_token
from tests import models

PROMPT = "a cat and a dog"


class Recomputed:
    """A Transformers model seen as a plain function, and so without its cache."""

    def __init__(self, model) -> None:
        self.model = model

    def __call__(self, ids: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return self.model(torch.from_numpy(ids)).logits


def refused(code: Code, *args, **options) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        generate(*args, **options)
    assert caught.value.code is code
    return caught.value


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_recomputation_says_what_transformers_says(tiny, tiny_tokenizer, name):
    model = tiny(name)
    own = generate(model, tiny_tokenizer, PROMPT, max_new_tokens=20)
    again = generate(Recomputed(model), tiny_tokenizer, PROMPT, max_new_tokens=20)
    assert own.tokens == again.tokens and own.text == again.text
    assert 0 < len(own.tokens) <= 20
    assert len(set(own.tokens)) > 1
    assert own.text == tiny_tokenizer.decode(own.tokens, skip_special_tokens=True)


@pytest.mark.parametrize("through", [lambda m: m, Recomputed])
def test_sampling_is_seeded_and_one_top_token_is_greedy(tiny, tiny_tokenizer, through):
    model = through(tiny("Llama"))

    def sample(**options):
        sampling = Sampling(**options)
        return generate(model, tiny_tokenizer, PROMPT, max_new_tokens=16, sampling=sampling).tokens

    assert sample(temperature=1.5, seed=1) == sample(temperature=1.5, seed=1)
    assert sample(temperature=1.5, seed=1) != sample(temperature=1.5, seed=2)
    greedy = generate(model, tiny_tokenizer, PROMPT, max_new_tokens=16).tokens
    assert sample(temperature=1.5, top_k=1) == sample(temperature=1.5, top_p=1e-9) == greedy


def test_sampling_leaves_torch_s_own_random_numbers_alone(tiny, tiny_tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    sampling = Sampling(temperature=1.0, seed=9)
    generate(tiny("Llama"), tiny_tokenizer, PROMPT, max_new_tokens=4, sampling=sampling)
    assert torch.equal(torch.rand(3), expected)


def test_the_model_s_own_sampling_settings_don_t_change_greedy(tiny_tokenizer):
    model = models.build("Llama")
    expected = generate(model, tiny_tokenizer, PROMPT, max_new_tokens=12).tokens
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    assert generate(model, tiny_tokenizer, PROMPT, max_new_tokens=12).tokens == expected


def test_filters_keep_the_right_tokens():
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    draw = np.random.default_rng(0)

    def seen(**options) -> set[int]:
        return {next_token(logits, Sampling(temperature=1.0, **options), draw) for _ in range(300)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {1, 3}
    assert seen(top_p=0.65) == {1, 3}
    assert seen(top_p=0.75) == {1, 2, 3}
    assert next_token(logits, GREEDY, draw) == 1
    counts = np.bincount([next_token(logits, Sampling(temperature=1.0), draw) for _ in range(4000)])
    assert counts / 4000 == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.04)


@pytest.mark.parametrize("through", [lambda m: m, Recomputed])
def test_an_end_of_text_token_stops(tiny_tokenizer, through):
    model = models.build("Llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = (
            model.model.norm.weight
        )  # token 2 is </s>; its logit varies in sign
    done = generate(through(model), tiny_tokenizer, PROMPT, max_new_tokens=40)
    assert done.tokens.index(2) == len(done.tokens) - 1 < 39
    assert "</s>" not in done.text


def test_bad_input_is_refused(tiny, tiny_tokenizer):
    model = tiny("Llama")
    refused(Code.BAD_TEXT_INPUT, model, tiny_tokenizer, "")
    refused(Code.BAD_TEXT_INPUT, model, tiny_tokenizer, " \n")
    refused(Code.BAD_TEXT_INPUT, model, tiny_tokenizer, [])
    assert "prompt ''" in refused(Code.BAD_TEXT_INPUT, model, tiny_tokenizer, ["a", ""]).at
    refused(Code.MISSING_FILE, model, None, PROMPT)
    refused(Code.BAD_OPTION, model, tiny_tokenizer, PROMPT, max_new_tokens=0)
    assert "64 positions" in refused(Code.BAD_TEXT_INPUT, model, tiny_tokenizer, "x" * 60).why


def test_an_end_of_text_token_in_the_model_s_own_files_goes_before_the_tokenizer_s(
    tiny_tokenizer,
):
    class Counting:
        """Says the token after the last one."""

        stop_tokens = (60, 70)

        def __call__(self, ids: np.ndarray) -> np.ndarray:
            return np.eye(101, dtype=np.float32)[(ids + 1) % 101]

    written = generate(Counting(), tiny_tokenizer, "R", max_new_tokens=40)
    assert written.tokens == tuple(range(55, 61))


BATCH = [PROMPT, "so", "the moon"]


@pytest.mark.parametrize("through", [lambda m: m, Recomputed])
def test_a_batch_says_what_its_prompts_say_alone(tiny, tiny_tokenizer, through):
    model = through(tiny("Llama"))
    found = generate(model, tiny_tokenizer, BATCH, max_new_tokens=20)
    alone = [generate(model, tiny_tokenizer, text, max_new_tokens=20) for text in BATCH]
    assert [f.tokens for f in found] == [a.tokens for a in alone]
    assert [f.text for f in found] == [a.text for a in alone]
    assert len({len(f.tokens) for f in found}) > 1, "no row ends before another"


def test_a_row_of_a_sampled_batch_is_drawn_as_if_alone(tiny, tiny_tokenizer):
    model = Recomputed(tiny("Llama"))
    same = ["a cat"] * 2
    sampling = Sampling(temperature=1.5, seed=4)
    found = generate(model, tiny_tokenizer, same, max_new_tokens=6, sampling=sampling)
    for row in range(2):
        own = Sampling(temperature=1.5, seed=4 + row)
        alone = generate(model, tiny_tokenizer, "a cat", max_new_tokens=6, sampling=own)
        assert alone.tokens == found[row].tokens
    assert found[0].tokens != found[1].tokens


@pytest.mark.parametrize("through", [lambda m: m, Recomputed])
def test_text_comes_in_pieces(tiny, tiny_tokenizer, through):
    model = through(tiny("Llama"))
    pieces: list[tuple[int, str]] = []
    found = generate(
        model, tiny_tokenizer, BATCH, max_new_tokens=9, on_text=lambda *piece: pieces.append(piece)
    )
    for row, whole in enumerate(found):
        assert "".join(piece for n, piece in pieces if n == row) == whole.text
    assert len(pieces) > 3 * 5
    assert [n for n, _ in pieces][:3] == [0, 1, 2], "rows don't take turns"
    one = list(stream(model, tiny_tokenizer, PROMPT, max_new_tokens=9))
    assert "".join(one) == found[0].text and len(one) > 5


def test_a_stream_is_lazy(tiny_tokenizer):
    seen: list[int] = []

    def model(ids: np.ndarray) -> np.ndarray:
        seen.append(ids.shape[1])
        return np.eye(101, dtype=np.float32)[(ids + 1) % 101]

    found = stream(model, tiny_tokenizer, "A", max_new_tokens=30)
    assert seen == []
    assert next(found) == "B" and next(found) == "C"
    assert len(seen) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": 1, "top_k": 0},
        {"temperature": 1, "top_p": 0.0},
        {"temperature": 1, "top_p": 1.1},
        {"temperature": 1, "seed": -1},
        {"top_k": 5},
        {"top_p": 0.9},
    ],
)
def test_sampling_settings_that_mean_nothing_are_refused(options):
    with pytest.raises(SurgeonError) as caught:
        Sampling(**options)
    assert caught.value.code is Code.BAD_OPTION


def test_a_stream_of_a_transformers_model_heeds_its_own_settings(tiny_tokenizer):
    model = models.build("Llama")
    whole = generate(model, tiny_tokenizer, PROMPT, max_new_tokens=12).tokens
    model.generation_config.eos_token_id = [whole[5], 3]
    end = whole.index(whole[5]) + 1
    for text in (
        generate(model, tiny_tokenizer, PROMPT, max_new_tokens=12).text,
        "".join(stream(model, tiny_tokenizer, PROMPT, max_new_tokens=12)),
    ):
        assert text == tiny_tokenizer.decode(whole[:end], skip_special_tokens=True)
    with pytest.raises(SurgeonError, match="64 positions"):
        next(stream(model, tiny_tokenizer, "x" * 60))
