"""A plan applied to tensors: what is sliced, what is masked, and what normalisers then see."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from surgeon.axes.plan import Cut, Plan, Selection
from surgeon.runtime.apply import (
    kept_layer_norm,
    kept_only,
    kept_rms_norm,
    masked,
    removed,
    rewritten,
)
from tests.exactness import Subject, prunable, random_cut
from tests.unit.test_plan import HIDDEN, KV, PARAMS, D, model, number_of

WHOLE = Plan(
    (Cut("kv", 2, (1,)), Cut("d", 4, ((0, 1, 3), (1, 2, 3)), ("kv",)), Cut("rot", 3, (0, 2)))
)
OWN = Plan((Cut("d", 4, ((0, 1), (2, 3)), ("kv",)), Cut("hidden", 6, (0, 2, 5))))


def tensor(name: str) -> torch.Tensor:
    """Every element its own number, none of them zero."""
    shape = [number_of(e) for e in PARAMS[name]]
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)


@pytest.mark.parametrize("plan", [WHOLE, OWN], ids=["whole", "own"])
@pytest.mark.parametrize("name", PARAMS)
def test_what_is_left_is_what_the_mask_leaves_in_the_same_order(plan: Plan, name: str):
    selection, given = Selection(model(), plan), tensor(name)
    left, mask = removed(selection, name, given), masked(selection, name, given)
    assert tuple(left.shape) == selection.shape(name) and left.is_contiguous()
    assert mask.shape == given.shape
    assert torch.equal(mask[mask != 0], left.reshape(-1))
    assert torch.equal(mask[mask != 0], given[mask != 0])


def test_a_choice_by_head_of_a_three_dimensional_weight():
    selection, given = Selection(model(), OWN), tensor("w")
    expected = torch.stack([given[0, [0, 1]], given[1, [2, 3]]])[..., [0, 2, 5]]
    assert not selection.separable("w")
    assert torch.equal(removed(selection, "w", given), expected)
    zeros = masked(selection, "w", given)
    assert not zeros[0, 2:].any() and not zeros[1, :2].any() and not zeros[..., [1, 3, 4]].any()


def test_a_choice_by_head_within_one_dimension():
    selection, given = Selection(model(), OWN), tensor("o")
    assert torch.equal(removed(selection, "o", given), given[[0, 2, 5]][:, [0, 1, 6, 7]])


def test_a_sum_is_cut_alike_in_each_of_its_parts():
    selection, given = Selection(model(), Plan((Cut("rot", 3, (0, 2)),))), tensor("q")
    assert torch.equal(removed(selection, "q", given), given[[0, 2, 3, 5, 6, 8, 9, 11]])


def test_what_no_cut_touches_is_handed_through_and_nothing_is_written_into():
    selection = Selection(model(), Plan((Cut("rot", 3, (0,)),)))
    for name in PARAMS:
        given = tensor(name)
        before = given.clone()
        touched = name == "q"
        assert (removed(selection, name, given) is given) == (not touched)
        assert (masked(selection, name, given) is given) == (not touched)
        assert torch.equal(given, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_element_types_are_kept_bit_for_bit(dtype: torch.dtype):
    selection, given = Selection(model(), OWN), tensor("w").to(dtype)
    left, mask = removed(selection, "w", given), masked(selection, "w", given)
    assert left.dtype == mask.dtype == dtype
    assert torch.equal(mask[mask != 0], left.reshape(-1))


def test_a_tensor_that_is_no_contiguous_block_is_cut_by_its_indices():
    selection, given = Selection(model(), OWN), tensor("w")
    strided = given.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    assert torch.equal(removed(selection, "w", strided), removed(selection, "w", given))
    assert torch.equal(masked(selection, "w", strided), masked(selection, "w", given))


def test_a_replaced_parameter_is_read_in_place_of_its_own():
    get = rewritten({"a": torch.zeros(1), "b": torch.zeros(2)}.__getitem__, {"b": torch.ones(3)})
    assert torch.equal(get("a"), torch.zeros(1)) and torch.equal(get("b"), torch.ones(3))
    with pytest.raises(KeyError):
        get("c")


KEPT = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("affine", [False, True])
def test_a_layer_norm_of_kept_channels_is_the_small_layer_norm(affine: bool):
    x, w, b, at = drawn(5, 6), drawn(6) + 2, drawn(6), KEPT.bool()
    scale, shift = (w, b) if affine else (None, None)
    small = F.layer_norm(x[:, at], (4,), w[at] if affine else None, b[at] if affine else None, 0.1)
    found = kept_layer_norm(KEPT)(x * KEPT, [6], scale, shift, 0.1)
    torch.testing.assert_close(found[:, at], small)
    assert not torch.allclose(F.layer_norm(x * KEPT, (6,), scale, shift, 0.1)[:, at], small)


@pytest.mark.parametrize("eps", [0.1, None])
def test_a_fused_rms_norm_of_kept_channels_is_the_small_one(eps: float | None):
    x, w, at = drawn(5, 6), drawn(6) + 2, KEPT.bool()
    small = F.rms_norm(x[:, at], (4,), w[at], eps)
    found = kept_rms_norm(KEPT)(x * KEPT, [6], w, eps)
    torch.testing.assert_close(found[:, at], small)
    assert not torch.allclose(F.rms_norm(x * KEPT, (6,), w, eps)[:, at], small)


def test_normalisers_over_several_dimensions_see_kept_elements_only():
    x, kept = drawn(5, 3, 2), KEPT.reshape(3, 2)
    small = F.layer_norm(x.reshape(5, 6)[:, KEPT.bool()], (4,), eps=0.1)
    found = kept_layer_norm(kept)(x * kept, [3, 2], None, None, 0.1)
    torch.testing.assert_close(found.reshape(5, 6)[:, KEPT.bool()], small)


class Norms(torch.nn.Module):
    """A layer norm and a fused RMSNorm over channels that can go, and a norm over none."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)

        def new(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))

        self.up, self.down, self.w, self.b, self.g, self.f = (
            *(new(8, 3), new(3, 8)),
            *(new(8), new(8), new(8), new(3)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.layer_norm(F.linear(x, self.up), (8,), self.w, self.b, 0.1)
        return F.layer_norm(F.linear(F.rms_norm(h, (8,), self.g, 0.1), self.down), (3,), self.f)


def test_only_normalisers_over_channels_that_go_are_replaced():
    from surgeon.axes import analyse
    from surgeon.capture.model import capture_module

    x = drawn(7, 3)
    captured, exported = capture_module(Norms(), (x,))
    weights = {n: t.detach() for n, t in exported.state_dict.items()}
    made = Subject(analyse(captured.program), weights, (x,))
    (axis,) = prunable(made.axes)
    assert not axis.exact
    import numpy as np

    plan = Plan((random_cut(made.axes, axis, np.random.default_rng(0)),))
    norms = kept_only(made.axes, Selection(made.axes, plan), captured.program.producer)
    targets = [captured.program.ops[i].target for i in norms]
    assert targets == ["aten.layer_norm.default", "aten.rms_norm.default"]
    assert made.difference(plan) < 1e-12
    assert kept_only(made.axes, Selection(made.axes, Plan()), captured.program.producer) == {}
    # In a program without them there is nothing to replace.
    assert kept_only(made.axes, Selection(made.axes, plan), {}) == {}


def test_numbers_of_the_hand_made_model_are_those_of_its_parameters():
    assert number_of((KV, D)) == 8 and number_of((HIDDEN,)) == 6
