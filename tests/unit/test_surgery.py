"""Small modules that were, or could be, cut wrongly: each is a whole trap of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from surgeon.axes import Axis, analyse
from surgeon.axes.plan import Plan, cut
from surgeon.axes.surgery import without_branches
from surgeon.capture.model import capture_module
from surgeon.ir import Sym, verify
from tests.exactness import Subject, difference, prunable, random_cut

pytestmark = pytest.mark.slow

Body = Callable[[Any, torch.Tensor], torch.Tensor]
TOLERANCE = 1e-9


class Module(nn.Module):
    """A function of parameters and an input, in double precision."""

    def __init__(self, body: Body, shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.body = body
        draw = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            value = torch.randn(shape, generator=draw, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


def made(body: Body, dynamic: bool = True, width: int = 3, **shapes: tuple[int, ...]) -> Subject:
    """A function of an input [batch, width] as a subject."""
    module = Module(body, shapes).eval()
    x = torch.randn(7, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dims = ({0: Dim("batch", min=2)},) if dynamic else None
    captured, exported = capture_module(module, (x,), dynamic_shapes=dims)
    weights = {n: t.detach() for n, t in {**exported.state_dict, **captured.constants}.items()}
    out = Subject(analyse(captured.program), weights, (x,))
    with torch.no_grad():
        assert difference(out.original, (module(x),)) < TOLERANCE
    return out


def carrier(subject: Subject, param: str, dim: int = -1) -> Axis:
    """The one axis of a parameter's dimension."""
    rank = len(subject.axes.param_dims(param))
    (found,) = (
        a
        for a in subject.axes.axes
        if any(m.param == param and m.dim == dim % rank for m in a.members)
    )
    return found


def differences(subject: Subject, axis: Axis) -> list[float]:
    """How masked and removed differ, one index gone and one left, free and not."""
    rng = np.random.default_rng(0)
    return [
        subject.difference(Plan((random_cut(subject.axes, axis, rng, keep=keep, free=free),)))
        for keep in (1, axis.size - 1)
        for free in {False, bool(axis.outer)}
    ]


def sound(subject: Subject) -> list[Axis]:
    """The axes that can go, after showing that those called exact are."""
    axes = prunable(subject.axes)
    for axis in axes:
        found = differences(subject, axis)
        assert not axis.exact or max(found) <= TOLERANCE, (axis.name, found)
    return axes


# --- one tensor that carries an axis twice ----------------------------------------------------


def _outer(name: str) -> Body:
    combine: Any = {
        "add": torch.add,
        "maximum": torch.maximum,
        "where": lambda a, b: torch.where(a > b, a, b),
        "div": torch.div,
    }[name]

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        u = x @ m.w
        return combine(u[:, :, None], u[:, None, :]).mul(m.g).sum((1, 2))[:, None] + x

    return body


@pytest.mark.parametrize("name", ["add", "maximum", "where", "div"])
def test_a_broadcast_table_does_not_vanish_because_its_rows_would(name: str):
    subject = made(_outer(name), w=(3, 4), g=(1, 1))
    axis = carrier(subject, "w")
    assert axis.prunable and not axis.exact
    assert max(differences(subject, axis)) > 1e-3


def test_a_table_of_products_vanishes_in_rows_and_columns():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        u = x @ m.w
        return (u[:, :, None] * u[:, None, :]).sum((1, 2))[:, None] + x

    subject = made(body, w=(3, 4))
    assert [a.exact for a in sound(subject)] == [True]


def test_columns_of_a_weight_do_not_make_a_batch_vanish():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        u = torch.sigmoid(x @ m.w)
        return F.linear(u[:, :, None] * u[:, None, :], m.k).sum(1)

    axis = carrier(made(body, w=(3, 4), k=(2, 4)), "w")
    assert axis.prunable and not axis.exact


def test_a_bias_fills_a_batch_that_had_vanished():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear((x @ m.w)[:, :, None] * m.r, m.k, m.b).sum(1)

    subject = made(body, w=(3, 4), r=(1, 5), k=(2, 5), b=(2,))
    assert not carrier(subject, "w").exact and carrier(subject, "r").exact
    sound(subject)


def test_what_is_repeated_along_an_axis_does_not_vanish_there():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        u = x @ m.w
        repeated = u[:, :, None].expand(-1, 4, 4)
        return (u[:, :, None] * u[:, None, :] + repeated).sum((1, 2))[:, None] + x

    axis = carrier(made(body, w=(3, 4)), "w")
    assert axis.prunable and not axis.exact


