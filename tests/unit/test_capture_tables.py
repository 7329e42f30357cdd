"""Tables made of literals become tensors that an axis can carry."""

from __future__ import annotations

import torch

from surgeon.axes import analyse
from surgeon.axes.plan import Plan, cut
from surgeon.capture.tables import with_tables
from surgeon.ir import parse, verify
from tests.exactness import Subject

SLOPES = """surgeon.program 1
symbol batch
input %x: f32[batch, 8]
parameter $a: f32[4, 8]
parameter $b: f32[8, 4]
%1: f32[batch, 4] = aten.linear.default(%x, $a)
%powers: i64[4] = aten.arange.start(1, 5)
%slopes: f32[4] = aten.pow.Scalar(0.5, %powers)
%2: f32[batch, 4] = aten.mul.Tensor(%1, %slopes)
%3: f32[batch, 8] = aten.linear.default(%2, $b)
return %3
"""


def test_slopes_made_of_the_number_of_heads_can_lose_heads():
    whole = verify(parse(SLOPES))
    assert not any(
        a.prunable for a in analyse(whole).axes if ("a", 0) in analyse(whole).carriers(a)
    )
    program, tables = with_tables(whole)
    (name,) = tables
    assert tables[name].tolist() == [0.5, 0.25, 0.125, 0.0625]
    assert program.param[name].kind == "constant"
    assert not any(op.target.startswith("aten.arange") for op in program.ops)
    axes = analyse(verify(program))
    (heads,) = (a for a in axes.axes if ("a", 0) in axes.carriers(a))
    assert heads.prunable and (name, 0) in axes.carriers(heads)
    draw = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(4, 8, generator=draw), "b": torch.randn(8, 4, generator=draw)}
    made = Subject(axes, {**weights, **tables}, (torch.randn(3, 8, generator=draw),))
    assert made.difference(Plan((cut(heads, [0, 3]),))) < 1e-6


def test_tables_of_integers_and_of_inputs_stay_operations():
    text = SLOPES.replace("aten.pow.Scalar(0.5, %powers)", "aten.mul.Tensor(%powers, $c)")
    text = text.replace("parameter $b", "parameter $c: f32[4]\nparameter $b")
    program = verify(parse(text))
    assert with_tables(program) == (program, {})
