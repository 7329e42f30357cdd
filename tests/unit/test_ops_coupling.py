"""Coupling rules on small programs written by hand: what is one axis, what stays, and why."""

from __future__ import annotations

import pytest

from surgeon.axes import Axes, analyse
from surgeon.ir import parse, verify


def axes_of(body: str) -> Axes:
    head = "surgeon.program 1\nsymbol batch\nsymbol seq\n"
    return analyse(verify(parse(head + body.strip() + "\n")))


def dims(axes: Axes, param: str) -> list[str]:
    """A parameter's expressions with axis names shortened to their roles."""
    return [
        " ".join(word.rsplit("/", 1)[-1] for word in axes.text(expr).split(" "))
        for expr in axes.param_dims(param)
    ]


def partition(axes: Axes) -> set[frozenset[str]]:
    return {frozenset(f"{m.param}:{m.dim}" for m in axis.members) for axis in axes.axes}


def carrying(axes: Axes, param: str, dim: int = 0):
    return [a for a in axes.axes if (param, dim) in axes.carriers(a)]


def why(axes: Axes, param: str, dim: int = 0) -> set[str]:
    return {pin.why for axis in carrying(axes, param, dim) for pin in axis.pins}


MLP = """
input %x: f32[batch, 8]
parameter $gate: f32[6, 8]
parameter $up: f32[6, 8]
parameter $up_bias: f32[6]
parameter $down: f32[8, 6]
%g: f32[batch, 6] = aten.linear.default(%x, $gate) @ "mlp.gate" "mlp.py:3"
%u: f32[batch, 6] = aten.linear.default(%x, $up, $up_bias) @ "mlp.up" "mlp.py:3"
%s: f32[batch, 6] = aten.silu.default(%g) @ "mlp" "mlp.py:3"
%m: f32[batch, 6] = aten.mul.Tensor(%s, %u) @ "mlp" "mlp.py:3"
%d: f32[batch, 8] = aten.linear.default(%m, $down) @ "mlp.down" "mlp.py:4"
%r: f32[batch, 8] = aten.add.Tensor(%x, %d) @ "mlp" "mlp.py:5"
return %r
"""


def test_a_gated_mlp_has_one_axis_of_channels():
    axes = axes_of(MLP)
    assert partition(axes) == {
        frozenset(["gate:0", "up:0", "up_bias:0", "down:1"]),
        frozenset(["gate:1", "up:1", "down:0"]),
    }
    (ffn,) = carrying(axes, "down", 1)
    assert (ffn.role, ffn.size, ffn.prunable, ffn.exact) == ("ffn", 6, True, True)
    assert ffn.gauge.text == "permutation"


def test_what_the_model_takes_and_returns_stays():
    axes = axes_of(MLP)
    (hidden,) = carrying(axes, "down", 0)
    assert {pin.why for pin in hidden.pins} == {
        "it is dimension 1 of the model's input x",
        "it is dimension 1 of the model's output r",
    }


def test_equal_sizes_are_no_reason_to_couple():
    axes = axes_of("""
        input %x: f32[batch, 4]
        parameter $a: f32[4, 4]
        parameter $b: f32[4, 4]
        parameter $c: f32[4, 4]
        %1: f32[batch, 4] = aten.linear.default(%x, $a)
        %2: f32[batch, 4] = aten.linear.default(%1, $b)
        %3: f32[batch, 4] = aten.linear.default(%2, $c)
        return %3
    """)
    assert partition(axes) == {
        frozenset(["a:1"]),
        frozenset(["a:0", "b:1"]),
        frozenset(["b:0", "c:1"]),
        frozenset(["c:0"]),
    }


