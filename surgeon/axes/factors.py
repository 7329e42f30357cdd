"""Maps written as the product of two: how a plan's ranks change names, shapes and the program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes
from surgeon.axes.contractions import CONTRACT, contractions
from surgeon.errors import Code, SurgeonError, near
from surgeon.ir.program import Arg, Op, Param, ParamRef, Program, Ref, TensorType

if TYPE_CHECKING:
    from surgeon.axes.plan import Plan, Selection


@dataclass(frozen=True)
class Product:
    """What stands for a parameter of full size: `left` times `right`.

    Attributes:
        left: [rows, rank], a tensor.
        right: [rank, columns], a tensor.
        energy: the share of the squared singular values that it keeps, as whoever made it weighs
            them.
    """

    left: Any
    right: Any
    energy: float = 1.0

    @property
    def rank(self) -> int:
        """What both sizes have in common."""
        return int(self.left.shape[-1])

    @property
    def whole(self) -> Any:
        """[rows, columns], fp32: the product."""
        return (self.left.double() @ self.right.double()).float()


@dataclass(frozen=True)
class Half:
    """One of the two parameters that a factored one becomes.

    Attributes:
        name: of the parameter, in the program after the plan.
        param: that it comes from.
        dim: the dimension of that one which it has too; the other is the rank.
        rank: of the product.
    """

    name: str
    param: str
    dim: int
    rank: int

    def sized(self, width: int) -> tuple[int, int]:
        """Returns the shape, where the dimension it has in common is this wide."""
        return (width, self.rank) if self.dim == 0 else (self.rank, width)


@dataclass(frozen=True)
class Split:
    """What a factored parameter becomes: `down` is applied first and makes the rank's axis."""

    param: str
    down: Half
    up: Half

    @property
    def rows(self) -> Half:
        """The left factor of the product."""
        return self.down if self.down.dim == 0 else self.up

    @property
    def columns(self) -> Half:
        """The right factor of the product."""
        return self.up if self.down.dim == 0 else self.down


def splits(program: Program, factors: Mapping[str, int]) -> dict[str, Split]:
    """Returns by parameter what those with a rank become.

    Args:
        program: before the plan.
        factors: ranks by parameter; each is one that `factorable` names.
    """
    inner = {found.param: found.dim for found in contractions(program)}
    out: dict[str, Split] = {}
    for param, rank in factors.items():
        stem, dim = param.removesuffix(".weight"), inner[param]
        down, up = (_free(program, f"{stem}.{name}") for name in ("down", "up"))
        out[param] = Split(param, Half(down, param, dim, rank), Half(up, param, 1 - dim, rank))
    return out


def _free(program: Program, stem: str) -> str:
    """Returns a weight's name that no parameter has."""
    while f"{stem}.weight" in program.param_of:
        stem += "_"
    return f"{stem}.weight"


def factorable(axes: Axes) -> tuple[str, ...]:
    """Returns the parameters that may become two: matrices that one value is multiplied with.

    One that several operations use, or one that is looked up too, stays one.
    """
    program = axes.program
    found = dict.fromkeys(c.param for c in contractions(program))
    return tuple(
        name
        for name in found
        if len(program.readers[name]) == 1 and len(program.param[name].type.shape) == 2
    )


def check_factors(axes: Axes, plan: Plan) -> None:
    """Sees to it that the ranks of a plan fit a model.

    Raises:
        SurgeonError: `plan-mismatch` where it has no such parameter, `bad-plan` where that is no
            matrix of its own, or the rank none that it can have.
    """
    from surgeon.axes.plan import Selection

    if not plan.factors:
        return
    known = set(factorable(axes))
    plain = Selection(axes, replace(plan, factors=()))
    for name, rank in plan.factors:
        if name not in axes.program.param:
            raise SurgeonError(
                Code.PLAN_MISMATCH,
                "the plan does not fit the model",
                at=name,
                why="the model has no such parameter",
                try_=near(name, axes.program.param),
            )
        if name not in known:
            why = "it is no matrix that one value alone is multiplied with"
        elif not plain.separable(name):
            why = "other columns are left in other rows, and a product has the same in all"
        elif [n for n, _ in plan.factors].count(name) > 1:
            why = "it is named twice"
        elif not 1 <= rank <= min(plain.shape(name)):
            why = f"its rank is from 1 to {min(plain.shape(name))}, and the plan has {rank}"
        else:
            continue
        raise SurgeonError(
            Code.BAD_PLAN,
            f"{name} can't be a product of rank {rank}",
            at=name,
            why=why,
            try_="leave it out of the plan's factors",
        )


def check_halves(selection: Selection, rewrites: Mapping[str, Any]) -> None:
    """Sees to it that the tensors of every product are there, in full size.

    Raises:
        SurgeonError: `bad-plan`.
    """
    for half in selection.halves.values():
        full = selection.axes.program.param[half.param].type.shape[half.dim]
        assert isinstance(full, int)
        found = rewrites.get(half.name)
        shape = None if found is None else tuple(found.shape)
        if shape == half.sized(full):
            continue
        raise SurgeonError(
            Code.BAD_PLAN,
            f"the plan has no usable tensor for {half.name}",
            at=half.name,
            why="it isn't there"
            if shape is None
            else f"it is {list(shape)}, and has to be {list(half.sized(full))}",
            try_="keep plan.safetensors beside plan.json",
        )


def factored(program: Program, selection: Selection) -> Program:
    """Returns a program in which every map with a rank is two, one after the other.

    Args:
        program: after the rest of the plan.
        selection: the plan's.
    """
    there = {name: made for name, made in selection.splits.items() if name in program.param}
    if not there:
        return program
    params: list[Param] = []
    for p in program.params:
        split = there.get(p.name)
        halves = (split.down, split.up) if split else ()
        params += [
            Param(h.name, TensorType(p.type.dtype, selection.shape(h.name)), p.kind) for h in halves
        ] or [p]
    ops: list[Op] = []
    for op in program.ops:
        places = CONTRACT.get(op.target)
        weight = op.arg(places[1]) if places else None
        split = there.get(weight.name) if isinstance(weight, ParamRef) else None
        ops += [op] if split is None else _two(program, op, split)
    return replace(program, ops=tuple(ops), params=tuple(params))


def _two(program: Program, op: Op, split: Split) -> list[Op]:
    """Returns the two operations that a map becomes; what is added to it, the second adds."""
    value, weight, _ = CONTRACT[op.target]
    name = op.outputs[0] + "_down"
    while name in program.types:
        name += "_"
    made = op.types[0]
    type_ = TensorType(made.dtype, (*made.shape[:-1], split.down.rank))
    # The product without a bias, of the operation that has one.
    target = "aten.mm.default" if op.target == "aten.addmm.default" else op.target
    first = (op.args[value], ParamRef(split.down.name))
    down = replace(op, outputs=(name,), types=(type_,), target=target, args=first, kwargs=())
    second: list[Arg] = list(op.args)
    second[value], second[weight] = Ref(name), ParamRef(split.up.name)
    return [down, replace(op, args=tuple(second))]
