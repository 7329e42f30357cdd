"""Axes and explanations as text, and as HTML for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from surgeon.axes.costs import Cost
from surgeon.axes.space import leaves
from surgeon.ops.rule import Gauge

if TYPE_CHECKING:
    from surgeon.axes.axes import Axes, Axis
    from surgeon.axes.explanation import About, Chain, Explanation, Link, Lost, Pin

_FEW = 12
"""So many tensors are listed one by one; more are counted."""
_REASONS = 4


def freedom(axes: Axes, axis: Axis) -> str:
    """Returns in words what a selection along an axis may look like."""
    if axis.pins:
        return "nothing"
    if axis.size == 1:
        return "nothing: it has one index"
    if axis.size <= axis.least:
        return f"nothing: {axis.least} of it are chosen at once"
    count = places(axes, axis)
    what = f"any of its {axis.size}"
    if count == 2 and axis.gauge is Gauge.PAIRWISE:
        what += " pairs"
    elif count > 1:
        what += f", each in {count} places of a dimension"
    if axis.least > 1:
        what += f", of which {axis.least} stay"
    if not axis.outer:
        return what
    inside = " and ".join(axis.outer)
    return f"{what}, others for each index of {inside}, the same number for each"


def places(axes: Axes, axis: Axis) -> int:
    """Returns in how many places of one dimension an index stands, at most.

    Two are both halves of a rotary pair, or a fused weight's two parts.
    """
    number = axes.number[axis.name]
    return max(
        (list(leaves(axes.param_dims(m.param)[m.dim])).count(number) for m in axis.members),
        default=1,
    )


def amount(number: float) -> str:
    """Returns a count with thousands separated."""
    return f"{number:,.0f}"


def cost_text(cost: Cost, per: str = "token") -> str:
    """Returns what something takes on one line."""
    parts = [f"{amount(cost.parameters)} parameters"]
    if cost.bytes:
        parts[0] += f" ({size_text(cost.bytes)})"
    parts.append(f"{amount(cost.flops)} FLOPs per {per}")
    if cost.flops_context:
        parts[-1] += f" (and {amount(cost.flops_context)} for each token attended to)"
    if cost.cache_bytes:
        parts.append(f"{amount(cost.cache_bytes)} B of cache per token")
    return ", ".join(parts)


def size_text(number: float) -> str:
    """Returns a number of bytes in the largest unit that it fills."""
    for name, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(number) >= size:
            return f"{number / size:,.1f} {name}"
    return f"{number:,.0f} B"


# --- explanations as text ----------------------------------------------------------------------


def explanation_text(found: Explanation) -> str:
    """Returns an explanation for a terminal."""
    lines: list[str] = []
    if found.b is None:
        for about in found.about:
            lines += [*_about(about), ""]
    elif found.chains:
        axes = "1 axis" if len(found.chains) == 1 else f"{len(found.chains)} axes"
        lines += [f"{found.a} and {found.b} are coupled: both carry {axes}", ""]
        for chain in found.chains:
            lines += [*_chain(chain), ""]
    else:
        lines += [f"{found.a} and {found.b} are not coupled", ""]
    lines += found.notes
    return "\n".join(lines).rstrip()


def _steps(links: Sequence[Link]) -> Iterable[str]:
    names = max((len(link.short) for link in links), default=0)
    for place, link in enumerate(links, 1):
        yield f"  {place:>2} {link.short:<{names}}  {link.source or link.where} → {link.right}"
        if link.says:
            yield f"     {'':<{names}}  {link.says}"


def _chain(chain: Chain) -> Iterable[str]:
    yield f"{chain.axis}, {amount(chain.size)} channels"
    if not chain.links:
        yield f"  {chain.start}: the same dimension"
        return
    ops = "operation" if len(chain.links) == 1 else "operations"
    yield f"  from {chain.start}, {len(chain.links)} {ops}:"
    yield from _steps(chain.links)
    for link in chain.meeting:
        says = link.says[:1].lower() + link.says[1:]
        yield f"  tied by {link.short} at {link.where}: {says}"


def _about(about: About) -> Iterable[str]:
    axis = about.axis
    yield f"{axis.name}: {amount(axis.size)} channels, role {axis.role}"
    if about.pins:
        yield "  it can't be pruned:"
        for pin in about.pins[:_REASONS]:
            yield from _pin(pin)
        if len(about.pins) > _REASONS:
            yield f"  and {len(about.pins) - _REASONS} more reasons"
    else:
        yield f"  it can be pruned: {about.select}"
    for why in dict.fromkeys(reason.why for reason in axis.inexact):
        yield f"  removing differs from masking: {why}"
    removal = about.removal
    count = len(removal.lost)
    verb = "would take" if about.pins else "takes"
    yield f"  channel {removal.index} {verb} with it:"
    for lost in removal.lost if count <= _FEW else removal.lost[: _FEW - 2]:
        yield "    " + _lost(lost)
    if count > _FEW:
        yield f"    and {count - _FEW + 2} more (all of them with --json)"
    yield f"  which is {cost_text(removal.cost, removal.per)}"


def _lost(lost: Lost) -> str:
    places = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in lost.ranges[:8])
    if len(lost.ranges) > 8:
        places += f", … {lost.ranges[-1][1]} ({len(lost.ranges)} ranges)"
    one, many = ("entry", "entries") if lost.rank == 1 else ("slice", "slices")
    if lost.rank == 2:
        one, many = (("row", "rows"), ("column", "columns"))[lost.dim]
    along = f" along dimension {lost.dim}" if lost.rank > 2 else ""
    return f"{lost.param}: {many if lost.count > 1 else one} {places} of {amount(lost.size)}{along}"


def _pin(pin: Pin) -> Iterable[str]:
    yield f"  - {pin.why}" + (f", at {pin.where}" if pin.where else "")
    if pin.links:
        yield f"    reached from {pin.start}:"
        yield from ("  " + line for line in _steps(pin.links))
    else:
        yield f"    it is itself {pin.start}"


# --- HTML --------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"


def axes_html(axes: Axes) -> str:
    """Returns the axes of a model as a table."""
    rows = [
        (
            axis.name,
            axis.role,
            amount(axis.size),
            str(len({m.param for m in axis.members})),
            axis.gauge.text,
            freedom(axes, axis),
            "; ".join(dict.fromkeys(r.why for r in axis.pins)),
        )
        for axis in axes.axes
    ]
    head = ("axis", "role", "size", "parameters", "change of basis", "may select", "pinned")
    return _table(head, rows)


def axis_html(axis: Axis) -> str:
    """Returns one axis as a table of what is known of it."""
    rows = [
        ("role", axis.role),
        ("size", amount(axis.size)),
        ("carried by", ", ".join(map(str, axis.members))),
        ("inside", ", ".join(axis.outer)),
        ("change of basis", axis.gauge.text),
        ("pinned", "; ".join(dict.fromkeys(r.why for r in axis.pins))),
        ("not exact", "; ".join(dict.fromkeys(r.why for r in axis.inexact))),
    ]
    return _table((axis.name, ""), [row for row in rows if row[1]])


def _links_html(links: Sequence[Link]) -> str:
    head = ("operation", "source", "makes one axis of", "and", "because")
    rows = [(x.short, x.source or x.where, x.left, x.right, x.says) for x in links]
    return _table(head, rows)


def explanation_html(found: Explanation) -> str:
    """Returns an explanation as headings and tables."""
    out: list[str] = []
    if found.b is not None:
        verb = "are coupled" if found.chains else "are not coupled"
        out.append(f"<p><b>{escape(found.a)}</b> and <b>{escape(found.b)}</b> {verb}</p>")
    for chain in found.chains:
        out.append(f"<p>{escape(chain.axis)}, {amount(chain.size)} channels</p>")
        out.append(_links_html(chain.links))
    for about in found.about:
        out.append(axis_html(about.axis))
        for pin in about.pins:
            out.append(f"<p>pinned: {escape(pin.why)} {escape(pin.where)}</p>")
            if pin.links:
                out.append(_links_html(pin.links))
        rows = [
            (lost.param, str(lost.dim), ", ".join(f"{a}–{b}" for a, b in lost.ranges))
            for lost in about.removal.lost
        ]
        out.append(_table(("with channel " + str(about.removal.index), "dim", "go"), rows))
        saved = cost_text(about.removal.cost, about.removal.per)
        out.append(f"<p>which is {escape(saved)}</p>")
    out += [f"<p>{escape(note)}</p>" for note in found.notes]
    return "".join(out)
