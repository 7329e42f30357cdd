"""From a corpus to the cut of a vocabulary: counted, chosen, rewritten, and tried on the corpus."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan, check, cut
from surgeon.axes.renumber import vocabulary_axes
from surgeon.calibrate.data import texts
from surgeon.errors import Code, SurgeonError
from surgeon.vocabulary import rewrite
from surgeon.vocabulary.choose import choose
from surgeon.vocabulary.files import CORE, GENERATION, SmallerSource, Tokenizer, encode, read
from surgeon.vocabulary.tokens import refused

if TYPE_CHECKING:
    from surgeon.capture.source import Source

OPTION = "--trim-vocab"


@dataclass(frozen=True)
class Wanted:
    """Which tokens are to stay, beside those that any text needs.

    Attributes:
        corpus: texts, as calibration data are named.
        keep: the most tokens that may stay in all.
        coverage: the most frequent tokens stay that are this share of the corpus.
        always: strings whose tokens stay in any case.
        multiple: how many stay is a multiple of it.
    """

    corpus: tuple[str, ...]
    keep: int | None = None
    coverage: float | None = None
    always: tuple[str, ...] = ()
    multiple: int = 1


@dataclass(frozen=True)
class Corpus:
    """The texts of a corpus, whole and line by line, and how a tokenizer cuts them.

    Attributes:
        whole: the texts.
        lines: every line of them once, without the space around it, as prompts begin.
        ids: of the whole texts.
        line_ids: of the lines.
    """

    whole: tuple[str, ...]
    lines: tuple[str, ...]
    ids: Sequence[Sequence[int]]
    line_ids: Sequence[Sequence[int]]

    @classmethod
    def of(cls, sources: Sequence[str], tokenizer: Tokenizer) -> Corpus:
        """Returns a corpus.

        Raises:
            SurgeonError: why a source can't be read; `bad-text-input` where there is no text.
        """
        whole = tuple(text for source in sources for text in texts(source) if text.strip())
        if not whole:
            raise SurgeonError(
                Code.BAD_TEXT_INPUT,
                "the corpus is empty",
                at=f"{OPTION} {', '.join(sources)}".strip(),
                why="the tokens that stay are those that its texts need, and there is no text",
                try_="a text such as those that the model is to read and write",
            )
        stripped = (line.strip() for text in whole for line in text.splitlines())
        lines = tuple(dict.fromkeys(line for line in stripped if line))
        return cls(whole, lines, tokenizer.encode(whole), tokenizer.encode(lines))

    @cached_property
    def counts(self) -> Mapping[int, int]:
        """How often each token comes up; 0 for one that only a line by itself has."""
        found = Counter(one for row in self.ids for one in row)
        for row in self.line_ids:
            for one in row:
                found.setdefault(one, 0)
        return found

    @property
    def tokens(self) -> int:
        """Tokens of the whole texts."""
        return sum(map(len, self.ids))

    @property
    def characters(self) -> int:
        """Characters of the whole texts."""
        return sum(map(len, self.whole))


@dataclass(frozen=True)
class Trimming:
    """How a vocabulary is cut.

    Attributes:
        plan: the cut, and nothing else; empty where all of it stays.
        facts: what a report says of it beside the sizes.
        notes: what the user should know.
    """

    plan: Plan
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: tuple[str, ...] = ()


def trim(axes: Axes, source: Source | None, wanted: Wanted) -> Trimming:
    """Returns the cut of a model's vocabulary to what a corpus needs.

    The corpus is cut into the same tokens by the smaller tokenizer wherever all of its tokens stay;
    that is tried, on all of it.

    Args:
        axes: of the model.
        source: where its tokenizer is.
        wanted: which tokens are to stay.

    Raises:
        SurgeonError: `bad-option`, `pinned`, `missing-file` or `bad-text-input`, with the reason
            why it can't be trimmed.
    """
    if source is None:
        raise refused("it was captured from a module, which has no tokenizer", "the module")
    rows = rows_of(axes, source.id)
    check(axes, plan_of(axes, range(rows)))  # before the corpus is read
    tokenizer = read(source)
    tokens = tokenizer.tokens
    if max(tokens.by_id) >= rows:
        why = f"the embedding has {rows:,} rows, and its tokenizer has tokens beyond them"
        raise refused(why, source.id)
    corpus = Corpus.of(wanted.corpus, tokenizer)
    spoken, said = tokenizer.template()
    named = tokenizer.encode((*wanted.always, *spoken))
    always = {
        *tokens.base,
        *(one for row in named for one in row),
        *_meant(source, tokenizer, rows),
    }
    kept = choose(
        tokens,
        always,
        corpus.counts,
        rows,
        keep=wanted.keep,
        coverage=wanted.coverage,
        multiple=wanted.multiple,
        where=source.id,
    )
    if len(kept) == rows:
        return Trimming(Plan(), {}, ("the corpus needs every token: the vocabulary stays",))
    facts, notes = _tried(corpus, SmallerSource(source, kept, tokenizer), kept)
    return Trimming(plan_of(axes, kept), facts, (*notes, *([said] if said else ())))


def rows_of(axes: Axes, where: str) -> int:
    """Returns how many tokens a model knows.

    Raises:
        SurgeonError: `bad-option` where it has no vocabulary, or several of different sizes.
    """
    sizes = {axis.size for axis in vocabulary_axes(axes)}
    if len(sizes) != 1:
        why = "embedding and head differ in size" if sizes else "it has no embedding of token ids"
        raise refused(why, where)
    return sizes.pop()


def plan_of(axes: Axes, kept: Sequence[int]) -> Plan:
    """Returns the plan that keeps these tokens and renumbers them, in embedding and head."""
    cuts = tuple(cut(axis, list(kept)) for axis in vocabulary_axes(axes))
    return Plan(cuts, renumbered=tuple(c.axis for c in cuts))


def _meant(source: Source, tokenizer: Tokenizer, rows: int) -> set[int]:
    """Returns the tokens that have a meaning in a configuration or to the tokenizer."""
    found = rewrite.config_ids(source.config.to_dict(), rows) | {*tokenizer.loaded.all_special_ids}
    if source.generation_config is not None:
        found |= rewrite.config_ids(source.generation_config.to_dict(), rows)
    texts = tokenizer.texts
    found |= rewrite.special_ids(json.loads(texts[CORE]))
    if GENERATION in texts:
        found |= rewrite.config_ids(json.loads(texts[GENERATION]), rows)
    return found


def _tried(
    corpus: Corpus, smaller: SmallerSource, kept: Sequence[int]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns what the smaller tokenizer makes of the corpus, and what to say of it.

    Raises:
        SurgeonError: `verify-failed` where all tokens of a text stay and it is cut otherwise.
    """
    numbers = {old: new for new, old in enumerate(kept)}
    after = encode(smaller.loaded, corpus.whole)
    pairs = [
        *zip(corpus.whole, corpus.ids, after, strict=True),
        *zip(corpus.lines, corpus.line_ids, encode(smaller.loaded, corpus.lines), strict=True),
    ]
    same = True
    for text, old, new in pairs:
        whole = all(one in numbers for one in old)
        same &= whole
        if whole and [numbers[one] for one in old] != new:
            raise SurgeonError(
                Code.VERIFY_FAILED,
                "the smaller tokenizer cuts the corpus into other tokens",
                at=repr(text[:60]),
                why="all of its tokens stay, and yet others come out",
                try_="report this with the tokenizer and the corpus",
            )
    counts, total = corpus.counts, corpus.tokens
    stayed = sum(n for one, n in counts.items() if one in numbers)
    facts = {
        "corpus": {"tokens": total, "characters": corpus.characters, "distinct": len(counts)},
        "coverage": stayed / total,
        "exact": same,
        "tokens_per_character": {
            "before": total / corpus.characters,
            "after": sum(map(len, after)) / corpus.characters,
        },
    }
    notes = [
        "the softmax is over fewer tokens, so a perplexity per token can't be compared with "
        "that of a model with another vocabulary; bits per byte of the text can"
    ]
    if smaller.left_out:
        notes.append(
            f"{', '.join(smaller.left_out)} left out: they spell the vocabulary as it was, "
            "tokenizer.json what is left of it"
        )
    return facts, tuple(notes)
