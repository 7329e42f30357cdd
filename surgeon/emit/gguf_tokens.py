"""A tokenizer as llama.cpp reads it from GGUF metadata.

Reference: llama.cpp, src/llama-vocab.cpp: `tokenizer.ggml.model` is gpt2 for BPE of bytes and llama
for SentencePiece; `tokenizer.ggml.pre` names one of its ways to cut a text before BPE.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgeon.emit.scales import Refused

CUT = {
    r"\p{L}+|\p{N}{1,3}| ?": "llama-bpe",
    r"\p{L}+|\p{N}| ?": "qwen2",
}
"""What tells regular expressions apart that are alike otherwise: how many digits go together."""

_SPLIT = re.compile(
    r"\(\?(?:i:|:)'s\|'t\|'re\|'ve\|'m\|'ll\|'d\)\|\[\^\\r\\n\\p\{L\}\\p\{N\}\]\?"
    r"(?P<digits>.*?)\[\^\\s\\p\{L\}\\p\{N\}\]\+\[\\r\\n\]\*\|"
    r"\\s\*\[\\r\\n\]\+\|\\s\+\(\?!\\S\)\|\\s\+"
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""gguf's TokenType."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""


@dataclass(frozen=True)
class Field:
    """A metadata field: `kind` is `string`, `bool`, `uint32`, or one of these in an array."""

    key: str
    value: Any
    kind: str


def fields_of(source: Any, vocab: int) -> tuple[list[Field], tuple[str, ...]]:
    """Returns the fields that describe a source's tokenizer, and what to say of them.

    Args:
        source: of the model; where that is a GGUF file, its fields are taken as they are.
        vocab: rows of the embedding.

    Raises:
        Refused: llama.cpp has no tokenizer like it.
    """
    files = source.weight_files
    if files and files[0].suffix == ".gguf":
        copied = _copied(files[0])
        if copied:
            return copied, ()
    loaded = source.load_tokenizer()
    if loaded is None:
        note = "the model has no tokenizer: the file takes token ids alone"
        return [Field("tokenizer.ggml.model", "no_vocab", "string")], (note,)
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise Refused(f"its tokenizer, {type(loaded).__name__}, has no tokenizer.json")
    data = json.loads(backend.to_str())
    if data["model"]["type"] != "BPE":
        raise Refused(f"its tokenizer is {data['model']['type']}, and BPE is what is written")
    fields = _bytes(data) if _is_bytes(data) else _pieces(data)
    return [*fields, *_listed(data, vocab), *_special(loaded)], ()


def _copied(path: Path) -> list[Field]:
    """Returns the tokenizer's fields of a GGUF file."""
    from gguf import GGUFReader, GGUFValueType

    out: list[Field] = []
    for key, found in GGUFReader(path).fields.items():
        if not key.startswith("tokenizer."):
            continue
        kinds = [GGUFValueType(kind).name.lower() for kind in found.types]
        out.append(Field(key, found.contents(), "array of " * (len(kinds) > 1) + kinds[-1]))
    return out


def _steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _is_bytes(data: dict[str, Any]) -> bool:
    steps = _steps(data["pre_tokenizer"], "pretokenizers")
    return any(step["type"] == "ByteLevel" for step in steps)


def _bytes(data: dict[str, Any]) -> list[Field]:
    """Returns how a text is cut before BPE of bytes."""
    normal = [step["type"] for step in _steps(data["normalizer"], "normalizers")]
    if set(normal) - {"NFC"}:
        raise Refused(f"its tokenizer changes texts first ({', '.join(normal)})")
    return [
        Field("tokenizer.ggml.model", "gpt2", "string"),
        Field("tokenizer.ggml.pre", _cut(data), "string"),
    ]