ATTENTION = """
input %x: f32[batch, seq, 64]
parameter $q: f32[64, 64]
parameter $k: f32[32, 64]
parameter $v: f32[32, 64]
parameter $o: f32[64, 64]
parameter $cos: f32[16]
parameter $head: f32[100, 64]
%q: f32[batch, seq, 64] = aten.linear.default(%x, $q)
%k: f32[batch, seq, 32] = aten.linear.default(%x, $k)
%v: f32[batch, seq, 32] = aten.linear.default(%x, $v)
%qh: f32[batch, seq, 4, 16] = aten.view.default(%q, [{batch}, {seq}, 4, 16])
%kh: f32[batch, seq, 2, 16] = aten.view.default(%k, [{batch}, {seq}, 2, 16])
%vh: f32[batch, seq, 2, 16] = aten.view.default(%v, [{batch}, {seq}, 2, 16])
%qt: f32[batch, 4, seq, 16] = aten.transpose.int(%qh, 1, 2)
%kt: f32[batch, 2, seq, 16] = aten.transpose.int(%kh, 1, 2)
%vt: f32[batch, 2, seq, 16] = aten.transpose.int(%vh, 1, 2)
%q1: f32[batch, 4, seq, 8] = aten.slice.Tensor(%qt, 3, 0, 8)
%q2: f32[batch, 4, seq, 8] = aten.slice.Tensor(%qt, 3, 8, 9223372036854775807)
%qn: f32[batch, 4, seq, 8] = aten.neg.default(%q2)
%qc: f32[batch, 4, seq, 16] = aten.cat.default([%qn, %q1], -1)
%qs: f32[batch, 4, seq, 16] = aten.mul.Tensor(%qc, $cos)
%qr: f32[batch, 4, seq, 16] = aten.add.Tensor(%qt, %qs)
%a: f32[batch, 4, seq, 16] = surgeon.attention(%qr, %kt, %vt, None, causal=True, scale=0.25)
%at: f32[batch, seq, 4, 16] = aten.transpose.int(%a, 1, 2)
%ar: f32[batch, seq, 64] = aten.reshape.default(%at, [{batch}, {seq}, -1])
%y: f32[batch, seq, 64] = aten.linear.default(%ar, $o)
%r: f32[batch, seq, 64] = aten.add.Tensor(%x, %y)
%l: f32[batch, seq, 100] = aten.linear.default(%r, $head)
return %l
"""


def test_grouped_query_attention_with_rotary_pairs():
    """The worked example of the axis algebra, at the sizes at which it is stated."""
    axes = axes_of(ATTENTION)
    hidden = "hidden:64"
    assert dims(axes, "q") == ["kv_heads:2 × q_per_kv:2 × (rotary:8 + rotary:8)", hidden]
    assert dims(axes, "k") == ["kv_heads:2 × (rotary:8 + rotary:8)", hidden]
    assert dims(axes, "v") == ["kv_heads:2 × v:16", hidden]
    assert dims(axes, "o") == [hidden, "kv_heads:2 × q_per_kv:2 × v:16"]
    assert dims(axes, "cos") == ["(rotary:8 + rotary:8)"]
    assert axes.get("q_per_kv").outer == ("kv_heads",)
    assert axes.get("v").outer == ("kv_heads",)
    assert axes.get("rotary").outer == ()
    assert {a.role for a in axes.axes if a.prunable} == {"kv_heads", "q_per_kv", "rotary", "v"}


def test_repetition_spelled_out_gives_what_the_attention_rule_gives():
    spelled = ATTENTION.replace(
        "%a: f32[batch, 4, seq, 16] = surgeon.attention(%qr, %kt, %vt, None, causal=True, "
        "scale=0.25)",
        "\n".join(
            f"%{n}1: f32[batch, 2, 1, seq, 16] = aten.unsqueeze.default(%{n}t, 2)\n"
            f"%{n}2: f32[batch, 2, 2, seq, 16] = aten.expand.default(%{n}1, "
            "[{batch}, 2, 2, {seq}, 16])\n"
            f"%{n}3: f32[batch, 4, seq, 16] = aten.reshape.default(%{n}2, "
            "[{batch}, 4, {seq}, 16])"
            for n in "kv"
        )
        + "\n%a: f32[batch, 4, seq, 16] = "
        "aten.scaled_dot_product_attention.default(%qr, %k3, %v3, None, 0.0, True)",
    )
    a, b = axes_of(ATTENTION), axes_of(spelled)
    assert "scaled_dot" in spelled and b.program != a.program
    for p in "qkvo":
        assert dims(a, p) == dims(b, p)
    assert [(x.name, x.gauge, x.prunable, x.outer) for x in a.axes] == [
        (x.name, x.gauge, x.prunable, x.outer) for x in b.axes
    ]


def test_a_fused_weight_is_a_sum():
    axes = axes_of("""
        input %x: f32[batch, 8]
        parameter $fused: f32[12, 8]
        parameter $down: f32[8, 6]
        parameter $head: f32[100, 8]
        %f: f32[batch, 12] = aten.linear.default(%x, $fused)
        %g: f32[batch, 6], %u: f32[batch, 6] = aten.split.Tensor(%f, 6, -1)
        %m: f32[batch, 6] = aten.mul.Tensor(%g, %u)
        %d: f32[batch, 8] = aten.linear.default(%m, $down)
        %r: f32[batch, 8] = aten.add.Tensor(%x, %d)
        %l: f32[batch, 100] = aten.linear.default(%r, $head)
        return %l
    """)
    assert dims(axes, "fused") == ["(ffn:6 + ffn:6)", "hidden:8"]
    assert dims(axes, "down") == ["hidden:8", "ffn:6"]


