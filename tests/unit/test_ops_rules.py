"""Single rules: uses, gauges, exactness and literals."""

from __future__ import annotations

import pytest

from surgeon.axes import Axes, Axis, analyse
from surgeon.ir import parse, verify
from surgeon.ops.rule import Gauge, OpRule, rule, rules
from surgeon.ops.shape import segments


def between(body: str, result: str = "%2") -> Axis:
    """The six channels that a linear makes, `body` changes, and a linear contracts."""
    axes: Axes = analyse(
        verify(
            parse(f"""surgeon.program 1
symbol batch
input %x: f32[batch, 8]
parameter $a: f32[6, 8]
parameter $b: f32[8, 6]
parameter $w: f32[6]
parameter $c: f32[6]
%1: f32[batch, 6] = aten.linear.default(%x, $a)
{body}
%last: f32[batch, 8] = aten.linear.default({result}, $b)
return %last
""")
        )
    )
    (axis,) = (a for a in axes.axes if ("a", 0) in axes.carriers(a))
    assert ("b", 1) in axes.carriers(axis)
    return axis


def unary(name: str) -> str:
    return f"%2: f32[batch, 6] = aten.{name}(%1)"


MEAN = (
    "%s: f32[batch, 6] = aten.pow.Tensor_Scalar(%1, 2)\n"
    "%m: f32[batch, 1] = aten.mean.dim(%s, [-1], True)\n"
    "%e: f32[batch, 1] = aten.add.Tensor(%m, 0.1)\n"
    "%q: f32[batch, 1] = aten.rsqrt.default(%e)\n"
    "%n: f32[batch, 6] = aten.mul.Tensor(%1, %q)\n"
)
RULES = {
    # name: (operations, result, gauge, why it is inexact)
    "nothing": ("", "%1", "any invertible map", None),
    "neg": (unary("neg.default"), "%2", "any invertible map", None),
    "tanh": (unary("tanh.default"), "%2", "signed permutation", None),
    "silu": (unary("silu.default"), "%2", "permutation", None),
    "times a number": (
        "%2: f32[batch, 6] = aten.mul.Tensor(%1, 3.0)",
        "%2",
        "any invertible map",
        None,
    ),
    "plus zero": ("%2: f32[batch, 6] = aten.add.Tensor(%1, 0)", "%2", "permutation", None),
    "one less": ("%2: f32[batch, 6] = aten.rsub.Scalar(%1, 1)", "%2", "permutation", None),
    "plus one": (
        # The weight that contracts it is masked as well, so nothing is left behind.
        "%2: f32[batch, 6] = aten.add.Tensor(%1, 1.0)",
        "%2",
        "permutation",
        None,
    ),
    "times a foldable scale": (
        "%2: f32[batch, 6] = aten.mul.Tensor(%1, $w)",
        "%2",
        "any invertible map",
        None,
    ),
    "times itself": ("%2: f32[batch, 6] = aten.mul.Tensor(%1, %1)", "%2", "permutation", None),
    "RMSNorm": (MEAN + "%2: f32[batch, 6] = aten.mul.Tensor(%n, $w)", "%2", "rotation", None),
    "LayerNorm": (
        "%2: f32[batch, 6] = aten.layer_norm.default(%1, [6], $w, $c, 0.1)",
        "%2",
        "permutation",
        "LayerNorm subtracts the mean over it",
    ),
    "softmax": (
        "%2: f32[batch, 6] = aten.softmax.int(%1, -1)",
        "%2",
        "permutation",
        "softmax gives a masked channel a share",
    ),
    "divided by": (
        "%2: f32[batch, 6] = aten.div.Tensor($w, %1)",
        "%2",
        "permutation",
        "divided by zero",
    ),
    "mean of what does not vanish": (
        "%s: f32[batch, 6] = aten.exp.default(%1)\n"
        "%m: f32[batch, 1] = aten.mean.dim(%s, [-1], True)\n"
        "%2: f32[batch, 6] = aten.mul.Tensor(%1, %m)",
        "%2",
        "permutation",
        "averaged over, and masked channels don't vanish",
    ),
    "sum of what vanishes": (
        "%m: f32[batch, 1] = aten.sum.dim_IntList(%1, [-1], True)\n"
        "%2: f32[batch, 6] = aten.mul.Tensor(%1, %m)",
        "%2",
        "permutation",
        None,
    ),
    "sum of what does not": (
        "%s: f32[batch, 6] = aten.cos.default(%1)\n"
        "%m: f32[batch, 1] = aten.sum.dim_IntList(%s, [-1], True)\n"
        "%2: f32[batch, 6] = aten.mul.Tensor(%1, %m)",
        "%2",
        "permutation",
        "summed over, and masked channels don't vanish",
    ),
}