def _cut(data: dict[str, Any]) -> str:
    """Returns llama.cpp's name for the way in which a text is cut before BPE.

    Raises:
        Refused: none is known.
    """
    steps = _steps(data["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    last = steps[-1]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        digits = kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits")
        if digits and last.get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            found = _SPLIT.fullmatch(str(steps[0]["pattern"].get("Regex", "")))
            name = CUT.get(found["digits"]) if found else None
            if name and steps[0]["behavior"] == "Isolated" and not steps[0]["invert"]:
                return name
    raise Refused(f"llama.cpp's name for how its tokenizer cuts texts ({kinds}) isn't known here")


def _pieces(data: dict[str, Any]) -> list[Field]:
    """Returns the fields of a tokenizer that SentencePiece made, read off its merges.

    A merge's score is its rank: llama.cpp merges the pair whose result has the highest score.
    """
    model = data["model"]
    steps = _steps(data["pre_tokenizer"], "pretokenizers")
    normal = _steps(data["normalizer"], "normalizers")
    prefix = any(step["type"] == "Prepend" and step["prepend"] == SPACE for step in normal)
    spaced = any(step["type"] == "Replace" and step["content"] == SPACE for step in normal)
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == SPACE:
            spaced, prefix = True, prefix or step.get("prepend_scheme") in ("first", "always")
    if not (model.get("byte_fallback") and spaced):
        raise Refused("its tokenizer is neither BPE of bytes nor one of SentencePiece")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault("".join(pair), rank)
    scores = {token: -float(ranks.get(token, 0)) for token in model["vocab"]}
    by_id = sorted(model["vocab"].items(), key=lambda item: item[1])
    return [
        Field("tokenizer.ggml.model", "llama", "string"),
        Field("tokenizer.ggml.pre", "default", "string"),
        Field("tokenizer.ggml.scores", [scores[t] for t, _ in by_id], "array of float32"),
        Field("tokenizer.ggml.add_space_prefix", prefix, "bool"),
    ]


def _listed(data: dict[str, Any], vocab: int) -> list[Field]:
    """Returns the tokens in order, what kind each is, and for BPE of bytes the merges."""
    model, pieces = data["model"], not _is_bytes(data)
    tokens = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(tokens, NORMAL)
    if pieces:
        for number, token in tokens.items():
            if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
                kinds[number] = BYTE
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if pieces and unknown is not None:
        kinds[unknown] = UNKNOWN
    if max(tokens) >= vocab:
        raise Refused(f"its tokenizer has the token {max(tokens)}, its embedding {vocab} rows")
    out = [
        Field(
            "tokenizer.ggml.tokens",
            [tokens.get(i, f"[PAD{i}]") for i in range(vocab)],
            "array of string",
        ),
        Field(
            "tokenizer.ggml.token_type",
            [kinds.get(i, UNUSED) for i in range(vocab)],
            "array of int32",
        ),
    ]
    if not pieces:
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        out.append(Field("tokenizer.ggml.merges", merges, "array of string"))
    return out


def _special(loaded: Any) -> list[Field]:
    """Returns the tokens with a meaning, and which of them a text begins and ends with."""
    bare = loaded("a", add_special_tokens=False)["input_ids"]
    full = loaded("a")["input_ids"]
    begins, ends = full[:1] != bare[:1], full[-1:] != bare[-1:]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    numbers: dict[str, Any] = {ours: getattr(loaded, f"{ours}_token_id", None) for ours in names}
    # What a text really begins with counts, whatever it is called.
    numbers |= {"bos": full[0]} if begins else {}
    numbers |= {"eos": full[-1]} if ends else {}
    out = [
        Field(f"tokenizer.ggml.{theirs}_token_id", int(numbers[ours]), "uint32")
        for ours, theirs in names.items()
        if numbers[ours] is not None
    ]
    out.append(Field("tokenizer.ggml.add_bos_token", begins, "bool"))
    out.append(Field("tokenizer.ggml.add_eos_token", ends, "bool"))
    if isinstance(loaded.chat_template, str):
        out.append(Field("tokenizer.chat_template", loaded.chat_template, "string"))
    return out