def test_a_square_weight_on_the_residual_loses_rows_and_columns():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, m.i)
        h = h + F.linear(torch.sigmoid(F.linear(h, m.w)), m.w.T)
        return F.linear(h, m.o)

    subject = made(body, i=(4, 3), w=(4, 4), o=(2, 4))
    assert sound(subject)


# --- freedom of choice within an enclosing axis -----------------------------------------------


def _heads(change: Callable[[Any, torch.Tensor], torch.Tensor]) -> Body:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return change(m, F.linear(x, m.w).view(-1, 3, 4)).flatten(1) @ m.o

    return body


MIXED: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], dict[str, tuple[int, ...]]]] = {
    "a product across heads": (lambda m, h: torch.matmul(m.m, h) + h, {"m": (3, 3)}),
    "likeness of heads": (lambda m, h: (h @ h.transpose(1, 2)) @ h, {}),
    "likeness by a linear map": (
        lambda m, h: torch.sin(torch.bmm(F.softmax(m.m, 0).expand(h.shape[0], 3, 3), h)) * h,
        {"m": (3, 3)},
    ),
    "softmax across heads": (lambda m, h: h.softmax(1) * h, {}),
    "a running sum across heads": (lambda m, h: h.cumsum(1) * h, {}),
    "a layer norm across heads": (
        lambda m, h: F.layer_norm(h.transpose(1, 2), (3,)).transpose(1, 2) * h,
        {},
    ),
    "torch's attention between heads": (lambda m, h: F.scaled_dot_product_attention(h, h, h), {}),
    "heads picked by number": (lambda m, h: h[:, torch.tensor([2, 0, 1])] + h, {}),
    "heads averaged": (lambda m, h: h.mean(1, keepdim=True) * h, {}),
    "a table of heads by heads": (
        lambda m, h: (h[:, :, None] * h.sum(-1)[:, None, :, None] * m.p).sum(1),
        {"p": (3, 3, 4)},
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_heads_that_meet_keep_the_same_channels(name: str):
    change, shapes = MIXED[name]
    subject = made(_heads(change), w=(12, 3), o=(12, 2), **shapes)
    sound(subject)
    channels = [a for a in prunable(subject.axes) if a.size == 4]
    assert channels and all(not a.outer for a in channels)


def test_heads_that_never_meet_choose_for_themselves():
    subject = made(_heads(lambda m, h: torch.tanh(h) * m.g), w=(12, 3), o=(12, 2), g=(3, 4))
    (channels,) = (a for a in sound(subject) if a.size == 4)
    assert [subject.axes.get(o).size for o in channels.outer] == [3]
    # Parts of a fused weight are alternatives, not two heads at once.
    fused = made(
        lambda m, x: (
            (lambda a, b: (a * b).flatten(1))(*F.linear(x, m.w).view(-1, 2, 3, 4).split(1, 1)) @ m.o
        ),
        w=(24, 3),
        o=(12, 2),
    )
    sound(fused)
    halves = made(
        lambda m, x: (lambda p: (p[0].view(-1, 3, 4) * p[1].view(-1, 3, 4)).flatten(1) @ m.o)(
            F.linear(x, m.w).chunk(2, 1)
        ),
        w=(24, 3),
        o=(12, 2),
    )
    (channels,) = (a for a in sound(halves) if a.size == 4)
    assert [halves.axes.get(o).size for o in channels.outer] == [3]


# --- poles, maps with f(0) ≠ 0, and their consumers -------------------------------------------

POLES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rsqrt": lambda h: torch.rsqrt(h.abs()),
    "log": lambda h: torch.log(h.abs()),
    "reciprocal": torch.reciprocal,
    "a negative power": lambda h: h.pow(-2),
    "a power": lambda h: h.abs() ** (torch.cos(h) - 2.0),
}


@pytest.mark.parametrize("name", POLES)
def test_a_channel_that_would_become_infinite_is_not_exact(name: str):
    subject = made(lambda m, x: POLES[name](x @ m.w) @ m.o, w=(3, 4), o=(4, 2))
    axis = carrier(subject, "w")
    assert axis.prunable and not axis.exact and "infinite" in axis.inexact[0].why
    assert max(differences(subject, axis)) == float("inf")


KINDS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "rsqrt of a square and eps": (lambda h: h * torch.rsqrt(h.pow(2) + 0.1), True),
    "sigmoid": (torch.sigmoid, False),
    "cos": (torch.cos, False),
    "exp": (torch.exp, False),
    "plus one": (lambda h: h + 1.0, False),
    "plus nothing": (lambda h: h + 0.0, True),
    "silu": (F.silu, True),
    "gelu": (F.gelu, True),
    "filled with nothing": (lambda h: h.masked_fill(h > 0.5, 0.0), True),
    "filled with one": (lambda h: h.masked_fill(h > 0.5, 1.0), False),
    "clamped about nothing": (lambda h: h.clamp(-0.5, 0.5), True),
    "clamped from below": (lambda h: h.clamp(min=0.3), False),
    "softmax": (lambda h: h.softmax(-1), False),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_sum_over_a_map_is_exact_where_the_map_keeps_zero(name: str):
    f, keeps = KINDS[name]
    subject = made(lambda m, x: f(x @ m.w).sum(-1, keepdim=True) + x, w=(3, 4))
    (axis,) = sound(subject)
    assert axis.exact == keeps
    # A weight that is masked as well makes up for it, unless the map looks across channels.
    subject = made(lambda m, x: f(x @ m.w) @ m.o, w=(3, 4), o=(4, 2))
    (axis,) = sound(subject)
    assert axis.exact == (name != "softmax")


def test_a_product_of_two_live_activations_is_not_exact():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        u = (x @ m.w)[:, None, :]
        return torch.sigmoid(u) @ torch.sigmoid(u * 2).transpose(1, 2)

    axis = carrier(made(lambda m, x: body(m, x)[:, 0] + x, w=(3, 4)), "w")
    assert axis.prunable and not axis.exact


# --- literals ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_slice_that_ends_from_the_back_is_counted_from_the_front(dynamic: bool):
    subject = made(
        lambda m, x: (lambda h: h[:, :-4] @ m.o + h[:, -4:] @ m.q)(x @ m.w),
        dynamic,
        w=(3, 12),
        o=(8, 2),
        q=(4, 2),
    )
    assert sorted(a.size for a in sound(subject)) == [4, 8]


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_slice_starts_where_it_did_even_after_a_single_channel(start: int):
    subject = made(lambda m, x: (x @ m.w)[:, start : start + 3] @ m.o, w=(3, 6), o=(3, 2))
    axis = carrier(subject, "o", 0)
    assert axis in sound(subject)
    program, _ = subject.small(Plan((cut(axis, [0, 2]),)))
    (op,) = (op for op in program.ops if op.target == "aten.slice.Tensor")
    assert op.args[1:4] == (1, start, start + 2)


def test_a_view_into_a_dynamic_size_follows_the_axis():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        flat = (x @ m.w).reshape(x.shape[0] * 12)
        return torch.sin(flat).reshape(x.shape[0], 12) @ m.o

    subject = made(body, w=(3, 12), o=(12, 2))
    (axis,) = sound(subject)
    program, _ = subject.small(Plan((cut(axis, range(5)),)))
    literal = next(
        op.arg(1)
        for op in program.ops
        if op.target.startswith("aten.reshape") or op.target.startswith("aten.view")
    )
    assert isinstance(literal, tuple) and literal in ((Sym("5*n0"),), (-1,))


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_mean_over_a_merged_dynamic_dimension_is_still_over_all(dynamic: bool):
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (x @ m.w).reshape(-1).mean(0, keepdim=True) + x

    (axis,) = sound(made(body, dynamic, w=(3, 12)))
    assert axis.exact


def test_a_mean_over_two_dimensions_counts_both():
    subject = made(
        lambda m, x: F.linear(x, m.w).view(-1, 3, 4).mean((1, 2))[:, None] + x, w=(12, 3)
    )
    a, b = sound(subject)
    rng = np.random.default_rng(0)
    both = Plan((random_cut(subject.axes, a, rng), random_cut(subject.axes, b, rng)))
    assert subject.difference(both) <= TOLERANCE


def test_a_mean_over_channels_of_which_some_do_not_vanish_and_some_do():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, m.w) + 1.0  # the constant is left where a channel is masked
        return (h[:, None, :, None] * F.linear(x, m.v)[:, None, None, :]).mean((1, 2, 3))

    subject = made(body, w=(4, 3), v=(6, 3))
    lasting, vanishing = carrier(subject, "w", 0), carrier(subject, "v", 0)
    assert vanishing.exact and not lasting.exact
    first, second = cut(lasting, [1, 2, 3]), cut(vanishing, [0, 4])
    assert subject.difference(Plan((second,))) <= TOLERANCE
    assert subject.difference(Plan((first, second))) <= TOLERANCE


