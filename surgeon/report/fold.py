"""Names that differ by one number only, folded into one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=[./:]|$)")


def split(name: str) -> tuple[str, int, str] | None:
    """Returns what stands before the first number of a dotted name, the number, and the rest."""
    found = _NUMBER.search(name)
    return (name[: found.start()], int(found[0]), name[found.end() :]) if found else None


def spans(numbers: Iterable[int]) -> str:
    """Returns numbers in words: `0–29`, `0–28 step 2`, `0, 3, 5–7`."""
    ordered = sorted(set(numbers))
    steps = {b - a for a, b in pairwise(ordered)}
    if len(ordered) > 2 and len(steps) == 1 and steps != {1}:
        return f"{ordered[0]}–{ordered[-1]} step {steps.pop()}"
    out: list[list[int]] = []
    for number in ordered:
        if out and number == out[-1][-1] + 1:
            out[-1].append(number)
        else:
            out.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in out)


def folded(names: Sequence[str]) -> list[str]:
    """Returns the names with those that differ by their first number only made one."""
    groups: dict[tuple[str, str] | str, list[int]] = {}
    for name in names:
        found = split(name)
        if found is None:
            groups.setdefault(name, [])
        else:
            groups.setdefault((found[0], found[2]), []).append(found[1])
    return [
        key if isinstance(key, str) else f"{key[0]}{spans(numbers)}{key[1]}"
        for key, numbers in groups.items()
    ]
