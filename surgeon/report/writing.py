"""Repetition and garbage in what a model wrote, as shares from 0 to 1.

None of these says whether a text is good. They tell how far a damaged model's text is from its
own original's, on the same prompts and with the same greedy choice.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import astuple, dataclass
from statistics import fmean

import numpy as np

REPEATS = 3
"""How often a unit has to stand in a row to be a loop: twice happens in good texts too.

Reference: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration, count texts that end
in a repeated phrase. A share tells more of a few prompts than a count, and a loop may be left.
"""

_WORD = re.compile(r"[^\W\d_]+")
_PIECE = re.compile(r"\w+|[^\w\s]")
_LAYOUT = frozenset("\t\n\r")


@dataclass(frozen=True)
class Writing:
    """Measures of one text; None where it is too short to have any.

    Attributes:
        distinct_1: different words and signs of all.
        distinct_2: different pairs of neighbouring ones of all.
        repetition: 1 less the different runs of four tokens of all.
        loop: tokens in the longest loop of all.
        broken: characters that no text has of all.
        unknown: words that are in no known text of all.
    """

    distinct_1: float | None
    distinct_2: float | None
    repetition: float | None
    loop: float | None
    broken: float | None
    unknown: float | None


def measure(text: str, tokens: Sequence[int], known: Collection[str]) -> Writing:
    """Returns the measures of a text.

    Args:
        text: what was written.
        tokens: the same as the model's token ids.
        known: words as `words` gives them.

    Reference:
        distinct: Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation
        Models. Repetition: Welleck et al. 2020, Neural Text Generation with Unlikelihood Training
        (seq-rep-4).
    """
    pieces = _PIECE.findall(text.lower())
    four = distinct(tokens, 4)
    own = list(_words(text))
    return Writing(
        distinct(pieces, 1),
        distinct(pieces, 2),
        None if four is None else 1 - four,
        loop(tokens),
        broken(text),
        sum(word not in known for word in own) / len(own) if own else None,
    )


def mean(found: Iterable[Writing]) -> Writing:
    """Returns the means over several texts, each over those that have the measure."""
    columns = zip(*(astuple(writing) for writing in found), strict=True)
    known = ([value for value in column if value is not None] for column in columns)
    return Writing(*(fmean(values) if values else None for values in known))


def distinct(items: Sequence[object], n: int) -> float | None:
    """Returns the share of different runs of `n` items in all runs, None where there is no run."""
    runs = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    return len(set(runs)) / len(runs) if runs else None


def loop(tokens: Sequence[int]) -> float | None:
    """Returns the share of the tokens in the longest stretch that is one unit over and over.

    A unit is one token or more; it stands at least `REPEATS` times in a row, its last copy whole
    or cut off.
    """
    if not tokens:
        return None
    row, longest = np.asarray(tokens), 0
    for period in range(1, len(row) // REPEATS + 1):
        # Where a stretch has this period, every token equals the one a period before it.
        same = np.concatenate([[False], row[period:] == row[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        runs = edges[1::2] - edges[::2]
        stretch = period + int(runs.max(initial=0))
        if stretch >= REPEATS * period:
            longest = max(longest, stretch)
    return longest / len(row)


def broken(text: str) -> float | None:
    """Returns the share of characters that stand for bytes that are no text.

    Those are U+FFFD, which decoders put for bytes that are not UTF-8; control characters except
    tabs and line breaks; surrogates, private and unassigned ones (general categories Cc, Cs, Co
    and Cn of Unicode).
    """
    wrong = sum(
        c == "\ufffd" or (c not in _LAYOUT and unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn"))
        for c in text
    )
    return wrong / len(text) if text else None


def words(texts: Iterable[str]) -> frozenset[str]:
    """Returns the words of some texts, in lower case: runs of letters."""
    return frozenset(word for text in texts for word in _words(text))


def _words(text: str) -> Iterable[str]:
    return _WORD.findall(text.lower())