@pytest.mark.parametrize("body, result, gauge, why", RULES.values(), ids=RULES)
def test_a_rule_says_which_bases_and_whether_masking_is_removal(body, result, gauge, why):
    axis = between(body, result)
    assert axis.prunable
    assert axis.gauge.text == gauge
    if why is None:
        assert axis.exact, axis.inexact
    else:
        assert any(why in reason.why for reason in axis.inexact), axis.inexact


def test_a_product_of_two_activations_that_do_not_vanish_is_inexact():
    axes = analyse(
        verify(
            parse("""surgeon.program 1
input %x: f32[3, 8]
parameter $a: f32[6, 8]
parameter $b: f32[6, 8]
%1: f32[3, 6] = aten.linear.default(%x, $a)
%2: f32[3, 6] = aten.linear.default(%x, $b)
%3: f32[3, 6] = aten.exp.default(%1)
%4: f32[3, 6] = aten.exp.default(%2)
%5: f32[6, 3] = aten.t.default(%4)
%6: f32[3, 3] = aten.matmul.default(%3, %5)
return %6
""")
        )
    )
    (axis,) = (a for a in axes.axes if ("a", 0) in axes.carriers(a))
    assert axes.carriers(axis) == (("a", 0), ("b", 0)) and axis.prunable
    assert "a product of two activations" in axis.inexact[0].why


def test_a_mean_over_an_axis_is_recorded_as_a_normaliser():
    axis = between(MEAN + "%2: f32[batch, 6] = aten.mul.Tensor(%n, $w)")
    assert axis.normalisers == (2,)
    assert between("", "%1").normalisers == ()


def test_uses_are_those_that_operations_make():
    assert between("", "%1").uses == ("contract", "produce")
    assert between(unary("silu.default")).uses == ("contract", "map", "produce")
    assert "normalise" in between("%2: f32[batch, 6] = aten.softmax.int(%1, -1)").uses


def test_gauges_meet():
    assert Gauge.ANY.meet(Gauge.PERMUTATION) is Gauge.PERMUTATION
    assert Gauge.ROTATION.meet(Gauge.PAIRWISE) is Gauge.PAIRWISE
    # Half a pair's sign is no rotation of the pair.
    assert Gauge.SIGNED.meet(Gauge.PAIRWISE) is Gauge.PERMUTATION
    for a in Gauge:
        assert a.meet(a) is a
        for b in Gauge:
            assert a.meet(b) is b.meet(a)
            for c in Gauge:
                assert a.meet(b).meet(c) is a.meet(b.meet(c))


@pytest.mark.parametrize(
    "before, after, runs",
    [
        (("b", 6), ("b", 2, 3), [([0], [0]), ([1], [1, 2])]),
        ((2, 3, 4), (6, 4), [([0, 1], [0]), ([2], [1])]),
        (("b", "s", 12), ("b*s", 4, 3), [([0, 1], [0]), ([2], [1, 2])]),
        ((4, 3), (3, 4), [([0, 1], [0, 1])]),
        ((2, 1, 5), (2, 5), [([0], [0]), ([1, 2], [1])]),
        ((5,), (5, 1), [([0], [0]), ([], [1])]),
        ((), (1,), [([], [0])]),
    ],
)
def test_a_view_is_cut_into_the_shortest_runs(before, after, runs):
    assert [(list(a), list(b)) for a, b in segments(before, after)] == runs


def test_an_operation_has_one_rule():
    taken = next(iter(rules()))
    with pytest.raises(ValueError, match=f"{taken} has two rules"):
        rule(taken, vanish=lambda f: frozenset())(lambda c: None)


def test_a_table_of_rules_replaces_the_built_in_ones():
    program = parse(
        "surgeon.program 1\ninput %x: f32[4]\nparameter $w: f32[4]\n"
        "%y: f32[] = my.op($w)\nreturn %y\n"
    )
    quiet = OpRule("my.op", lambda c: None, lambda f: frozenset())
    assert analyse(program).axes[0].pins[0].why == "no axis rule for my.op"
    assert analyse(program, {"my.op": quiet}).axes[0].prunable


def test_analysis_imports_no_framework():
    import subprocess
    import sys

    code = (
        "import sys, surgeon.axes, surgeon.ops.rule as r; r.rules(); "
        "print([m for m in ('torch', 'transformers', 'onnx') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
