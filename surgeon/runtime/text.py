"""Tokens to text, piece by piece as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CONTEXT = 8
"""Tokens of the prompt that the first new one is decoded with: some tokenizers drop a space at
the start of what they decode."""

_BROKEN = "\ufffd"


class TextStream:
    """The text of new tokens, given out as soon as it can't change any more.

    A character may be spread over several tokens, so what ends in a broken one is held back.

    Args:
        tokenizer: the model's own.
        prompt: the tokens before; their text is not given out.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT:])
        self._start, self._read = 0, len(self._tokens)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """All that was given out so far."""
        return "".join(self._pieces)

    def push(self, token: int) -> str:
        """Returns the text that a further token completes, often none."""
        self._tokens.append(token)
        return self._take(hold=True)

    def close(self) -> str:
        """Returns what is still held back: the end of the text, a broken character or not."""
        return self._take(hold=False)

    def _take(self, *, hold: bool) -> str:
        before = self._decode(self._tokens[self._start : self._read])
        after = self._decode(self._tokens[self._start :])
        if (hold and after.endswith(_BROKEN)) or len(after) <= len(before):
            return ""
        # What was given out is decoded again once, as context, and then forgotten.
        self._start, self._read = self._read, len(self._tokens)
        piece = after[len(before) :]
        self._pieces.append(piece)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
