"""What a fast tokenizer says of its tokens: their numbers, and which of them others need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from surgeon.errors import Code, SurgeonError
from surgeon.vocabulary.bpe import path, ranks_of

BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
"""What the tokens for single bytes are called where characters fall back to them."""


def refused(why: str, where: str, try_: str = "") -> SurgeonError:
    """Returns the refusal of a vocabulary that can't be trimmed."""
    return SurgeonError(
        Code.BAD_OPTION,
        "the vocabulary can't be trimmed",
        at=where,
        why=why,
        try_=try_ or "leave --trim-vocab (the key vocabulary) out",
    )


@dataclass(frozen=True)
class Tokens:
    """The tokens of a tokenizer whose model is byte pair encoding or a unigram model.

    Attributes:
        model: the part `model` of the tokenizer's JSON.
        ids: numbers of the model's own tokens, by token.
        added: numbers of the tokens that are found before the model sees the text, by token.
    """

    model: Mapping[str, Any]
    ids: Mapping[str, int]
    added: Mapping[str, int]
    _needed: dict[int, frozenset[int]] = field(
        default_factory=dict[int, frozenset[int]], repr=False, compare=False
    )

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str) -> Tokens:
        """Returns what a tokenizer's JSON says.

        Args:
            data: as the library `tokenizers` writes it.
            where: the model, for refusals.

        Raises:
            SurgeonError: `bad-option` for another model, or one that cuts words at random or marks
                their parts.
        """
        model: Mapping[str, Any] = data["model"]
        kind = model.get("type")
        if kind not in ("BPE", "Unigram"):
            raise refused(f"its tokenizer's model is {kind}, not BPE or Unigram", where)
        if model.get("dropout"):
            raise refused("its tokenizer merges at random (dropout)", where)
        marks = [m for m in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(m)]
        if marks:
            raise refused(f"its tokenizer marks parts of words ({marks[0]})", where)
        vocab: Any = model["vocab"]
        ids = (
            {str(token): int(i) for token, i in vocab.items()}
            if kind == "BPE"
            else {str(entry[0]): i for i, entry in enumerate(vocab)}
        )
        added = {str(t["content"]): int(t["id"]) for t in data.get("added_tokens") or ()}
        return cls(model, ids, added)

    @cached_property
    def by_id(self) -> dict[int, str]:
        """Tokens by number, added ones too."""
        return {i: token for token, i in {**self.ids, **self.added}.items()}

    @cached_property
    def base(self) -> frozenset[int]:
        """What any text needs, so that none of it is unknown.

        That is bytes or single characters, added tokens, and what stands for unknown ones.
        """
        found = set(self.added.values())
        if self.model.get("unk_token") in self.ids:
            found.add(self.ids[self.model["unk_token"]])
        if self.model.get("unk_id") is not None:
            found.add(int(self.model["unk_id"]))
        in_bytes = bool(self.model.get("byte_fallback")) and all(b in self.ids for b in BYTES)
        if in_bytes:
            found.update(self.ids[b] for b in BYTES)
        if self.model["type"] == "Unigram":
            # What an unknown character costs is counted from the least likely token.
            scores: Sequence[Any] = self.model["vocab"]
            found.add(min(range(len(scores)), key=lambda i: scores[i][1]))
        if not in_bytes or self.model["type"] == "Unigram":
            found.update(i for token, i in self.ids.items() if len(token) == 1)
        return frozenset(found)

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return ranks_of(self.model.get("merges") or ())

    def needed(self, number: int) -> frozenset[int]:
        """Returns the tokens without which a text that has this one would be cut otherwise."""
        known = self._needed.get(number)
        if known is None:
            token = self.by_id.get(number)
            if token is None or token in self.added or self.model["type"] != "BPE":
                known = frozenset((number,))
            else:
                known = frozenset(self.ids[part] for part in path(token, self._ranks))
            self._needed[number] = known
        return known

    def closed(self, numbers: Iterable[int]) -> frozenset[int]:
        """Returns these tokens with all that they need."""
        return frozenset(one for number in numbers for one in self.needed(number))