def test_a_mean_that_was_corrected_once_is_corrected_again():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, m.w).view(-1, 3, 4)
        return (h * torch.rsqrt(h.pow(2).mean((1, 2), keepdim=True) + 0.1)).flatten(1) @ m.o

    subject = made(body, w=(12, 3), o=(12, 2))
    heads, channels = sorted(prunable(subject.axes), key=lambda a: a.size)
    program, weights = subject.small(Plan((cut(heads, [0, 2]),)))
    again = Subject(analyse(program), weights, subject.inputs)
    (same,) = (a for a in prunable(again.axes) if a.members == channels.members and a.size == 4)
    then = again.removed(Plan((cut(same, [0, 1, 3]),)))
    both = subject.removed(Plan((cut(heads, [0, 2]), cut(channels, [0, 1, 3]))))
    assert difference(then, both) <= TOLERANCE


def test_the_default_scale_of_torchs_attention_survives_its_width():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (F.linear(x, w).view(-1, 2, 3, 4) for w in (m.q, m.k, m.v))
        return F.scaled_dot_product_attention(q, k, v).flatten(1) @ m.o

    subject = made(body, q=(24, 3), k=(24, 3), v=(24, 3), o=(24, 2))
    found = {a.role: a for a in sound(subject)}
    plan = Plan((cut(found["qk"], [1, 3]),))
    program, weights = subject.small(plan)
    (op,) = (op for op in program.ops if "attention" in op.target)
    assert op.kwarg("scale") == 0.5
    from dataclasses import replace

    narrow = tuple(replace(o, kwargs=()) if o is op else o for o in program.ops)
    wrong = subject.run(replace(program, ops=narrow), weights)
    assert difference(wrong, subject.masked(plan)) > 1e-3


