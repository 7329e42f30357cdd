"""Smaller vocabularies: what stays, and that texts come out as the same tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgeon.errors import Code, SurgeonError
from surgeon.vocabulary import rewrite
from surgeon.vocabulary.bpe import path, ranks_of
from surgeon.vocabulary.choose import choose
from surgeon.vocabulary.tokens import BYTES, Tokens
from tests.vocabularies import KINDS, byte_fallback, byte_level, corpus, fast

every_kind = pytest.mark.parametrize("kind", KINDS)


def tokens_of(kind: str) -> Tokens:
    return Tokens.of(json.loads(KINDS[kind]()), "here")


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def counts(kind: str, texts: Sequence[str]) -> dict[int, int]:
    found: dict[int, int] = {}
    for text in texts:
        for one in ids(full(kind), text):
            found[one] = found.get(one, 0) + 1
    return found


@cache
def full(kind: str) -> Any:
    return fast(KINDS[kind]())


def pieces() -> list[str]:
    return [corpus(), *(line.strip() for line in corpus().splitlines() if line.strip())]


@cache
def small(kind: str, keep: int | None = None) -> tuple[Any, dict[int, int]]:
    """The tokenizer after a trim to the corpus, and the new number of every old one that stays."""
    tokens, data = tokens_of(kind), json.loads(KINDS[kind]())
    kept = choose(tokens, tokens.base, counts(kind, pieces()), len(full(kind)), keep=keep)
    numbers = {old: new for new, old in enumerate(kept)}
    return fast(json.dumps(rewrite.tokenizer_json(data, tokens, numbers, "here"))), numbers


# --- what stays ----------------------------------------------------------------------------------


def test_a_token_is_built_from_what_merging_passes_through() -> None:
    ranks = ranks_of(["a b", ["c", "d"], "ab cd", "b c"])
    assert path("abcd", ranks) == {"a", "b", "c", "d", "ab", "cd", "abcd"}
    assert path("bcd", ranks) == {"bcd"}  # c and d merge first, and b cd is no merge
    assert path("a", ranks) == {"a"}


@every_kind
def test_a_trimmed_tokenizer_is_smaller_and_keeps_what_it_adds(kind: str) -> None:
    before, (after, numbers) = full(kind), small(kind)
    assert len(after) == len(numbers) < len(before)
    assert after.get_vocab() == {
        t: numbers[i] for t, i in before.get_vocab().items() if i in numbers
    }
    for token, i in tokens_of(kind).added.items():
        assert after.convert_tokens_to_ids(token) == numbers[i]
    assert after.eos_token == before.eos_token and after.chat_template == before.chat_template
    assert list(numbers) == sorted(numbers)


def test_tokens_on_the_way_to_those_of_the_corpus_stay() -> None:
    used = set(counts("byte level", pieces()))
    between = small("byte level")[1].keys() - used - tokens_of("byte level").base
    assert between


@every_kind
def test_the_corpus_is_cut_into_the_same_tokens(kind: str) -> None:
    after, numbers = small(kind)
    for text in pieces():
        assert ids(after, text) == [numbers[one] for one in ids(full(kind), text)]


@every_kind
@given(data=st.data())
def test_so_is_any_chunk_whose_tokens_stay(kind: str, data: Any) -> None:
    start = data.draw(st.integers(0, len(corpus()) - 1))
    text = corpus()[start : start + data.draw(st.integers(1, 300))]
    after, numbers = small(kind)
    old = ids(full(kind), text)
    if all(one in numbers for one in old):
        assert ids(after, text) == [numbers[one] for one in old]


@every_kind
@given(text=st.text(max_size=40))
def test_any_other_text_comes_back_as_it_did_before(kind: str, text: str) -> None:
    before = full(kind)
    unknown = before.convert_tokens_to_ids("<unk>")
    for keep in (None, len(tokens_of(kind).base) + 5):
        after, numbers = small(kind, keep)
        old, new = ids(before, text), ids(after, text)
        assert after.decode(new) == before.decode(old)
        if unknown is not None:
            assert new.count(numbers[unknown]) == old.count(unknown)


def test_bytes_stand_in_for_characters_that_go() -> None:
    tokens = tokens_of("byte fallback")
    single = {i for token, i in tokens.ids.items() if len(token) == 1}
    assert {tokens.ids[byte] for byte in BYTES} <= tokens.base
    assert not single <= small("byte fallback")[1].keys()
    kept = tokens_of("unigram")  # it has no bytes
    assert {i for token, i in kept.ids.items() if len(token) == 1} <= kept.base


@every_kind
def test_the_most_frequent_stay_where_not_all_may(kind: str) -> None:
    tokens, found = tokens_of(kind), counts(kind, pieces())
    rows, most = len(full(kind)), len(tokens.base) + 60
    kept = choose(tokens, tokens.base, found, rows, keep=most)
    assert len(kept) <= most
    first = max(found, key=lambda one: (found[one], -one))
    assert first in kept
    half = choose(tokens, tokens.base, found, rows, coverage=0.5)
    stayed = sum(n for one, n in found.items() if one in half)
    assert 0.5 * sum(found.values()) <= stayed
    assert len(half) < len(choose(tokens, tokens.base, found, rows))


def test_how_many_stay_is_a_multiple() -> None:
    tokens = tokens_of("byte level")
    size = len(full("byte level"))
    found = counts("byte level", pieces())
    least = choose(tokens, tokens.base, found, size)
    # As many rows as a multiple may ever lack: what the tokenizer learnt differs from run to run.
    padded = choose(tokens, tokens.base, found, size + 64, multiple=64)
    assert len(padded) % 64 == 0 and set(least) < set(padded)
    spare = [one for one in padded if one >= size]
    assert spare == list(range(size, size + len(padded) - len(least)))  # rows without a token first
    more = choose(tokens, tokens.base, found, size, multiple=64)
    assert len(more) % 64 == 0 and set(least) < set(more) and max(more) < size
    assert set(more) == tokens.closed(more)
    assert choose(tokens, tokens.base, found, size, multiple=512) == tuple(range(size))
    limited = choose(tokens, tokens.base, found, size, keep=330, multiple=64)
    assert len(limited) == 384


# --- what names tokens by number -----------------------------------------------------------------


def test_a_template_adds_the_token_under_its_new_number() -> None:
    after, numbers = small("byte level")
    start = full("byte level").convert_tokens_to_ids("<|im_start|>")
    assert after("to")["input_ids"] == [numbers[start], *ids(after, "to")]
    data = {
        "type": "Sequence",
        "processors": [
            {"type": "ByteLevel"},
            {"type": "RobertaProcessing", "sep": ["a", 4], "cls": ["b", 9]},
        ],
    }
    made = rewrite.tokenizer_json(
        {**json.loads(byte_level()), "post_processor": data},
        tokens_of("byte level"),
        {i: i - 3 for i in range(3, 900)} | {0: 0},
        "here",
    )
    last = made["post_processor"]["processors"][1]
    assert (last["sep"], last["cls"]) == (["a", 1], ["b", 6])
    assert rewrite.special_ids({"post_processor": data}) == {4, 9}


def test_settings_that_name_tokens() -> None:
    numbers = {2: 0, 7: 1, 9: 2}
    found = rewrite.renumbered(
        {
            "eos_token_id": [7, 9],
            "pad_token_id": 2,
            "bos_token_id": None,
            "image_token_id": -1,
            "suppress_tokens": [1, 9],
            "begin_suppress_tokens": [1],
            "bad_words_ids": [[7], [7, 8]],
            "sequence_bias": [[[9], -1.5], [[8], 2.0]],
            "max_length": 7,
        },
        numbers,
    )
    assert found == {
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
        "image_token_id": -1,
        "suppress_tokens": [2],
        "begin_suppress_tokens": None,
        "bad_words_ids": [[1]],
        "sequence_bias": [[[2], -1.5]],
    }
    assert rewrite.config_ids({"eos_token_id": [7, 9], "x_token_id": 12, "top_k": 3}, 10) == {7, 9}


def test_the_files_of_older_tokenizers() -> None:
    numbers = {0: 0, 5: 1}
    assert rewrite.added_tokens({"<a>": 0, "<b>": 5}, numbers, "here") == {"<a>": 0, "<b>": 1}
    config = {"added_tokens_decoder": {"0": {"content": "<a>"}, "5": {"content": "<b>"}}, "x": 1}
    assert rewrite.tokenizer_config(config, numbers, "here") == {
        "added_tokens_decoder": {"0": {"content": "<a>"}, "1": {"content": "<b>"}},
        "x": 1,
    }
    with pytest.raises(SurgeonError, match="names token 7, which there isn't"):
        rewrite.added_tokens({"<c>": 7}, numbers, "here")


# --- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"type": "WordLevel"}, "WordLevel, not BPE"),
        ({"dropout": 0.1}, "at random"),
        ({"end_of_word_suffix": "</w>"}, "marks parts"),
    ],
)
def test_other_models_are_refused(change: dict[str, Any], why: str) -> None:
    data = json.loads(byte_fallback())
    data["model"] |= change
    with pytest.raises(SurgeonError, match=why) as caught:
        Tokens.of(data, "here")
    assert caught.value.code is Code.BAD_OPTION and caught.value.at == "here"


def test_fewer_than_any_text_needs_are_refused(tmp_path: Path) -> None:
    tokens = tokens_of("byte level")
    with pytest.raises(SurgeonError, match="10 tokens are to stay, and 259 have to") as caught:
        choose(tokens, tokens.base, {}, 700, keep=10)
    assert "259 or more" in caught.value.try_


def test_a_post_processor_that_is_unknown_is_refused() -> None:
    data = {**json.loads(byte_level()), "post_processor": {"type": "Own"}}
    with pytest.raises(SurgeonError, match="Own, which is unknown"):
        rewrite.tokenizer_json(data, tokens_of("byte level"), {i: i for i in range(900)}, "here")