def test_unequal_pieces_are_axes_of_their_own():
    axes = axes_of("""
        input %x: f32[batch, 8]
        parameter $fused: f32[12, 8]
        parameter $a: f32[3, 2]
        parameter $b: f32[3, 10]
        %f: f32[batch, 12] = aten.linear.default(%x, $fused)
        %g: f32[batch, 2], %u: f32[batch, 10] = aten.split_with_sizes.default(%f, [2, 10], -1)
        %1: f32[batch, 3] = aten.linear.default(%g, $a)
        %2: f32[batch, 3] = aten.linear.default(%u, $b)
        %r: f32[batch, 3] = aten.add.Tensor(%1, %2)
        return %r
    """)
    assert partition(axes) == {
        frozenset(["fused:0", "a:1"]),
        frozenset(["fused:0", "b:1"]),
        frozenset(["fused:1"]),
        frozenset(["a:0", "b:0"]),
    }
    assert carrying(axes, "a", 1)[0].prunable and carrying(axes, "b", 1)[0].prunable


def test_a_transposed_weight_is_stored_input_by_output():
    axes = axes_of("""
        input %x: f32[3, 8]
        parameter $w1: f32[8, 6]
        parameter $b1: f32[6]
        parameter $w2: f32[6, 8]
        parameter $b2: f32[8]
        %1: f32[3, 6] = aten.addmm.default($b1, %x, $w1)
        %2: f32[3, 6] = aten.tanh.default(%1)
        %3: f32[3, 8] = aten.addmm.default($b2, %2, $w2)
        return %3
    """)
    assert frozenset(["w1:1", "b1:0", "w2:0"]) in partition(axes)


# --- barriers and other refusals ----------------------------------------------------------

BARRIER = """
input %x: f32[batch, 8]
parameter $a: f32[6, 8]
parameter $b: f32[5, 6]
parameter $c: f32[4, 5]
%1: f32[batch, 6] = aten.linear.default(%x, $a) @ "first" "net.py:10"
%2: f32[batch, 6] = aten.roll.default(%1, [1], [1]) @ "mixer" "net.py:11"
%3: f32[batch, 5] = aten.linear.default(%2, $b) @ "second" "net.py:12"
%4: f32[batch, 5] = aten.relu.default(%3) @ "act" "net.py:13"
%5: f32[batch, 4] = aten.linear.default(%4, $c) @ "third" "net.py:14"
return %5
"""


def test_an_unknown_operation_pins_what_touches_it_and_no_more():
    axes = axes_of(BARRIER)
    for param, dim in (("a", 0), ("b", 1)):
        (axis,) = carrying(axes, param, dim)
        (pin,) = axis.pins
        assert pin.why == "no axis rule for aten.roll.default"
        assert pin.where == "mixer, value %2 (net.py:11)"
    (free,) = carrying(axes, "c", 1)
    assert free.prunable and free.exact and axes.carriers(free) == (("b", 0), ("c", 1))


def test_an_unknown_operation_couples_nothing():
    """Torch's roll keeps the shape; that alone is no reason to think its channels alike."""
    axes = axes_of(BARRIER)
    assert carrying(axes, "a", 0) != carrying(axes, "b", 1)


def test_an_unknown_operation_pins_every_tensor_in_its_arguments():
    axes = axes_of("""
        input %x: f32[batch, 8]
        parameter $a: f32[6, 8]
        parameter $w: f32[3, 7]
        %1: f32[batch, 6] = aten.linear.default(%x, $a)
        %2: f32[batch, 4] = my.mix(%x, [1, [%1, $w]], also=2)
        return %2
    """)
    assert why(axes, "a", 0) == {"no axis rule for my.mix"}
    assert why(axes, "w", 0) == why(axes, "w", 1) == {"no axis rule for my.mix"}


