"""The pieces that pages of a report are made of: one file each, and no request leaves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from surgeon.report.graph_page import filled


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """Returns a table of text cells; all but the first column are figures.

    Args:
        head: titles of the columns.
        rows: as many cells each.
        kind: `written` for columns of text.
    """
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    start = f'<table class="{kind}">' if kind else "<table>"
    return f"{start}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def section(title: str, *parts: str) -> str:
    """Returns pieces under a heading."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def bullets(items: Iterable[str]) -> str:
    """Returns a list of texts."""
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"


def page(title: str, heading: str, below: str, sections: Iterable[str]) -> str:
    """Returns a whole page.

    Args:
        title: of the window.
        heading: what stands on top.
        below: a line under that.
        sections: the rest, as HTML.
    """
    template = files("surgeon.report").joinpath("web", "report.html").read_text(encoding="utf-8")
    texts = {"title": title, "heading": heading, "below": below}
    parts = {name: escape(text) for name, text in texts.items()}
    return filled(template, {**parts, "sections": "\n".join(sections)})
