"""Losses over the steps of trainings, as an SVG that follows the page's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDE, TALL, LEFT, BELOW, TOP = 560, 200, 56, 34, 12
COLOURS = ("#3b6fb6", "#c4622d", "#3c8d5a", "#8a5aa8", "#9a8420")


def curves_of(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[int, float]]]]:
    """Returns by training what a report knows of its losses, in the order of the run.

    Args:
        report: the content of `surgeon.json`.
    """
    found: list[tuple[str, list[tuple[int, float]]]] = []
    for step in report["recipe"]:
        points = step.get("effect", {}).get("curve")
        if points:
            label = f"training {len(found) + 1}"
            found.append((label, [(int(x), float(y)) for x, y in points]))
    return found


def curve(trainings: Sequence[tuple[str, Sequence[tuple[int, float]]]]) -> str:
    """Returns the picture of some trainings' losses, each a line.

    Args:
        trainings: a name each, and its points: step and loss.
    """
    last = max(x for _, points in trainings for x, _ in points)
    losses = [y for _, points in trainings for _, y in points]
    low, high = min(losses), max(losses)
    spread = (high - low) or 1.0
    legend = 18 * (len(trainings) > 1)
    height = TOP + TALL + BELOW + legend

    def place(x: int, y: float) -> str:
        across = LEFT + (WIDE - LEFT - 12) * x / last
        return f"{across:.1f},{TOP + TALL * (high - y) / spread:.1f}"

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="curve" role="img" width="{WIDE}" '
        f'height="{height}" viewBox="0 0 {WIDE} {height}" font-size="11" fill="none" '
        'font-family="ui-monospace, Menlo, Consolas, monospace">',
        "<title>loss by step</title>",
    ]
    for part in range(5):
        y = high - spread * part / 4
        level = TOP + TALL * part / 4
        lines.append(
            f'<path d="M{LEFT} {level:.1f}H{WIDE - 12}" stroke="currentColor" opacity="0.15"/>'
            f'<text x="{LEFT - 6}" y="{level + 4:.1f}" text-anchor="end" fill="currentColor">'
            f"{y:.3g}</text>"
        )
    for part in range(5):
        x = round(last * part / 4)
        across = LEFT + (WIDE - LEFT - 12) * x / last
        lines.append(
            f'<text x="{across:.1f}" y="{TOP + TALL + 18}" text-anchor="middle" '
            f'fill="currentColor">{x:,}</text>'
        )
    for number, (name, points) in enumerate(trainings):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(place(x, y) for x, y in points)
        lines.append(
            f'<polyline points="{path}" stroke="{colour}" stroke-width="1.5">'
            f"<title>{escape(name)}</title></polyline>"
        )
        if legend:
            lines.append(
                f'<text x="{LEFT + 100 * number}" y="{height - 6}" fill="{colour}">'
                f"{escape(name)}</text>"
            )
    return "\n".join([*lines, "</svg>"])
