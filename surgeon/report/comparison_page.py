"""An evaluation as one page that asks for nothing else."""

from __future__ import annotations

from html import escape

from surgeon.report.comparison import Evaluation
from surgeon.report.comparison_table import columns, sections, side_by_side, title, unknown, visible
from surgeon.report.html import bullets, page, section, table


def comparison_page(found: Evaluation) -> str:
    """Returns the page of an evaluation."""
    names = columns(found)
    parts = [
        section(
            part.title.capitalize(),
            f'<div class="wide">{table(("", *names), part.rows)}</div>',
            f'<p class="note">{escape(part.note)}</p>' if part.note else "",
        )
        for part in sections(found)
    ]
    written = [
        f"<h3>{escape(prompt)}</h3>"
        + table(names, [[visible(own.text) for own in texts]], "written")
        for prompt, texts in side_by_side(found)
    ]
    if written:
        parts.append(section("Side by side", *written))
    reasons = unknown(found)
    if reasons:
        parts.append(section("Unknown", bullets(reasons)))
    parts.append(section("Measured with", table(("", "version"), found.versions.items())))
    several = len(found.models) > 1
    below = f"compared with {names[found.against]}" if several else found.models[0].device
    return page(title(found), title(found), below, parts)
