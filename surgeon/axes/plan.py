"""What is removed, as frozen data: kept indices by axis, dropped branches, and their arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from operator import index
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes, Axis, Reason
from surgeon.axes.space import Expr, Sum, leaves
from surgeon.errors import Code, SurgeonError, near

if TYPE_CHECKING:
    from surgeon.axes.factors import Half, Split

Indices = NDArray[np.int64]
VERSION = 1


@dataclass(frozen=True)
class Cut:
    """The kept indices of one axis, ascending.

    `kept` has shape `[kept]`, or `[*outer sizes, kept]` where each index of the enclosing axes
    `outer` keeps its own.
    """

    axis: str
    size: int
    kept: tuple[Any, ...]
    outer: tuple[str, ...] = ()

    @cached_property
    def array(self) -> Indices:
        """The kept indices as an array."""
        return np.asarray(self.kept, dtype=np.int64)

    @property
    def count(self) -> int:
        """Number of indices kept (for each index of the enclosing axes)."""
        return int(self.array.shape[-1])


def cut(axis: Axis, kept: Any, outer: Iterable[str] = ()) -> Cut:
    """Returns a cut from any sequence or array of kept indices, sorted."""
    array = np.sort(np.asarray(kept, dtype=np.int64), axis=-1)
    return Cut(axis.name, axis.size, _tuples(array.tolist()), tuple(outer))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else index(value)


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise TypeError(f"{value!r:.80} is no list of names")
    return tuple(value)


@dataclass(frozen=True)
class Plan:
    """Everything that turns one model into a smaller one; it can be saved and replayed.

    Attributes:
        cuts: the axes that lose indices; an axis that isn't named keeps all.
        branches: names of the branches that are dropped.
        source: the model it was made for: its id and the fingerprint of its tensors.
        rewrites: names of parameters that are replaced before slicing; the tensors are stored
            beside the plan.
        renumbered: names of cut axes over token ids: the model is fed, and read, in new numbers,
            which count the kept indices. Otherwise such an axis can't be cut.
        factors: ranks by parameter, of those that become two; their tensors are among the rewrites
            (`surgeon.axes.factors`).
        grouped: names of cut axes of key/value heads: those of a group are alike, and the first of
            them stays for all their query heads (`surgeon.axes.grouped`).
    """

    cuts: tuple[Cut, ...] = ()
    branches: tuple[str, ...] = ()
    source: tuple[tuple[str, str], ...] = ()
    rewrites: tuple[str, ...] = field(default=())
    renumbered: tuple[str, ...] = ()
    factors: tuple[tuple[str, int], ...] = field(default=())
    grouped: tuple[str, ...] = ()

    @cached_property
    def by_axis(self) -> Mapping[str, Cut]:
        """Cuts by axis name."""
        return {c.axis: c for c in self.cuts}

    @property
    def empty(self) -> bool:
        """Whether nothing is removed or rewritten."""
        return not (self.cuts or self.branches or self.rewrites or self.factors)

    def to_json(self) -> str:
        """Returns the plan as JSON text, one cut a line; `from_json(to_json(p)) == p`."""
        head = {
            "version": VERSION,
            "source": dict(self.source),
            "branches": list(self.branches),
            "rewrites": list(self.rewrites),
            **({"renumbered": list(self.renumbered)} if self.renumbered else {}),
            **({"factors": dict(self.factors)} if self.factors else {}),
            **({"grouped": list(self.grouped)} if self.grouped else {}),
        }
        fields = [
            f'"{name}": {json.dumps(value, ensure_ascii=False)}' for name, value in head.items()
        ]
        cuts = ",\n".join(
            "  "
            + json.dumps(
                {"axis": c.axis, "size": c.size, "outer": list(c.outer), "kept": c.kept},
                ensure_ascii=False,
                separators=(",", ":"),
            )
            for c in self.cuts
        )
        return "{" + ",\n ".join([*fields, '"cuts": [\n' + cuts + "\n ]"]) + "}"

    @classmethod
    def from_json(cls, text: str, where: str = "the plan") -> Plan:
        """Returns the plan that `text` spells.

        Raises:
            SurgeonError: `bad-plan` where it is not a plan's JSON.
        """
        try:
            data = json.loads(text)
            if data["version"] != VERSION:
                raise ValueError(f"version {data['version']} is not {VERSION}")
            return cls(
                tuple(
                    Cut(str(c["axis"]), index(c["size"]), _tuples(c["kept"]), _words(c["outer"]))
                    for c in data["cuts"]
                ),
                _words(data["branches"]),
                tuple(sorted((str(k), str(v)) for k, v in data["source"].items())),
                _words(data["rewrites"]),
                _words(data.get("renumbered", [])),
                tuple(sorted((str(k), index(v)) for k, v in data.get("factors", {}).items())),
                tuple(str(name) for name in data.get("grouped", ())),
            )
        except (
            *(ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError),
        ) as error:
            raise SurgeonError(
                Code.BAD_PLAN,
                "this is no plan",
                at=where,
                why=f"{type(error).__name__}: {error}",
                try_="use the plan.json that a prune wrote",
            ) from error


def _mismatch(plan_says: str, why: str, try_: str) -> SurgeonError:
    return SurgeonError(
        Code.PLAN_MISMATCH, "the plan does not fit the model", at=plan_says, why=why, try_=try_
    )


def check(axes: Axes, plan: Plan) -> Plan:
    """Returns the plan if it can be applied to a model with these axes.

    Raises:
        SurgeonError: `plan-mismatch` (names or sizes differ), `pinned`, `empty-axis` or
            `bad-plan` (indices out of order or range, or not rectangular).
    """
    from surgeon.axes.factors import check_factors
    from surgeon.axes.floors import check_floors

    known = {b.name for b in axes.branches}
    for name in plan.branches:
        if name not in known:
            raise _mismatch(name, "the model has no such branch", near(name, known or {"none"}))
    for name in plan.renumbered:
        if name not in plan.by_axis:
            raise _mismatch(name, "the plan renumbers an axis that it doesn't cut", "cut it too")
    for name in plan.grouped:
        if name not in plan.by_axis:
            raise _mismatch(name, "the plan groups an axis that it doesn't cut", "cut it too")
    for c in plan.cuts:
        if c.axis not in axes.by_name:
            raise _mismatch(c.axis, "the model has no such axis", near(c.axis, axes.by_name))
        axis = axes.by_name[c.axis]
        if axis.size != c.size:
            raise _mismatch(
                c.axis,
                f"the axis has {axis.size} indices, the plan was made for {c.size}",
                "replay the plan on the model it was made for",
            )
        pins = _pins(axes, axis, plan)
        if pins:
            raise SurgeonError(
                Code.PINNED,
                f"{c.axis} can't be pruned",
                at=pins[0].where or c.axis,
                why=pins[0].why,
                try_=_instead(axis, plan),
                data={"axis": c.axis, "pins": [r.why for r in pins]},
            )
        _check_cut(axes, axis, c)
    check_factors(axes, plan)
    check_floors(axes, Selection(axes, plan))
    own = {*axes.program.param, *Selection(axes, plan).halves}
    for name in plan.rewrites:
        if name not in own:
            raise _mismatch(name, "the model has no such parameter", near(name, own))
    return plan


def _instead(axis: Axis, plan: Plan) -> str:
    """Returns what to do about an axis that can't be cut."""
    leave = "leave this axis out of the plan"
    if axis.role != "vocab" or plan.renumbered:
        return leave
    return f"{leave}; --trim-vocab FILE cuts the vocabulary and renumbers its tokens"


