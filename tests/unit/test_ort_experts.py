"""Which sums over experts become loops over those that are used, and which stay sums."""

from __future__ import annotations

import pytest

from surgeon.emit.ort.experts import mixtures
from surgeon.ir import Ref, parse

PROGRAM = """surgeon.program 1
symbol n
input %x: f32[n, 8]
input %index: i64[n, 2]
input %weights: f32[n, 2]
parameter $up: f32[4, 8, 6]
parameter $down: f32[4, 6, 8]
parameter $bias: f32[4, 1, 8]
%dispatch: f32[n, 4] = surgeon.dispatch(%index, %weights, 4)
%turned: f32[4, n] = aten.transpose.int(%dispatch, 0, 1)
%share: f32[4, n, 1] = aten.unsqueeze.default(%turned, -1)
%tokens: f32[1, n, 8] = aten.unsqueeze.default(%x, 0)
%inner: f32[4, n, 6] = aten.matmul.default(%tokens, $up)
%bent: f32[4, n, 6] = aten.silu.default(%inner)
%weighed: f32[4, n, 6] = aten.mul.Tensor(%bent, %share)
%made: f32[4, n, 8] = aten.matmul.default(%weighed, $down)
%sum: f32[n, 8] = aten.sum.dim_IntList(%made, [0])
return %sum
"""


def test_one_experts_part_is_a_program_of_its_own():
    found, inside = mixtures(parse(PROGRAM))
    (mixture,) = found.values()
    assert (mixture.end, mixture.share, mixture.tokens) == (8, "share", ("tokens",))
    assert sorted(mixture.params) == ["down", "up"]
    assert inside == {4, 5, 6, 7, 8}
    body = mixture.body
    assert {i.name: i.type.shape for i in body.inputs} == {
        "tokens": (1, "rows", 8),
        "share": (1, "rows", 1),
        "up[expert]": (1, 8, 6),
        "down[expert]": (1, 6, 8),
    }
    assert body.outputs == ("made",)
    assert [op.types[0].shape for op in body.ops] == [(1, "rows", 6)] * 3 + [(1, "rows", 8)]
    assert body.ops[0].args == (Ref("tokens"), Ref("up[expert]"))


def changed(old: str, new: str) -> str:
    assert PROGRAM.count(old) == 1
    return PROGRAM.replace(old, new)


SUM = "%sum: f32[n, 8] = aten.sum.dim_IntList(%made, [0])\n"
ADDED = "%more: f32[4, n, 8] = aten.add.Tensor(%made, {})\n" + SUM.replace("%made", "%more")


def test_a_bias_behind_the_weights_is_weighed_too():
    weighed = "%own: f32[4, n, 8] = aten.mul.Tensor($bias, %share)\n"
    found, inside = mixtures(parse(changed(SUM, weighed + ADDED.format("%own"))))
    assert len(found) == 1 and len(inside) == 7


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # What every expert adds to every token, sent there or not.
        (SUM, ADDED.format("$bias")),
        # exp(0) is 1: what is not sent anywhere counts.
        (SUM, "%more: f32[4, n, 8] = aten.exp.default(%made)\n" + SUM.replace("%made", "%more")),
        # Without the weights all experts count.
        ("aten.mul.Tensor(%bent, %share)", "aten.mul.Tensor(%bent, 2.0)"),
        # Somebody wants what every expert makes.
        ("return %sum\n", "return %sum, %made\n"),
        # A softmax over the experts needs all of them.
        ("aten.silu.default(%inner)", "aten.softmax.int(%inner, 0)"),
        # Only some experts are asked.
        ("aten.silu.default(%inner)", "aten.slice.Tensor(%inner, 0, 0, 4)"),
        # Another sum.
        ("%sum: f32[n, 8] = aten.sum.dim_IntList(%made, [0])",
         "%sum: f32[4, n] = aten.sum.dim_IntList(%made, [2])"),
    ],
)  # fmt: skip
def test_what_needs_all_experts_stays_a_sum(old: str, new: str):
    assert mixtures(parse(changed(old, new))) == ({}, frozenset())


def test_a_rescaled_share_is_another_value():
    """Weights that are not the router's own may be anything, such as never zero."""
    other = "%shifted: f32[4, n, 1] = aten.add.Tensor(%share, 1.0)\n%weighed"
    text = changed("%weighed: ", other + ": ").replace("(%bent, %share)", "(%bent, %shifted)")
    assert mixtures(parse(text)) == ({}, frozenset())
