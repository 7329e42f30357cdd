"""Axes whose indices are numbers in the data: they can be cut where the data are renumbered too.

An embedding's rows are picked by token ids, and logits are given by token id. Such an axis is
pinned, because a cut changes what the numbers mean. A plan that names it as `renumbered` says that
whoever feeds the model and reads its outputs uses the new numbers, which count the kept indices in
ascending order. That lifts these two pins and no other.
"""

from __future__ import annotations

from typing import Any

from surgeon.axes.analysis import PinFact
from surgeon.axes.axes import Axes, Axis, Reason
from surgeon.axes.plan import Plan, counts
from surgeon.axes.space import leaves
from surgeon.ir.program import Op, ParamRef, Program, Ref, op_refs
from surgeon.ops.index import INDEXED

VOCAB = "vocab"
"""The role of an axis that token ids pick from, or that logits are over."""

MAP_FILE = "token_map.json"
"""The file in a result's folder that says which token was which."""

_PASSED_ON = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "to.dtype", "alias.default", "clone.default"),
        *("contiguous.default", "detach.default", "unsqueeze.default", "squeeze.dim"),
        *("expand.default", "flatten.using_ints"),
    )
)
"""Operations that hand ids on as they are."""

_SHAPE_ONLY = ("_like.default", ".new_ones.default", ".new_zeros.default", ".sym_size.int")
"""Ends of the names of operations that look at the ids' shape, and at none of them."""


def vocabulary_axes(axes: Axes) -> tuple[Axis, ...]:
    """Returns the axes that are over token ids; a tied head has the embedding's."""
    return axes.of_role(VOCAB)


def pins_left(axes: Axes, axis: Axis) -> tuple[Reason, ...]:
    """Returns why an axis can't be cut even where its indices are renumbered; empty if it can."""
    if axis.role != VOCAB:
        return axis.pins or (Reason("its indices are not token ids", ""),)
    found = [_reason(axes.program, pin) for pin in _facts(axes, axis) if not _lifted(axes, pin)]
    found += [_reason_of(op, _used(op)) for op in _readers(axes.program)]
    return tuple(dict.fromkeys([*found, *axis.inexact]))


def of_vocabulary(axes: Axes, plan: Plan) -> dict[str, Any]:
    """Returns how many tokens there are before and after a plan, and what that saves.

    Elements of embedding and head are counted by what picks from them: a tied head has none of its
    own. Empty where the plan renumbers nothing.
    """
    if not plan.renumbered:
        return {}
    picked = {
        op.args[0].name
        for op in axes.program.ops
        if op.target == "aten.embedding.default" and isinstance(op.args[0], ParamRef)
    }
    cuts = [plan.by_axis[name] for name in plan.renumbered]
    members = {m.param for c in cuts for m in axes.by_name[c.axis].members}
    parameters: dict[str, Any] = {}
    for part, names in (("embedding", members & picked), ("head", members - picked)):
        before, after = counts(axes, plan, sorted(names))
        parameters[part] = {"before": before, "after": after}
    return {
        "before": cuts[0].size,
        "after": cuts[0].count,
        "map": MAP_FILE,
        "parameters": parameters,
    }


def _facts(axes: Axes, axis: Axis) -> list[PinFact]:
    number = axes.number[axis.name]
    space = axes.facts.space
    return [pin for pin in axes.facts.pins if number in set(leaves(space.resolve(pin.expr)))]


def _lifted(axes: Axes, pin: PinFact) -> bool:
    """Whether a pin says only that the axis's numbers are those of the input or the output."""
    if pin.op >= 0:
        return axes.program.ops[pin.op].target == "aten.embedding.default" and pin.why == INDEXED
    carried = {a for i in axes.program.inputs for e in axes.dims["%" + i.name] for a in leaves(e)}
    return not carried & set(leaves(axes.facts.space.resolve(pin.expr)))


def _reason(program: Program, pin: PinFact) -> Reason:
    return Reason(pin.why, program.ops[pin.op].where if pin.op >= 0 else "")


def _reason_of(op: Op, why: str) -> Reason:
    return Reason(why, op.where)


def _used(op: Op) -> str:
    return f"token ids are also read by {op.target}, which would see the new numbers"


def _readers(program: Program) -> list[Op]:
    """Returns the operations that read token ids and do something else than pick rows by them."""
    if not program.inputs:
        return []
    ids = {program.inputs[0].name}
    out: list[Op] = []
    for op in program.ops:
        read = {r.name for r in op_refs(op) if isinstance(r, Ref)} & ids
        if not read:
            continue
        if op.target in _PASSED_ON:
            ids.update(op.outputs)
        elif not (op.target == "aten.embedding.default" or op.target.endswith(_SHAPE_ONLY)):
            out.append(op)
    return out
