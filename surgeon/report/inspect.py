"""The axes of a model as a tree folded over identical layers, and as data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.branches import Branch
from surgeon.axes.costs import Costs
from surgeon.axes.names import nearest
from surgeon.axes.words import amount, cost_text, freedom, places
from surgeon.errors import Code, SurgeonError
from surgeon.ops.rule import Gauge
from surgeon.report.fold import folded, spans, split

if TYPE_CHECKING:
    from rich.tree import Tree

_FEW = 10


@dataclass(frozen=True)
class View:
    """What is shown of a model: some of its axes and branches, and what they cost."""

    name: str
    axes: Axes
    costs: Costs
    shown: tuple[Axis, ...]
    branches: tuple[Branch, ...]
    params: tuple[str, ...] = ()
    """Parameters that were asked for, to be shown with their expressions."""


def view(
    name: str,
    axes: Axes,
    costs: Costs,
    *,
    layer: int | None = None,
    role: str | None = None,
    param: str | None = None,
) -> View:
    """Returns a view of the axes of one layer, of one role, or through some parameters.

    Args:
        name: what the model is called.
        axes: the axes of the program.
        costs: what they cost.
        layer: the number of a layer.
        role: a role; `layers` shows branches only.
        param: a glob over parameters, or the end of a parameter's name.

    Raises:
        SurgeonError: `no-such-role` or `no-such-axis`, with what there is.
    """
    shown, branches = axes.axes, axes.branches
    if layer is not None:
        every = [split(n) for n in (*(a.name for a in shown), *(b.name for b in branches))]
        there = sorted({found[1] for found in every if found})
        if layer not in there:
            raise SurgeonError(
                Code.NO_SUCH_AXIS,
                f"there is no layer {layer}",
                at="--layer",
                why=f"{name} has no axis or branch in a layer of that number",
                try_=f"one of {spans(there)}" if there else "leave it out: there are no layers",
                data={"layers": there},
            )
        shown = tuple(a for a in shown if (s := split(a.name)) and s[1] == layer)
        branches = tuple(b for b in branches if (s := split(b.name)) and s[1] == layer)
    if role is not None:
        if role != "layers" and not axes.of_role(role):
            raise SurgeonError(
                Code.NO_SUCH_ROLE,
                f"there is no axis with the role {role!r}",
                at="--role",
                why=f"{name} has none",
                try_="one of " + ", ".join(axes.roles),
            )
        wanted = () if role == "layers" else axes.of_role(role)
        shown = tuple(a for a in shown if a in wanted)
        branches = branches if role == "layers" else ()
    params: tuple[str, ...] = ()
    if param is not None:
        own = axes.program.param_of
        found = (own[n] for n in own if any(fnmatchcase(n, p + param) for p in ("", "*.")))
        params = tuple(dict.fromkeys(found))
        if not params:
            raise SurgeonError(
                Code.NO_SUCH_AXIS,
                f"there is no parameter {param!r}",
                at="--param",
                why="no parameter has this name or end, or matches it as a glob",
                try_=nearest(param, own),
            )
        shown = tuple(a for a in shown if any(m.param in params for m in a.members))
        branches = ()
    if not shown and not branches:
        raise SurgeonError(
            Code.NO_SUCH_AXIS,
            "no axis is all of what was asked for",
            at="--layer, --role, --param",
            why="each of them leaves some axes, together they leave none",
            try_="leave one of them out",
        )
    return View(name, axes, costs, shown, branches, params)


# --- data ----------------------------------------------------------------------------------------


def to_json(found: View) -> dict[str, Any]:
    """Returns the view as plain data: what `Axes.to_json` has, with costs and freedom."""
    axes, costs = found.axes, found.costs
    data = axes.to_json()
    own = {axis.name for axis in found.shown}
    kept = [entry for entry in data["axes"] if entry["name"] in own]
    for entry in kept:
        axis = axes.by_name[entry["name"]]
        entry["channel"] = costs.channel(axis).to_json()
        entry["select"] = {
            "any": axis.prunable,
            "own_choice_inside": list(axis.outer) if axis.prunable else [],
            "places": places(axes, axis),
            "pairs": places(axes, axis) == 2 and axis.gauge is Gauge.PAIRWISE,
            "text": freedom(axes, axis),
        }
    params = {*found.params, *(m.param for axis in found.shown for m in axis.members)}
    names = {b.name for b in found.branches}
    whole = len(kept) == len(axes.axes)
    return {
        "totals": {**costs.whole.to_json(), "per": costs.per},
        "layers": {name: cost.to_json() for name, cost in costs.layers().items()},
        "axes": kept,
        "branches": [b for b in data["branches"] if b["name"] in names],
        "params": {
            name: entry for name, entry in data["params"].items() if whole or name in params
        },
        "guards": list(axes.program.guards),
    }


# --- tree ----------------------------------------------------------------------------------------


def tree(found: View) -> Tree:
    """Returns the view as a tree; layers that differ by their number only are one branch of it."""
    from rich.text import Text
    from rich.tree import Tree

    costs = found.costs
    root = Tree(Text.assemble((found.name, "bold"), f": {cost_text(costs.whole, costs.per)}"))
    layers: dict[tuple[str, int], list[Axis | Branch]] = {}
    for item in (*found.shown, *found.branches):
        parts = split(item.name)
        if parts is None:
            _add(root, found, item, "")
        else:
            layers.setdefault(parts[:2], []).append(item)
    alike: dict[tuple[str, Hashable], list[int]] = {}
    for (prefix, number), items in layers.items():
        key = tuple(_signature(found, item, f"{prefix}{number}") for item in items)
        alike.setdefault((prefix, key), []).append(number)
    each = costs.layers()
    for (prefix, _), numbers in alike.items():
        path = f"{prefix}{numbers[0]}"
        label = prefix.rstrip(".").rpartition(".")[2] or "module"
        label += f" {spans(numbers)}" + (", each" if len(numbers) > 1 else "")
        head = Text.assemble((label, "bold"))
        if path in each:
            head.append(": " + cost_text(each[path], costs.per))
        branch = root.add(head)
        for item in layers[prefix, numbers[0]]:
            _add(branch, found, item, path)
    for name in found.params:
        dims = ", ".join(found.axes.text(e) for e in found.axes.param_dims(name))
        root.add(Text(f"{name} [{dims}]"))
    return root


def _short(name: str, path: str) -> str:
    """Returns a name without the path of the layer it is shown under."""
    return name[len(path) + 1 :] if path and name.startswith((path + ".", path + "/")) else name


def _signature(found: View, item: Axis | Branch, path: str) -> Hashable:
    """Returns all that is shown of an axis or a branch."""
    return tuple(line for line, _ in _lines(found, item, path))


def _add(to: Tree, found: View, item: Axis | Branch, path: str) -> None:
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    (head, style), *rest = _lines(found, item, path)
    details = (Padding(Text(line, style), (0, 0, 0, 2), expand=False) for line, style in rest)
    to.add(Group(Text(head, style), *details))


def _lines(found: View, item: Axis | Branch, path: str) -> list[tuple[str, str]]:
    if isinstance(item, Branch):
        owned = _some([_short(name, path) for name in item.params])
        head = f"{_short(item.name, path)}: a branch that can be dropped"
        return [(head, "bold"), (f"owns {owned}", "")]
    axis, costs = item, found.costs
    state = "pinned" if axis.pins else "prunable" if axis.exact else "prunable, not exactly"
    head = f"{_short(axis.name, path)}: {amount(axis.size)} channels, {axis.role}, {state}"
    lines = [(head, "bold red" if axis.pins else "bold")]
    for why in dict.fromkeys(r.why for r in axis.pins):
        lines.append((f"pinned: {_located(why, axis, path)}", "red"))
    for why in dict.fromkeys(r.why for r in axis.inexact):
        lines.append((f"removing differs from masking: {why}", "yellow"))
    cost = cost_text(costs.channel(axis), costs.per)
    lines.append((f"one channel: {cost}", ""))
    members = folded([_short(str(m), path) for m in axis.members])
    count = len({m.param for m in axis.members})
    lines.append((f"{_count(count, 'parameter')}: {_some(members)}", ""))
    if not axis.pins:
        inside = freedom(found.axes, axis)
        for name in axis.outer:
            inside = inside.replace(name, _short(name, path))
        lines.append((f"may select: {inside}", ""))
    lines.append((f"change of basis: {axis.gauge.text}", ""))
    return lines


def _located(why: str, axis: Axis, path: str) -> str:
    """Returns a reason with the module that it lies in, where that is one."""
    places = {r.where.partition(",")[0] for r in axis.pins if r.why == why and r.where}
    return f"{why}, in {_short(places.pop(), path)}" if len(places) == 1 else why


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW + 1 else ""
    return ", ".join(names[:_FEW] if more else names) + more
