"""Why dimensions are coupled, what goes with a channel, and why an axis has to stay."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable
from itertools import groupby, pairwise

from surgeon.axes.axes import Axes, Axis, Member
from surgeon.axes.costs import Costs
from surgeon.axes.explanation import About, Chain, Explanation, Link, Lost, Pin, Removal
from surgeon.axes.graph import Place
from surgeon.axes.names import find
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.axes.space import Expr, Sum, leaves
from surgeon.axes.words import freedom
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import ParamRef, op_refs
from surgeon.ops.rule import rules

Step = tuple[Place, Place, int]
"""Two nodes of the coupling graph and the operation of the edge between them."""


def explain(
    axes: Axes,
    a: str,
    b: str | None = None,
    *,
    channel: int | None = None,
    costs: Costs | None = None,
) -> Explanation:
    """Returns why `a` and `b` are coupled; of `a` alone what goes with it and what pins it.

    Args:
        axes: the axes of the program.
        a: an axis, or a dimension of a parameter (`name:0`), as `names.find` reads it.
        b: another one.
        channel: the index that goes; 0 if it isn't given. Of a dimension that is a product of
            axes it is a row, and each axis loses the index that this row has.
        costs: what a channel takes; by default in the bytes that the program has.

    Raises:
        SurgeonError: `no-such-axis` or `bad-option`.
    """
    first = find(axes, a)
    if b is None:
        return _alone(axes, first, channel, costs or Costs(axes))
    if channel is not None:
        raise _bad_channel(channel, "it says what goes when one channel goes", "leave out " + b)
    return _both(axes, first, find(axes, b))


def _bad_channel(channel: int, why: str, try_: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION, f"channel {channel} can't be looked at", at="--channel", why=why, try_=try_
    )


# --- coupled? ------------------------------------------------------------------------------------


def _both(axes: Axes, a: Axis | Member, b: Axis | Member) -> Explanation:
    ours, theirs = _carried(axes, a), _carried(axes, b)
    chains: list[Chain] = []
    for axis in [x for x in ours if x in theirs]:
        start = _places(axes, a, axis)
        ends = _places(axes, b, axis)
        if isinstance(a, Axis) != isinstance(b, Axis):
            # Against a whole axis: the nearest other dimension that carries it.
            start, ends = (
                (start - ends or start, ends)
                if isinstance(a, Axis)
                else (start, ends - start or ends)
            )
        if a == b and isinstance(a, Axis):
            start, ends = _two_ends(axes, axis)
        steps = _shortest(axes, start, ends)
        if steps is not None:
            at = min(start, key=str) if not steps else steps[0][0]
            chains.append(Chain(axis.name, axis.size, words(axes, at), _links(axes, steps)))
    notes = () if chains else tuple(_apart(axes, a, ours, b, theirs))
    return Explanation(str(a), str(b), tuple(chains), notes=notes)


def _two_ends(axes: Axes, axis: Axis) -> tuple[set[Place], set[Place]]:
    found = [_places(axes, member, axis) for member in axis.members]
    return (found[0], found[-1]) if found else (set(), set())


def _apart(
    axes: Axes, a: Axis | Member, ours: list[Axis], b: Axis | Member, theirs: list[Axis]
) -> Iterable[str]:
    for name, found in ((str(a), ours), (str(b), theirs)):
        if isinstance(axes.by_name.get(name), Axis):
            continue
        yield f"{name} carries " + (", ".join(x.name for x in found) or "no axis")
    yield "no operation makes any of these the same, however equal their sizes are"
    for x in ours:
        for y in theirs:
            for inner, outer in ((x, y), (y, x)):
                if outer.name in inner.outer:
                    yield f"{inner.name} lies inside {outer.name}: each index of it has its own"
            both = [str(m.param) for m in x.members if any(m.param == n.param for n in y.members)]
            if both:
                more = f" and {len(both) - 1} more" if len(both) > 1 else ""
                yield f"they meet in {both[0]}{more}, which carries {x.name} and {y.name}"


def _carried(axes: Axes, target: Axis | Member) -> list[Axis]:
    """Returns the axes of a target, outermost first."""
    if isinstance(target, Axis):
        return [target]
    numbers = dict.fromkeys(leaves(axes.param_dims(target.param)[target.dim]))
    return [axes.numbered[n] for n in numbers if n in axes.numbered]


def _places(axes: Axes, target: Axis | Member, axis: Axis) -> set[Place]:
    """Returns the nodes of the coupling graph where a target carries an axis."""
    members = target.members if isinstance(target, Axis) else (target,)
    number = axes.number[axis.name]
    return {p for m in members for p in _at(axes, "$" + m.param, m.dim, number)}


def _at(axes: Axes, tensor: str, dim: int, number: int) -> set[Place]:
    found = enumerate(leaves(axes.dims[tensor][dim]))
    return {Place(tensor, dim, position) for position, n in found if n == number}


def _shortest(axes: Axes, starts: set[Place], ends: set[Place]) -> list[Step] | None:
    """Returns the shortest path from any of the starts to any of the ends, or None."""
    graph = axes.graph
    # Sorted, so that of several shortest chains it is always the same one.
    order = sorted((p for p in starts if p in graph), key=str)
    back: dict[Place, Place | None] = dict.fromkeys(order)
    queue = deque(order)
    while queue:
        here = queue.popleft()
        if here in ends:
            path = [here]
            while (before := back[path[-1]]) is not None:
                path.append(before)
            path.reverse()
            return [(x, y, graph.edges[x, y]["op"]) for x, y in pairwise(path)]
        for other in graph.adj[here]:
            if other not in back:
                back[other] = here
                queue.append(other)
    return None


def _links(axes: Axes, steps: list[Step]) -> tuple[Link, ...]:
    """Returns the steps in words."""
    table = rules()
    out: list[Link] = []
    for place, (left, right, op) in enumerate(steps):
        found = axes.program.ops[op]
        rule = table.get(found.target)
        doc = inspect.getdoc(rule.analyse) if rule else None
        says = (doc or "").partition("\n")[0] or _use(axes, left, op)
        out.append(
            Link(
                words(axes, left),
                words(axes, right),
                found.target,
                says.rstrip("."),
                found.where,
                found.source,
                _joins(axes, left, right, op)
                or any(_through(axes, steps[i : i + 2]) for i in (place - 1, place) if i >= 0),
                (left, right),
            )
        )
    return tuple(out)


def _use(axes: Axes, place: Place, op: int) -> str:
    """Returns what use an operation makes of an axis, where its rule has no words of its own."""
    number, resolve = axes.graph.nodes[place]["axis"], axes.facts.space.resolve
    uses = (u for u in axes.facts.uses if u.op == op)
    kinds = dict.fromkeys(u.kind for u in uses if number in leaves(resolve(u.expr)))
    return "Changes each channel by itself" if "map" in kinds else ", ".join(kinds)


def _joins(axes: Axes, left: Place, right: Place, op: int) -> bool:
    """Whether an operation makes one axis of two different activations that it reads."""
    reads = {"%" + r.name for r in op_refs(axes.program.ops[op]) if not isinstance(r, ParamRef)}
    return left.tensor != right.tensor and {left.tensor, right.tensor} <= reads


def _through(axes: Axes, steps: list[Step]) -> bool:
    """Whether one operation leads from one of its activations to another through its result."""
    (left, middle, op), (_, right, same) = steps[0], steps[-1]
    made = {"%" + name for name in axes.program.ops[op].outputs}
    return op == same and middle.tensor in made and _joins(axes, left, right, op)


def words(axes: Axes, place: Place) -> str:
    """Returns a node of the coupling graph in words: `rows of …weight`, `dimension 2 of %mul`."""
    if place.tensor.startswith("$"):
        name = place.tensor[1:]
        rank = len(axes.param_dims(name))
        if rank == 1:
            return "entries of " + name
        if rank == 2:
            return ("rows of ", "columns of ")[place.dim] + name
        return f"dimension {place.dim} of {name}"
    if place.tensor.startswith("%"):
        return f"dimension {place.dim} of {place.tensor}"
    value, _, label = place.tensor.partition(":")
    return f"the {label} that makes %{value}"


# --- one alone -----------------------------------------------------------------------------------


def _alone(axes: Axes, target: Axis | Member, channel: int | None, costs: Costs) -> Explanation:
    found = _carried(axes, target)
    picked = channel or 0
    if isinstance(target, Axis):
        if not 0 <= picked < target.size:
            raise _bad_channel(
                picked, f"{target.name} has {target.size}", f"0 to {target.size - 1}"
            )
        indices = {target.name: picked}
    else:
        size = axes.program.param[target.param].type.shape[target.dim]
        assert isinstance(size, int)
        if not 0 <= picked < size:
            raise _bad_channel(picked, f"{target} has {size}", f"0 to {size - 1}")
        expr = axes.param_dims(target.param)[target.dim]
        indices = {axes.numbered[n].name: i for n, i in _decode(axes, expr, picked).items()}
    about = tuple(
        About(
            axis,
            freedom(axes, axis),
            removal(axes, axis, indices[axis.name], costs),
            tuple(_pins(axes, target, axis)),
        )
        for axis in found
        if axis.name in indices
    )
    notes: list[str] = []
    if isinstance(target, Member) and len(about) != 1:
        expr = axes.text(axes.param_dims(target.param)[target.dim])
        notes.append(f"{target} is {expr}" if found else f"{target} carries no axis: its size is 1")
    return Explanation(str(target), None, about=about, notes=tuple(notes))


def _decode(axes: Axes, expr: Expr, index: int) -> dict[int, int]:
    """Returns the index of each axis of an expression at one place of it."""
    selection = Selection(axes, Plan())
    out: dict[int, int] = {}
    for place in range(len(expr) - 1, -1, -1):
        factor = expr[place]
        index, here = divmod(index, selection.full_width((factor,)))
        if isinstance(factor, int):
            out[factor] = here
            continue
        for part in factor.parts:
            width = selection.full_width(part)
            if here < width:
                out |= _decode(axes, part, here)
                break
            here -= width
    return out


def removal(axes: Axes, axis: Axis, index: int, costs: Costs) -> Removal:
    """Returns everything that goes when one index of an axis goes from every place of it."""
    number = axes.number[axis.name]
    lost: list[Lost] = []
    one = cut(axis, [index])
    for member in axis.members:
        expr = axes.param_dims(member.param)[member.dim]
        size, rank = Selection(axes, Plan()).full_width(expr), len(axes.param_dims(member.param))
        gone = _indices(axes, expr, number, one.array.tolist()[0])
        lost.append(Lost(member.param, member.dim, rank, size, _ranges(gone)))
    return Removal(index, tuple(lost), costs.channel(axis), costs.per)


def _indices(axes: Axes, expr: Expr, number: int, index: int) -> list[int]:
    """Returns the places of an expression where an axis has this index, ascending."""
    selection = Selection(axes, Plan())
    found: list[int] = []
    inner = 1  # size of what stands right of a factor
    total = selection.full_width(expr)
    for place in range(len(expr) - 1, -1, -1):
        factor = expr[place]
        size = selection.full_width((factor,))
        picked: list[int] = []
        if factor == number:
            picked = [index]
        elif isinstance(factor, Sum):
            offset = 0
            for part in factor.parts:
                picked += [offset + i for i in _indices(axes, part, number, index)]
                offset += selection.full_width(part)
        block = size * inner
        for outer in range(total // block) if picked else ():
            for i in picked:
                at = outer * block + i * inner
                found += range(at, at + inner)
        inner = block
    return sorted(set(found))


def _ranges(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        members = [n for _, n in run]
        out.append((members[0], members[-1]))
    return tuple(out)


def _pins(axes: Axes, target: Axis | Member, axis: Axis) -> Iterable[Pin]:
    """Yields each reason that keeps an axis, with the shortest chain to it."""
    number = axes.number[axis.name]
    ends: dict[tuple[str, str], set[Place]] = {}
    owner = {slot: place for place, slot in axes.facts.slots.items()} if axis.pins else {}
    resolve = axes.facts.space.resolve
    for pin in axes.facts.pins if axis.pins else ():
        if number not in leaves(resolve(pin.expr)):
            continue
        where = axes.program.ops[pin.op].where if pin.op >= 0 else ""
        reason = ends.setdefault((pin.why, where), set())
        for slot in leaves(pin.expr):
            if slot in owner:
                reason |= _at(axes, *owner[slot], number)
            elif pin.op >= 0:
                reason |= _touched(axes, pin.op, number)
    starts = _places(axes, target, axis)
    for (why, where), places in ends.items():
        steps = _shortest(axes, starts, places) or []
        at = steps[0][0] if steps else min(starts, key=str)
        yield Pin(why, where, words(axes, at), _links(axes, steps))


def _touched(axes: Axes, op: int, number: int) -> set[Place]:
    """Returns where an operation's operands and results carry an axis."""
    found = axes.program.ops[op]
    names = [("$" if isinstance(r, ParamRef) else "%") + r.name for r in op_refs(found)]
    names += ["%" + name for name in found.outputs]
    return {
        place
        for name in names
        for dim in range(len(axes.dims.get(name, ())))
        for place in _at(axes, name, dim, number)
    }