def test_pieces_of_different_sizes_are_split_by_their_sizes():
    subject = made(
        lambda m, x: (lambda a, b: a @ m.o + b @ m.q)(*(x @ m.w).chunk(2, 1)),
        w=(3, 8),
        o=(4, 2),
        q=(4, 2),
    )
    first, _ = sound(subject)
    program, _ = subject.small(Plan((cut(first, [0]),)))
    (op,) = (op for op in program.ops if "split" in op.target or "chunk" in op.target)
    assert op.target == "aten.split_with_sizes.default" and op.arg(1) in ((1, 4), (4, 1))


def test_a_matrix_added_to_a_product_is_coupled_in_both_dimensions():
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (torch.addmm(m.b, m.n, m.w) * m.g).sum(0)[None] + x

    subject = made(body, b=(5, 3), n=(5, 4), w=(4, 3), g=(5, 1))
    rows = carrier(subject, "b", 0)
    assert {(m.param, m.dim) for m in rows.members} == {("b", 0), ("n", 0), ("g", 0)}
    assert len(sound(subject)) == 2


def test_the_same_tensor_joined_with_itself_is_cut_twice():
    subject = made(lambda m, x: torch.cat([x @ m.w, x @ m.w], 1) @ m.o, w=(3, 4), o=(8, 2))
    assert [a.size for a in sound(subject)] == [4]


# --- branches ---------------------------------------------------------------------------------


def _two_branches(m: Any, x: torch.Tensor) -> torch.Tensor:
    h = F.linear(x, m.i)
    h = h + F.linear(F.silu(F.linear(h, m.up)), m.down)
    h = F.linear(torch.tanh(F.linear(h, m.q)), m.p) + h
    return F.linear(h, m.o)


SHAPES = {"i": (4, 3), "up": (5, 4), "down": (4, 5), "q": (6, 4), "p": (4, 6), "o": (2, 4)}


def test_a_branch_that_is_dropped_leaves_the_residual():
    subject = made(_two_branches, **SHAPES)
    first, second = subject.axes.branches
    assert set(first.params) == {"up", "down"} and set(second.params) == {"q", "p"}
    silent = {**subject.weights, "down": torch.zeros(4, 5, dtype=torch.float64)}
    found = subject.removed(Plan(branches=(first.name,)))
    assert difference(found, subject.run(subject.axes.program, silent)) <= TOLERANCE
    left = verify(without_branches(subject.axes, (first.name, second.name)))
    assert {p.name for p in left.params} == {"i", "o"}


def test_branches_and_axes_go_together():
    subject = made(_two_branches, **SHAPES)
    rng = np.random.default_rng(0)
    cuts = tuple(random_cut(subject.axes, a, rng) for a in prunable(subject.axes))
    for branch in subject.axes.branches:
        assert subject.difference(Plan(cuts, (branch.name,))) <= TOLERANCE
    both = Plan(cuts, tuple(b.name for b in subject.axes.branches))
    assert subject.difference(both) <= TOLERANCE


def test_no_branch_dropped_is_the_same_program():
    subject = made(_two_branches, **SHAPES)
    assert without_branches(subject.axes, ()) == subject.axes.program
