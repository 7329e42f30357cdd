"""The program after a plan: branches dropped, sizes and literals rebuilt, averages corrected."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from surgeon.axes.axes import Axes
from surgeon.axes.factors import factored
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.space import Expr, Extent, Sum, leaves
from surgeon.ir.program import (
    Arg,
    Op,
    ParamRef,
    Program,
    Ref,
    Size,
    TensorType,
    substitute_op,
)
from surgeon.ops.reduce import AVERAGED
from surgeon.ops.rule import rules


def without_branches(axes: Axes, names: Iterable[str]) -> Program:
    """Returns the program with some branches bypassed, and what only they needed gone."""
    program = axes.program
    wanted = set(names)
    drop: dict[int, set[int]] = {}
    for branch in axes.branches:
        if branch.name in wanted:
            drop.setdefault(branch.add, set()).add(branch.operand)
    same: dict[str, Arg] = {}
    gone: set[str] = set()
    ops: list[Op] = []

    def now(arg: Arg) -> Arg:
        return same.get(arg.name, arg) if isinstance(arg, Ref) else arg

    for index, op in enumerate(program.ops):
        out = set(drop.get(index, ()))
        out |= {i for i, a in enumerate(op.args) if isinstance(a, Ref) and a.name in gone}
        if out and len(out) < 2:
            same[op.outputs[0]] = now(op.args[1 - out.pop()])
        elif out:
            gone.add(op.outputs[0])
        else:
            ops.append(substitute_op(op, now))
    outputs = tuple(
        found.name if isinstance(found := same.get(name), Ref) else name for name in program.outputs
    )
    return replace(program, ops=tuple(ops), outputs=outputs).without_dead_code()


class _Resize:
    """New sizes of values, for types and for rules that rebuild literals."""

    def __init__(self, axes: Axes, selection: Selection, program: Program) -> None:
        self.axes, self.selection, self.program = axes, selection, program

    def size(self, expr: Expr, before: Size) -> Size:
        if not self.selection.touches(expr):
            return before
        total = Extent(1)
        for factor in expr:
            if isinstance(factor, Sum):
                total = total.times(Extent(self.selection.width((factor,))))
            else:
                total = total.times(Extent.of(self.selection.size(factor)))
        return str(total) if total.dynamic else total.number

    def type(self, name: str, before: TensorType) -> TensorType:
        exprs = self.axes.dims.get(name, ())
        sizes = (self.size(e, s) for e, s in zip(exprs, before.shape, strict=True))
        return TensorType(before.dtype, tuple(sizes))


class _Rebuild:
    """What a rule sees while it rebuilds an operation's literals."""

    def __init__(self, resize: _Resize, index: int, op: Op) -> None:
        self._resize, self._index, self.op = resize, index, op
        self.program = resize.program

    def shape(self, index: int = 0) -> tuple[Size, ...]:
        return self._resize.type("%" + self.op.outputs[index], self.op.types[index]).shape

    def operand(self, arg: Arg) -> tuple[Size, ...]:
        sigil = "%" if isinstance(arg, Ref) else "$"
        assert isinstance(arg, Ref | ParamRef)
        return self._resize.type(sigil + arg.name, self.program.type_of(arg)).shape

    def label(self, name: str) -> int:
        # An axis of one channel resolves to nothing, the empty product: its width is 1, not 0.
        return self._resize.selection.width(self._resize.axes.labels[self._index, name])


def operate(axes: Axes, plan: Plan) -> Program:
    """Returns the program after the plan: what back ends emit.

    Averages over removed channels are scaled by kept/all, so that they stay what they were with
    the channels masked. A map with a rank is two.
    """
    selection = Selection(axes, plan)
    left = without_branches(axes, plan.branches) if plan.branches else axes.program
    resize = _Resize(axes, selection, axes.program)
    original = axes.program.producer
    table = rules()
    ops: list[Op] = []
    same: dict[str, Arg] = {}

    def now(arg: Arg) -> Arg:
        return same.get(arg.name, arg) if isinstance(arg, Ref) else arg

    for op in left.ops:
        index = original[op.outputs[0]]
        found = table.get(op.target)
        # Rules see operands under their own names; corrected averages are put in afterwards.
        new = found.rebuild(_Rebuild(resize, index, op)) if found and found.rebuild else op
        types = tuple(resize.type("%" + n, t) for n, t in zip(op.outputs, op.types, strict=True))
        new = replace(substitute_op(new, now), types=types)
        ops.append(new)
        share = share_of(axes, selection, index, op)
        if share != 1.0:
            name = op.outputs[0] + "_of_all"
            while name in axes.program.types:
                name += "_"
            scaled = replace(
                new,
                outputs=(name,),
                target="aten.mul.Tensor",
                args=(Ref(op.outputs[0]), share),
                kwargs=(),
            )
            ops.append(scaled)
            same[op.outputs[0]] = Ref(name)
    params = tuple(
        replace(p, type=TensorType(p.type.dtype, selection.shape(p.name))) for p in left.params
    )
    outputs = tuple(
        found.name if isinstance(found := same.get(name), Ref) else name for name in left.outputs
    )
    whole = replace(left, ops=tuple(ops), params=params, outputs=outputs)
    return factored(whole, selection)


def centred(axes: Axes, expr: Expr) -> bool:
    """Whether an axis of an expression is averaged over where masked channels don't vanish."""
    found = (axes.numbered[a] for a in leaves(expr) if a in axes.numbered)
    return any(reason.why == AVERAGED for axis in found for reason in axis.inexact)


def share_of(axes: Axes, selection: Selection, index: int, op: Op) -> float:
    """Returns kept/all of what an averaging operation averages over, 1 for any other.

    It is 1, too, for an axis that is centred before it is averaged: like LayerNorm, that sees the
    channels that are there.
    """
    if op.target != "aten.mean.dim":
        return 1.0
    x = op.arg(0)
    assert isinstance(x, Ref | ParamRef)
    exprs = axes.dims[("%" if isinstance(x, Ref) else "$") + x.name]
    dims = op.arg(1)
    picked = (
        range(len(exprs))
        if not isinstance(dims, tuple)
        else [d for d in dims if isinstance(d, int)]
    )
    kept = total = 1
    for d in picked:
        for factor in exprs[d]:
            if selection.touches((factor,)) and not centred(axes, (factor,)):
                kept *= selection.width((factor,))
                total *= selection.full_width((factor,))
    return kept / total