def _pins(axes: Axes, axis: Axis, plan: Plan) -> tuple[Reason, ...]:
    """Returns what keeps a plan from cutting an axis."""
    if axis.name in plan.grouped:
        from surgeon.axes.grouped import obstacles

        return obstacles(axes, axis, plan.by_axis[axis.name])
    if axis.name not in plan.renumbered:
        return axis.pins
    from surgeon.axes.renumber import pins_left

    return pins_left(axes, axis)


def _check_cut(axes: Axes, axis: Axis, c: Cut) -> None:
    def bad(why: str) -> SurgeonError:
        return SurgeonError(
            Code.BAD_PLAN,
            f"the cut of {c.axis} is not valid",
            at=c.axis,
            why=why,
            try_="keep ascending indices, the same number for each enclosing index",
        )

    try:
        array = c.array
    except ValueError as error:
        raise bad("it keeps different numbers of indices in different places") from error
    allowed = tuple(name for name in axis.outer if name in c.outer)
    if allowed != c.outer:
        raise bad(f"{', '.join(c.outer)} do not enclose it everywhere")
    shape = tuple(axes.get(name).size for name in c.outer)
    if array.ndim != 1 + len(shape) or array.shape[:-1] != shape:
        raise bad(f"its indices have shape {array.shape[:-1]}, its enclosing axes {shape}")
    if array.shape[-1] == 0:
        raise SurgeonError(
            Code.EMPTY_AXIS,
            f"nothing would be left of {c.axis}",
            at=c.axis,
            why=f"all of its {axis.size} indices would be removed",
            try_="remove less, or drop whole branches with the role layers",
            data={"axis": c.axis, "size": axis.size},
        )
    if array.shape[-1] < axis.least:
        raise bad(f"{axis.least} of its indices have to stay, because that many are chosen at once")
    if array.min() < 0 or array.max() >= axis.size:
        raise bad(f"an index is outside 0…{axis.size - 1}")
    if (np.diff(array, axis=-1) <= 0).any():
        raise bad("indices repeat or are out of order")


