from __future__ import annotations

import pytest
import transformers

from surgeon.runtime.text import TextStream

BROKEN = "\ufffd"


@pytest.fixture(scope="module")
def by_bytes():
    """A tokenizer of one token a byte, so that most characters are several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab | {"<end>": 256}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.fixture(scope="module")
def with_spaces():
    """A tokenizer of whole words that drops a space at the start of what it decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "▁the", "▁cat", "▁sat"]
    core = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


TEXTS = ["plain", "zażółć gęślą jaźń", "東京は 🙂🙃!", "e\u0301 a\u200db", "👩‍👩‍👧 end"]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_come_whole_and_none_is_lost(by_bytes, text):
    tokens = by_bytes(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    stream = TextStream(by_bytes, by_bytes("ż: ")["input_ids"])
    pieces = [stream.push(token) for token in tokens] + [stream.close()]
    assert "".join(pieces) == text == stream.text
    assert all(BROKEN not in piece for piece in pieces)
    # Each character is given out by the token that completes it, and not later.
    assert [p for p in pieces if p] == list(text)


def test_a_broken_end_is_given_out_at_the_end(by_bytes):
    tokens = by_bytes("a東")["input_ids"][:-1]
    stream = TextStream(by_bytes)
    assert [stream.push(token) for token in tokens] == ["a", "", ""]
    assert stream.close() == BROKEN
    assert stream.close() == ""


def test_bytes_that_are_no_character_hold_nothing_back_for_ever(by_bytes):
    stray = by_bytes("é")["input_ids"][:1]
    stream = TextStream(by_bytes)
    assert [stream.push(t) for t in (*stray, *by_bytes("ab")["input_ids"])] == [
        "",
        BROKEN + "a",
        "b",
    ]


def test_special_tokens_are_no_text(by_bytes):
    stream = TextStream(by_bytes)
    assert [stream.push(t) for t in (*by_bytes("a")["input_ids"], 256)] == ["a", ""]
    assert stream.close() == ""


def test_a_space_between_prompt_and_text_is_kept(with_spaces):
    prompt = with_spaces("the")["input_ids"]
    tokens = with_spaces("the cat sat")["input_ids"][1:]
    stream = TextStream(with_spaces, prompt)
    assert [stream.push(token) for token in tokens] == [" cat", " sat"]
