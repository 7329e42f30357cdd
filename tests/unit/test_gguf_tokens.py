"""Tokenizers as llama.cpp reads them."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from surgeon.emit.gguf_tokens import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, fields_of
from surgeon.emit.scales import Refused
from tests import models, vocabularies

ALIKE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fields(data: Any, vocab: int = 1000) -> dict[str, Any]:
    loaded = vocabularies.fast(json.dumps(data)) if isinstance(data, dict) else data
    source: Any = SimpleNamespace(weight_files=(), load_tokenizer=lambda: loaded)
    return {f.key.removeprefix("tokenizer."): f.value for f in fields_of(source, vocab)[0]}


def test_bpe_of_bytes_has_its_merges_and_what_a_text_begins_with() -> None:
    data = json.loads(vocabularies.byte_level())
    found = fields(data)
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", "gpt-2")
    first = found["ggml.tokens"].index("<|im_start|>")
    assert found["ggml.bos_token_id"] == first and found["ggml.add_bos_token"]
    assert found["ggml.token_type"][first] == CONTROL and not found["ggml.add_eos_token"]
    assert found["ggml.tokens"][-1] == "[PAD999]" and found["ggml.token_type"][-1] == UNUSED
    assert len(found["ggml.merges"]) == len(data["model"]["merges"])


def test_pieces_are_merged_by_score_as_their_merges_rank() -> None:
    data = json.loads(vocabularies.byte_fallback())
    found = fields(data, 2000)
    assert found["ggml.model"] == "llama" and found["ggml.add_space_prefix"]
    one, two = ("".join(data["model"]["merges"][i]) for i in (0, 9))
    at = found["ggml.tokens"].index
    assert found["ggml.scores"][at(one)] > found["ggml.scores"][at(two)]
    kinds = [found["ggml.token_type"][at(t)] for t in ("<unk>", "<s>", "<0x0A>", one)]
    assert kinds == [UNKNOWN, CONTROL, BYTE, NORMAL]


@pytest.mark.parametrize(
    ("digits", "name"), [(r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}", "qwen2"), (r"\p{N}+", "")]
)
def test_how_a_text_is_cut_has_a_name_or_is_refused(digits: str, name: str) -> None:
    data = json.loads(vocabularies.byte_level())
    cut = {"Regex": ALIKE.replace("DIGITS", digits)}
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": cut, "behavior": "Isolated", "invert": False},
            {**data["pre_tokenizer"], "use_regex": False},
        ],
    }
    if name:
        assert fields(data)["ggml.pre"] == name
    else:
        with pytest.raises(Refused, match="Split"):
            fields(data)


def test_other_tokenizers_are_refused_by_what_they_are() -> None:
    with pytest.raises(Refused, match="WordLevel"):
        fields(models.tokenizer())
    with pytest.raises(Refused, match="5 rows"):
        fields(json.loads(vocabularies.byte_level()), 5)
