"""Which tokens byte pair encoding passes through on its way to a token.

A word is merged pair by pair, the pair that was learnt first before the others. No merge crosses
the border of a token that the word ends in, so what is merged within that border, and in which
order, is what would be merged if the token's characters stood alone. If every token on that path
stays, the merges that are left lead to the same tokens: at each step the pair that was chosen is
still there, and still the first of those that are.

Reference: Sennrich, Haddow and Birch, Neural Machine Translation of Rare Words with Subword Units,
2016, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

Ranks = Mapping[tuple[str, str], int]
"""The place in the list of merges, by the pair that is merged."""


def ranks_of(merges: Iterable[object]) -> dict[tuple[str, str], int]:
    """Returns the places of merges, each written as `left right` or as a pair."""
    return {pair_of(merge): place for place, merge in enumerate(merges)}


def pair_of(merge: object) -> tuple[str, str]:
    """Returns the two sides of a merge, written as `left right` or as a pair.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(merge, str):
        left, right = merge.split(" ")
        return left, right
    if isinstance(merge, list | tuple):
        left, right = merge
        return str(left), str(right)
    raise ValueError(f"{merge!r} is no merge")


def path(token: str, ranks: Ranks) -> frozenset[str]:
    """Returns every token that merging passes through from characters to this one, itself too.

    A token that merges don't lead to (one that is looked up whole) has no other on its path.
    """
    parts = list(token)
    seen = set(parts)
    while len(parts) > 1:
        rank, at = min((ranks.get((parts[i], parts[i + 1]), len(ranks)), i) for i in _gaps(parts))
        if rank == len(ranks):
            return frozenset((token,))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        seen.add(parts[at])
    return frozenset(seen)


def _gaps(parts: list[str]) -> range:
    return range(len(parts) - 1)
