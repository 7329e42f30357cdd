"""One colour scale for shares, light for none and dark red for all."""

from __future__ import annotations

from itertools import pairwise

_STOPS = (
    (0.0, (245, 246, 248)),
    (0.25, (252, 211, 164)),
    (0.6, (240, 122, 92)),
    (1.0, (150, 24, 48)),
)


def shade(share: float) -> str:
    """Returns the colour of a removed share from 0 to 1, as `#rrggbb`."""
    share = min(1.0, max(0.0, share))
    for (low, first), (high, second) in pairwise(_STOPS):
        if share <= high:
            t = (share - low) / (high - low)
            mixed = (round(a + t * (b - a)) for a, b in zip(first, second, strict=True))
            return "#" + "".join(f"{part:02x}" for part in mixed)
    raise AssertionError(share)


def ink(share: float) -> str:
    """Returns black or white, whichever reads better on `shade(share)`."""
    return "#ffffff" if share > 0.7 else "#1a1a1a"
