"""Key/value heads made fewer while every query head stays: multi-head to grouped-query attention.

Where attention's rule ties query heads to key/value heads, one can't be cut without the other. For
this conversion a program is analysed with both told apart. A plan that names an axis of key/value
heads as `grouped` says that the heads of a group are alike: the first stands for all of them, and
nothing is masked where the others go.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from surgeon.axes.axes import Axes, Axis, Reason
from surgeon.axes.channels import along
from surgeon.axes.plan import Cut, Plan, cut
from surgeon.axes.settle import analyse
from surgeon.axes.space import leaves
from surgeon.ir.program import Program, Ref
from surgeon.ops.attention import APART, ATTENTION, attention_apart
from surgeon.ops.rule import OpRule, rules

Indices = NDArray[np.int64]


@cache
def _apart() -> dict[str, OpRule]:
    table = rules()
    return {**table, ATTENTION: replace(table[ATTENTION], analyse=attention_apart)}


def heads_apart(program: Program) -> Axes:
    """Returns the axes of a program in which query heads are told from key/value heads."""
    return analyse(program, _apart())


def query_heads(axes: Axes, axis: Axis) -> tuple[Axis, ...]:
    """Returns the query heads of every attention that has an axis as its key/value heads."""
    number = axes.number[axis.name]
    found: dict[str, Axis] = {}
    for op in axes.program.ops:
        q, k = op.arg(0), op.arg(1)
        if op.target != ATTENTION or not isinstance(q, Ref) or not isinstance(k, Ref):
            continue
        if number in set(leaves(axes.dims["%" + k.name][1])):
            own = [axes.numbered.get(a) for a in leaves(axes.dims["%" + q.name][1])]
            found.update({a.name: a for a in own if a is not None})
    return tuple(found.values())


def obstacles(axes: Axes, axis: Axis, found: Cut) -> tuple[Reason, ...]:
    """Returns why an axis can't be cut as heads of which those of a group are alike."""
    if axis.role != "kv_heads":
        return (Reason("only key/value heads are grouped", ""),)
    why = [pin for pin in axis.pins if pin.why != APART]
    if axis.normalisers or axis.inexact:
        why += axis.inexact or (Reason("a norm averages over its heads", ""),)
    if len(why) == len(axis.pins):
        why.append(Reason("query heads aren't told apart from them", ""))
    if axis.size % found.count or found != grouping(axis, found.count):
        why.append(Reason("the first head of each group stays, and groups are of one size", ""))
    for queries in query_heads(axes, axis):
        if queries.size % axis.size:
            why.append(Reason(f"{queries.size} query heads aren't a multiple of its heads", ""))
    return tuple(dict.fromkeys(why))


def grouping(axis: Axis, count: int) -> Cut:
    """Returns the cut that leaves the first head of each of `count` groups of neighbours."""
    return cut(axis, range(0, axis.size, max(1, axis.size // count)))


def unmasked(plan: Plan) -> Plan:
    """Returns what a masked reference sees of a plan: grouped heads are alike, and none is zero."""
    if not plan.grouped:
        return plan
    cuts = tuple(c for c in plan.cuts if c.axis not in plan.grouped)
    return replace(plan, cuts=cuts, grouped=())


def places(axes: Axes, heads: Axis, channels: Axis, param: str, dim: int) -> list[Indices]:
    """Returns where a parameter's dimension has the channels of heads, each [heads, channels].

    A rotary axis is there twice, once for each half of its pairs.
    """
    expr = axes.param_dims(param)[dim]
    rows = np.concatenate([a.ravel() for a in along(axes, heads, expr)] or [np.zeros(0, np.int64)])
    every = [a.reshape(channels.size, -1) for a in along(axes, channels, expr)]
    return [a.T for a in every if a.shape[1] == heads.size and np.isin(a, rows).all()]
