"""What a user may write for an axis or for a dimension of a parameter."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from surgeon.axes.axes import Axis, Member
from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    from surgeon.axes.axes import Axes

_DIM = re.compile(r"(?P<name>.+):(?P<dim>-?\d+)")
_SHOWN = 8


def _parts(name: str) -> list[str]:
    return re.split(r"[./]", name)


def _within(query: list[str], name: list[str]) -> bool:
    """Whether the components of `query` appear in `name` in this order."""
    rest = iter(name)
    return all(part in rest for part in query)


def matching(query: str, names: Iterable[str]) -> list[str]:
    """Returns the names that `query` stands for, by the strictest reading that finds any.

    In this order: the name itself; its end, from a dot or slash on; some of its components in
    order, the last one among them (`layers.3/ffn` is `model.layers.3.mlp/ffn`); a glob of the
    name or of its end; some of its components in order.
    """
    names = list(names)
    if query in names:
        return [query]
    parts = _parts(query)
    glob = any(c in query for c in "*?[")
    readings = (
        lambda n: n.endswith(("." + query, "/" + query)),
        lambda n: _parts(n)[-1] == parts[-1] and _within(parts, _parts(n)),
        lambda n: glob and any(fnmatchcase(n, p + query) for p in ("", "*.", "*/")),
        lambda n: _within(parts, _parts(n)),
    )
    for reading in readings:
        found = [name for name in names if reading(name)]
        if found:
            return found
    return []


def nearest(query: str, names: Iterable[str]) -> str:
    """Returns a hint with the names nearest to `query`, by their whole or by their ends."""
    names = list(names)
    count = len(_parts(query))
    # The first of the names with the same end stands for all of them.
    tails = {".".join(_parts(n)[-k:]): n for k in (1, count) for n in reversed(names)}
    known = {**tails, **{n: n for n in names}}
    found = difflib.get_close_matches(query, known, n=9, cutoff=0.6)
    close = list(dict.fromkeys(known[end] for end in found))[:3]
    if close:
        return "did you mean " + ", ".join(close) + "?"
    return "`surgeon inspect` lists the axes, and `surgeon inspect --json` the parameters"


def _several(query: str, found: list[str]) -> SurgeonError:
    shown = ", ".join(found[:_SHOWN])
    rest = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return SurgeonError(
        Code.NO_SUCH_AXIS,
        f"{query!r} could be any of {len(found)}",
        at=query,
        why="this asks for one, and it names " + shown + rest,
        try_="a longer name, such as " + found[0],
        data={"matches": found},
    )


def _none(query: str, what: str, names: Iterable[str]) -> SurgeonError:
    return SurgeonError(
        Code.NO_SUCH_AXIS,
        f"there is no {what} {query!r}",
        at=query,
        why=f"no {what} of this model has that name, that end, or matches it",
        try_=nearest(query, names),
    )


def find_axis(axes: Axes, query: str) -> Axis:
    """Returns the one axis that a name, a unique end or part of one, or a glob stands for.

    Raises:
        SurgeonError: `no-such-axis`, with the nearest names, or all that it could be.
    """
    found = matching(query, axes.by_name)
    if not found:
        raise _none(query, "axis", axes.by_name)
    if len(found) > 1:
        raise _several(query, found)
    return axes.by_name[found[0]]


def find(axes: Axes, query: str) -> Axis | Member:
    """Returns the axis, or the dimension of a parameter (`name:0`), that `query` stands for.

    A parameter of one dimension needs no number. Tied parameters answer to every name they have.

    Raises:
        SurgeonError: `no-such-axis`, with the nearest names, or all that it could be.
    """
    split = _DIM.fullmatch(query)
    own = axes.program.param_of
    if split is None:
        found = matching(query, axes.by_name)
        if len(found) == 1:
            return axes.by_name[found[0]]
        if found:
            raise _several(query, found)
    name = split["name"] if split else query
    params = list(dict.fromkeys(own[n] for n in matching(name, own)))
    if not params:
        if split:
            raise _none(name, "parameter", own)
        raise _none(query, "axis or parameter", (*axes.by_name, *own))
    ranks = {n: len(axes.param_dims(n)) for n in params}
    if len(params) > 1:
        dims = range(max(ranks.values())) if split is None else (int(split["dim"]),)
        raise _several(query, [f"{n}:{d}" for n in params for d in dims if d < ranks[n]] or params)
    rank = ranks[params[0]]
    if split is None:
        if rank != 1:
            raise _several(query, [f"{params[0]}:{d}" for d in range(rank)])
        return Member(params[0], 0)
    dim = int(split["dim"])
    if not -rank <= dim < rank:
        raise SurgeonError(
            Code.NO_SUCH_AXIS,
            f"{params[0]} has no dimension {dim}",
            at=query,
            why=f"it has {rank}, counted from 0: {list(axes.program.param[params[0]].type.shape)}",
            try_=" or ".join(f"{params[0]}:{d}" for d in range(rank)) or "another parameter",
        )
    return Member(params[0], dim % rank)