class Selection:
    """The arithmetic of a plan on tensors: which rows and columns of each are kept."""

    def __init__(self, axes: Axes, plan: Plan) -> None:
        self.axes, self.plan = axes, plan
        self.cuts: dict[int, Cut] = {axes.number[c.axis]: c for c in plan.cuts}

    @cached_property
    def splits(self) -> Mapping[str, Split]:
        """What each parameter with a rank becomes."""
        if not self.plan.factors:
            return {}
        from surgeon.axes.factors import splits

        return splits(self.axes.program, dict(self.plan.factors))

    @cached_property
    def halves(self) -> Mapping[str, Half]:
        """The parameters that those become, by their names."""
        return {half.name: half for s in self.splits.values() for half in (s.down, s.up)}

    def parts(self, param: str) -> tuple[str, ...]:
        """Returns the names that stand for a parameter after the plan: its own, or two."""
        split = self.splits.get(param)
        return (param,) if split is None else (split.down.name, split.up.name)

    def source(self, param: str) -> str:
        """Returns the parameter before the plan that one after it comes from."""
        half = self.halves.get(param)
        return param if half is None else half.param

    def size(self, axis: int) -> int | str:
        """Returns how many indices of an axis are left."""
        found = self.cuts.get(axis)
        return found.count if found else self.axes.sizes[axis]

    def touches(self, expr: Expr) -> bool:
        """Whether an expression carries an axis that loses indices."""
        return any(a in self.cuts for a in leaves(expr))

    def width(self, expr: Expr) -> int:
        """Returns the new size of an expression without dynamic axes."""
        total = 1
        for factor in expr:
            if isinstance(factor, Sum):
                total *= sum(self.width(part) for part in factor.parts)
            else:
                size = self.size(factor)
                assert isinstance(size, int)
                total *= size
        return total

    def full_width(self, expr: Expr) -> int:
        """Returns the size of an expression before anything was removed."""
        total = 1
        for factor in expr:
            if isinstance(factor, Sum):
                total *= sum(self.full_width(part) for part in factor.parts)
            else:
                size = self.axes.sizes[factor]
                assert isinstance(size, int)
                total *= size
        return total

    def shape(self, param: str) -> tuple[int, ...]:
        """Returns the new shape of a parameter; one that becomes two has them by their names."""
        half = self.halves.get(param)
        if half is not None:
            return half.sized(self.width(self.axes.param_dims(half.param)[half.dim]))
        return tuple(self.width(expr) for expr in self.axes.param_dims(param))

    def kept(self, param: str) -> list[Indices | None]:
        """Returns for each dimension of a parameter the kept indices, or None for all of them."""
        half = self.halves.get(param)
        if half is not None:
            own = self.kept(half.param)[half.dim]
            return [own, None] if half.dim == 0 else [None, own]
        dims = self.axes.param_dims(param)
        return [self.indices(e) if self.touches(e) else None for e in dims]

    def cuts_into(self, param: str) -> bool:
        """Whether a parameter loses rows or columns."""
        return any(self.touches(e) for e in self.axes.param_dims(self.source(param)))

    def separable(self, param: str) -> bool:
        """Whether the kept indices of each dimension do not depend on another dimension."""
        for expr in self.axes.param_dims(self.source(param)):
            own = set(leaves(expr))
            for atom in own:
                c = self.cuts.get(atom)
                if c and any(self.axes.number[name] not in own for name in c.outer):
                    return False
        return True

    def indices(self, expr: Expr) -> Indices:
        """Returns the kept indices of an expression, row-major, as numbers before removal."""
        return self._grid(expr, {}, 1)[0]

    def flat(self, param: str) -> Indices:
        """Returns the kept elements of a whole parameter as indices into its flat form."""
        return self.indices(tuple(f for expr in self.axes.param_dims(param) for f in expr))

    def _grid(self, expr: Expr, env: dict[int, Indices], rows: int) -> Indices:
        """Kept indices of `expr` for each of `rows` places, where `env` gives outer indices."""
        place = np.zeros((rows, 1), dtype=np.int64)
        env = {a: v.reshape(rows, 1) for a, v in env.items()}
        for factor in expr:
            n = place.shape[1]
            if isinstance(factor, Sum):
                flat = {a: v.reshape(-1) for a, v in env.items()}
                pieces: list[Indices] = []
                offset = 0
                for part in factor.parts:
                    pieces.append(self._grid(part, flat, rows * n) + offset)
                    offset += self.full_width(part)
                picked = np.concatenate(pieces, axis=1).reshape(rows, n, -1)
                size = offset
            else:
                size = self.axes.sizes[factor]
                assert isinstance(size, int)
                c = self.cuts.get(factor)
                if c is None:
                    picked = np.broadcast_to(np.arange(size), (rows, n, size))
                elif c.outer:
                    outer = tuple(env[self.axes.number[name]] for name in c.outer)
                    picked = c.array[outer]
                else:
                    picked = np.broadcast_to(c.array, (rows, n, c.count))
            k = picked.shape[-1]
            place = (place[..., None] * size + picked).reshape(rows, n * k)
            env = {a: np.repeat(v, k, axis=1) for a, v in env.items()}
            if not isinstance(factor, Sum):
                env[factor] = picked.reshape(rows, n * k)
        return place