def test_a_strided_slice_of_a_part_pins_both_sides():
    axes = axes_of("""
        input %x: f32[batch, 8]
        parameter $a: f32[7, 8]
        parameter $b: f32[4, 3]
        parameter $c: f32[4, 4]
        %1: f32[batch, 7] = aten.linear.default(%x, $a)
        %2: f32[batch, 3] = aten.slice.Tensor(%1, 1, 1, 7, 2)
        %3: f32[batch, 4] = aten.linear.default(%2, $b)
        %4: f32[batch, 4] = aten.linear.default(%3, $c)
        return %4
    """)
    reason = {"a strided slice picks channels by number"}
    assert why(axes, "a", 0) == why(axes, "b", 1) == reason
    assert carrying(axes, "b", 0)[0].prunable


def test_a_failed_equation_pins_both_sides_with_the_reason():
    axes = axes_of("""
        input %x: f32[batch, 8]
        parameter $a: f32[12, 8]
        parameter $b: f32[12, 8]
        parameter $c: f32[8, 4, 3]
        parameter $s: f32[4, 3]
        parameter $t: f32[6, 2]
        parameter $free: f32[5, 8]
        parameter $out: f32[8, 5]
        %1: f32[batch, 12] = aten.linear.default(%x, $a)
        %2: f32[batch, 4, 3] = aten.view.default(%1, [{batch}, 4, 3])
        %3: f32[batch, 4, 3] = aten.mul.Tensor(%2, $s)
        %4: f32[batch, 12] = aten.view.default(%3, [{batch}, 12])
        %5: f32[batch, 6, 2] = aten.view.default(%4, [{batch}, 6, 2]) @ "mix" "net.py:9"
        %6: f32[batch, 6, 2] = aten.mul.Tensor(%5, $t)
        %7: f32[batch, 12] = aten.view.default(%6, [{batch}, 12])
        %8: f32[batch, 8] = aten.matmul.default(%7, $b)
        %9: f32[batch, 5] = aten.linear.default(%8, $free)
        %10: f32[batch, 8] = aten.linear.default(%9, $out)
        return %10
    """)
    for param, dim in (("s", 0), ("s", 1), ("t", 0), ("t", 1), ("a", 0), ("b", 0)):
        found = carrying(axes, param, dim)
        assert found and not any(axis.prunable for axis in found), param
        pin = found[0].pins[0]
        assert pin.why == "4 and 6 cut the same dimension at places that don't nest"
        assert pin.where == "mix, value %5 (net.py:9)"
    assert carrying(axes, "free", 0)[0].prunable and carrying(axes, "b", 1)[0].prunable


PINNED = {
    "select": (
        "%2: f32[batch] = aten.select.int(%1, 1, 0)",
        "%2",
        "one of its channels is picked by number",
    ),
    "unbind": (
        "%2: f32[batch], %3: f32[batch], %4: f32[batch], %5: f32[batch], %6: f32[batch], "
        "%7: f32[batch] = aten.unbind.int(%1, 1)",
        "%2",
        "each of its channels becomes a value of its own",
    ),
    "cumsum": (
        "%2: f32[batch, 6] = aten.cumsum.default(%1, 1)",
        "%2",
        "a running sum needs every channel in its place",
    ),
    "a literal size": (
        "%c: f32[6] = aten.ones.default([6])\n%2: f32[batch, 6] = aten.mul.Tensor(%1, %c)",
        "%2",
        "a tensor is made here with this size as a literal",
    ),
    "gather": (
        "parameter $t: f32[6, 3]\n%i: i64[2] = aten.arange.default(2)\n"
        "%s: f32[batch, 3] = aten.linear.default(%1, $u)\n"
        "%t: f32[6, batch] = aten.t.default(%1)\n%2: f32[2, batch] = aten.index.Tensor(%t, [%i])",
        "%2",
        "rows are picked by numbers that come from data",
    ),
}


@pytest.mark.parametrize("body, result, reason", PINNED.values(), ids=PINNED)
def test_an_operation_that_needs_a_channel_in_its_place_pins_it(body, result, reason):
    axes = axes_of(f"""
input %x: f32[batch, 8]
parameter $a: f32[6, 8]
parameter $u: f32[3, 6]
%1: f32[batch, 6] = aten.linear.default(%x, $a)
{body}
return {result}
""")
    assert reason in why(axes, "a", 0)
    assert carrying(axes, "a", 0)[0].pins[0].where.startswith("the model, value %")


def test_dynamic_sizes_are_never_prunable():
    axes = axes_of(MLP)
    assert all(isinstance(axis.size, int) for axis in axes.axes)
    assert not any("batch" in axis.name for axis in axes.axes)
