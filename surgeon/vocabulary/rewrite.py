"""Everything that names a token by its number, in the numbers after some have gone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from surgeon.vocabulary.bpe import pair_of
from surgeon.vocabulary.tokens import Tokens, refused

Numbers = Mapping[int, int]
"""The new number of each token that stays, by its old one."""

FLAT = ("suppress_tokens", "begin_suppress_tokens")
"""Settings that list tokens: one that is gone needs no mention."""

NESTED = ("bad_words_ids",)
"""Settings that list sequences of tokens: one with a token that is gone can't come up."""


# --- the tokenizer -------------------------------------------------------------------------------


def tokenizer_json(
    data: Mapping[str, Any], tokens: Tokens, numbers: Numbers, where: str
) -> dict[str, Any]:
    """Returns a tokenizer's JSON with the tokens that stay, under their new numbers.

    Args:
        data: `tokenizer.json`.
        tokens: what it says of its tokens.
        numbers: of those that stay.
        where: the model, for refusals.

    Raises:
        SurgeonError: `bad-option` for a post-processor that Surgeon doesn't know.
    """
    model: dict[str, Any] = dict(data["model"])
    if model["type"] == "BPE":
        stay = {t: numbers[i] for t, i in tokens.ids.items() if i in numbers}
        model["vocab"] = stay
        model["merges"] = [m for m in model["merges"] if _stays(m, stay)]
    else:
        model["vocab"] = [entry for i, entry in enumerate(model["vocab"]) if i in numbers]
        if model.get("unk_id") is not None:
            model["unk_id"] = numbers[int(model["unk_id"])]
    out = {**data, "model": model}
    out["added_tokens"] = [
        {**t, "id": _number(numbers, t["id"], where)} for t in data.get("added_tokens") or ()
    ]
    padding = data.get("padding")
    if padding:
        # A padding token that the tokenizer hasn't is whatever row 0 is.
        out["padding"] = {**padding, "pad_id": numbers.get(int(padding["pad_id"]), 0)}
    out["post_processor"] = _post(data.get("post_processor"), numbers, where)
    return out


def _number(numbers: Numbers, old: int | str, where: str) -> int:
    """Returns a token's new number.

    Raises:
        SurgeonError: `bad-option` where a file names one that the tokenizer hasn't.
    """
    found = numbers.get(int(old))
    if found is None:
        raise refused(f"a file of its tokenizer names token {old}, which there isn't", where)
    return found


def _stays(merge: object, stay: Mapping[str, int]) -> bool:
    left, right = pair_of(merge)
    return left in stay and right in stay and left + right in stay


def _post(part: Mapping[str, Any] | None, numbers: Numbers, where: str) -> Any:
    """Returns what adds special tokens to a text, in new numbers."""
    if part is None or part["type"] == "ByteLevel":
        return part
    if part["type"] == "Sequence":
        return {**part, "processors": [_post(p, numbers, where) for p in part["processors"]]}
    if part["type"] == "TemplateProcessing":
        special = {
            name: {**token, "ids": [_number(numbers, i, where) for i in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
        return {**part, "special_tokens": special}
    if part["type"] in ("BertProcessing", "RobertaProcessing"):
        pairs = {
            end: [part[end][0], _number(numbers, part[end][1], where)] for end in ("sep", "cls")
        }
        return {**part, **pairs}
    raise refused(f"its tokenizer's post-processor is {part['type']}, which is unknown", where)


def special_ids(data: Mapping[str, Any]) -> set[int]:
    """Returns the tokens that a tokenizer's post-processor names by number."""
    part = data.get("post_processor")
    parts = [part] if part else []
    out: set[int] = set()
    while parts:
        one = parts.pop()
        parts += one.get("processors", ())
        for token in (one.get("special_tokens") or {}).values():
            out.update(token["ids"])
        out.update(one[end][1] for end in ("sep", "cls") if end in one)
    return out


def tokenizer_config(data: Mapping[str, Any], numbers: Numbers, where: str) -> dict[str, Any]:
    """Returns `tokenizer_config.json` in new numbers."""
    out = dict(data)
    if data.get("added_tokens_decoder"):
        out["added_tokens_decoder"] = {
            str(_number(numbers, i, where)): token
            for i, token in data["added_tokens_decoder"].items()
        }
    return out


def added_tokens(data: Mapping[str, int], numbers: Numbers, where: str) -> dict[str, int]:
    """Returns `added_tokens.json` in new numbers."""
    return {token: _number(numbers, i, where) for token, i in data.items()}


# --- configurations ------------------------------------------------------------------------------


def _names_tokens(name: str) -> bool:
    return name.endswith(("_token_id", "_token_ids"))


def config_ids(data: Mapping[str, Any], rows: int) -> set[int]:
    """Returns the tokens that a configuration gives a meaning, such as the one that ends a text.

    Args:
        data: a model's or a generation's configuration.
        rows: of the embedding; a number beyond them is no token.
    """
    found = (one for name, value in data.items() if _names_tokens(name) for one in _all(value))
    return {one for one in found if 0 <= one < rows}


def _all(value: Any) -> Iterable[int]:
    many = value if isinstance(value, list | tuple) else [value]
    return [one for one in many if isinstance(one, int) and not isinstance(one, bool)]


def renumbered(data: Mapping[str, Any], numbers: Numbers) -> dict[str, Any]:
    """Returns those settings of a configuration that name tokens, in new numbers.

    A number that is no token's stays what it is.
    """
    out: dict[str, Any] = {}
    for name, value in data.items():
        if value is None:
            continue
        if _names_tokens(name):
            out[name] = (
                [numbers.get(i, i) for i in value]
                if isinstance(value, list | tuple)
                else numbers.get(value, value)
            )
        elif name in FLAT:
            out[name] = [numbers[i] for i in value if i in numbers]
        elif name in NESTED:
            out[name] = _sequences(value, numbers)
        elif name == "sequence_bias":
            pairs = value.items() if isinstance(value, Mapping) else value
            kept = [(ids, bias) for ids, bias in pairs if all(i in numbers for i in ids)]
            out[name] = [[[numbers[i] for i in ids], bias] for ids, bias in kept]
    # An empty list of words is refused where none is what is meant.
    return {name: value if value != [] else None for name, value in out.items()}


def _sequences(value: Iterable[Iterable[int]], numbers: Numbers) -> list[list[int]]:
    rows = [list(row) for row in value]
    return [[numbers[i] for i in row] for row in rows if all(i in numbers for i in row)]


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """Returns a copy of a configuration object with other values."""
    out = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(out, name, value)
    return out
