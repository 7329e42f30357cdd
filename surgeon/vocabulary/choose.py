"""Which tokens stay: the ones that any text needs, and those that a corpus uses most."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil

from surgeon.vocabulary.tokens import Tokens, refused


def choose(
    tokens: Tokens,
    always: Iterable[int],
    counts: Mapping[int, int],
    rows: int,
    *,
    keep: int | None = None,
    coverage: float | None = None,
    multiple: int = 1,
    where: str = "",
) -> tuple[int, ...]:
    """Returns the numbers of the tokens that stay, ascending, with all that they need.

    Args:
        tokens: of the tokenizer.
        always: what stays in any case.
        counts: how often a corpus uses each token; those that it uses and that aren't counted in
            have 0.
        rows: of the embedding, at least one for each token.
        keep: the most that may stay in all, rounded up to the multiple; without it and `coverage`,
            all that the corpus uses.
        coverage: the most frequent tokens stay that are this share of the corpus.
        multiple: how many stay is a multiple of it, unless all do. Rows that no token has make it
            up, and then tokens that the corpus has no use for.
        where: the model, for refusals.

    Raises:
        SurgeonError: `bad-option` where `keep` is less than what stays in any case.
    """
    kept = set(tokens.closed(always))
    limit = rows if keep is None else min(rows, ceil(keep / multiple) * multiple)
    if len(kept) > limit:
        raise refused(
            f"{keep:,} tokens are to stay, and {len(kept):,} have to: special tokens, bytes or "
            "single characters, and what is asked for by name",
            where,
            f"keep {len(kept):,} or more",
        )
    for number in _wanted(counts, coverage):
        missing = tokens.needed(number) - kept
        if len(kept) + len(missing) <= limit:
            kept |= missing
    return _filled(tokens, kept, rows, multiple)


def _wanted(counts: Mapping[int, int], coverage: float | None) -> list[int]:
    """Returns the tokens of a corpus, the most frequent first, as far as is asked for."""
    ranked = sorted(counts, key=lambda number: (-counts[number], number))
    if coverage is None:
        return ranked
    wanted, seen = coverage * sum(counts.values()), 0
    out: list[int] = []
    for number in ranked:
        if seen >= wanted:
            break
        seen += counts[number]
        out.append(number)
    return out


def _filled(tokens: Tokens, kept: set[int], rows: int, multiple: int) -> tuple[int, ...]:
    """Returns the tokens with as many more as the multiple takes, or all rows."""
    wanted = ceil(len(kept) / multiple) * multiple
    if wanted >= rows:
        return tuple(range(rows))
    # Rows above all tokens: among them, an empty one would move the tokens after it.
    last = max(tokens.by_id)
    spare = [row for row in range(last + 1, rows) if row not in kept]
    kept |= set(spare[: wanted - len(kept)])
    for number in sorted(tokens.by_id):
        if len(kept) == wanted:
            break
        missing = tokens.needed(number) - kept
        if len(kept) + len(missing) <= wanted:
            kept |= missing
    return tuple(sorted(kept))