def counts(axes: Axes, plan: Plan, names: Iterable[str]) -> tuple[int, int]:
    """Returns the elements of some parameters before and after the plan."""
    selection = Selection(axes, plan)
    gone = dropped(axes, plan)
    before = after = 0
    for name in names:
        shape = axes.program.param[name].type.shape
        before += prod(s for s in shape if isinstance(s, int))
        if name not in gone:
            after += sum(prod(selection.shape(part)) for part in selection.parts(name))
    return before, after


def dropped(axes: Axes, plan: Plan) -> set[str]:
    """Returns the parameters that go with the dropped branches.

    A parameter that several dropped branches share, and nothing else, goes with the last.
    """
    if not plan.branches:
        return set()
    from surgeon.axes.surgery import without_branches

    left = without_branches(axes, plan.branches)
    return set(axes.program.param) - set(left.param)


def merged(plans: Iterable[Plan]) -> Plan:
    """Returns the union of plans that cut different axes.

    Raises:
        SurgeonError: `bad-plan` where two of them cut the same axis.
    """
    cuts: dict[str, Cut] = {}
    branches: dict[str, None] = {}
    rewrites: dict[str, None] = {}
    renumbered: dict[str, None] = {}
    grouped: dict[str, None] = {}
    factors: dict[str, int] = {}
    out = Plan()
    for plan in plans:
        for c in plan.cuts:
            if c.axis in cuts:
                raise SurgeonError(
                    Code.BAD_PLAN,
                    f"two plans cut {c.axis}",
                    at=c.axis,
                    why="an axis is cut once",
                    try_="merge plans of different axes",
                )
            cuts[c.axis] = c
        branches.update(dict.fromkeys(plan.branches))
        rewrites.update(dict.fromkeys(plan.rewrites))
        renumbered.update(dict.fromkeys(plan.renumbered))
        grouped.update(dict.fromkeys(plan.grouped))
        factors.update(plan.factors)
        out = replace(out, source=plan.source or out.source)
    return replace(
        out,
        cuts=tuple(cuts.values()),
        branches=tuple(branches),
        rewrites=tuple(rewrites),
        renumbered=tuple(renumbered),
        factors=tuple(factors.items()),
        grouped=tuple(grouped),
    )
