"""The comparison with the masked model: what it accepts, what it can't miss, what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from surgeon.axes.plan import Plan, cut
from surgeon.errors import Code, SurgeonError
from surgeon.pipeline import Model, Pruned, open_model, prune
from surgeon.report import verify as v
from tests import models

pytestmark = pytest.mark.slow


@cache
def opened(name: str, **overrides: Any) -> Model:
    return open_model(models.build(name, **overrides))


def pruned(name: str = "Llama", **roles: float) -> Pruned:
    return prune(opened(name), roles=roles, verify=False)


def check(made: Pruned, model: Any, **options: Any) -> v.Verification:
    return v.check(
        v.transformers_forward(model),
        v.reference(made.axes, made.plan, made.full),
        v.probes(101),
        made.axes,
        made.plan,
        **options,
    )


# --- inputs ------------------------------------------------------------------------------------


def test_random_inputs_come_whole_and_padded_on_either_side():
    whole, left, right = v.probes(50, length=12)
    assert [p.name for p in (whole, left, right)] == [
        "random",
        "random, padded left",
        "random, padded right",
    ]
    assert whole.ids.shape == (2, 12) and int(whole.ids.max()) < 50 and whole.mask.all()
    assert left.mask[0].tolist() == [0] * 4 + [1] * 8 and left.mask[1].all()
    assert right.mask[1].tolist() == [1] * 9 + [0] * 3 and right.mask[0].all()
    # The first real token is at position 0, wherever the padding lies.
    assert left.positions[0].tolist() == [0] * 4 + list(range(8))
    assert right.positions[1].tolist() == [*range(9), 8, 8, 8]


def test_a_tokenizer_adds_texts():
    tokenizer = models.tokenizer()
    *_, left, right = v.probes(101, tokenizer)
    for probe in (left, right):
        for row, mask, text in zip(probe.ids, probe.mask, v.TEXTS, strict=True):
            assert row[mask.bool()].tolist() == tokenizer(text)["input_ids"]
    assert left.mask[1, 0] == 0 and right.mask[1, -1] == 0


def test_inputs_fit_the_model():
    found = v.probes(40, models.tokenizer(), positions=9)
    assert all(p.ids.shape[1] <= 9 and int(p.ids.max()) < 40 for p in found)
    assert [p.name for p in v.probes(2, models.tokenizer())] == [p.name for p in found]
    # Where no token of the texts is in the vocabulary there are no texts.
    assert len(v.probes(1, models.tokenizer())) == 3


def test_the_same_seed_gives_the_same_inputs():
    assert torch.equal(v.probes(99)[0].ids, v.probes(99)[0].ids)
    assert not torch.equal(v.probes(99)[0].ids, v.probes(99, seed=1)[0].ids)


# --- differences -------------------------------------------------------------------------------


def constant(value: float, vocab: int = 5) -> v.Forward:
    return lambda ids, mask, positions: torch.full((*ids.shape, vocab), value)


def test_a_difference_is_a_share_of_the_largest_logit():
    inputs = v.probes(9, length=8)
    found = v.differences(constant(4.5), constant(-5.0), inputs)
    assert [d.largest for d in found] == pytest.approx([1.9] * 3)
    assert [d.probe for d in found] == [p.name for p in inputs]
    # Where every logit is zero the difference itself is given.
    assert v.differences(constant(0.5), constant(0.0), inputs)[0].largest == 0.5


def test_logits_of_padding_are_not_compared():
    def padding_is_noise(ids: torch.Tensor, mask: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.where(mask.bool()[..., None], 1.0, torch.rand(*ids.shape, 5) + 50)

    found = v.differences(padding_is_noise, constant(1.0), v.probes(9, length=8))
    assert [d.largest for d in found] == [0.0] * 3


def test_one_place_that_differs_is_enough():
    def off(ids: torch.Tensor, mask: torch.Tensor, _: Any) -> torch.Tensor:
        out = torch.full((*ids.shape, 5), 2.0)
        out[1, 3, 4] += 0.25
        return out

    assert v.differences(off, constant(2.0), v.probes(9))[0].largest == pytest.approx(0.125)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_fails(value: float):
    for left, right in ((value, 1.0), (1.0, value), (value, value)):
        with pytest.raises(SurgeonError) as caught:
            v.differences(constant(left), constant(right), v.probes(9))
        assert caught.value.code == Code.VERIFY_FAILED and "finite" in caught.value.why


def test_logits_of_another_shape_fail():
    with pytest.raises(SurgeonError) as caught:
        v.differences(constant(1.0), constant(1.0, vocab=6), v.probes(9))
    assert caught.value.code == Code.VERIFY_FAILED and "shapes" in caught.value.why


# --- the reference -----------------------------------------------------------------------------


def test_the_reference_of_an_empty_plan_is_the_model_itself():
    model = models.build("Llama")
    made = open_model(model)
    whole = v.reference(made.axes, Plan(), made.read)
    (probe, *_) = inputs = v.probes(101)
    found = v.differences(v.transformers_forward(model), whole, inputs)
    assert max(d.largest for d in found) < 1e-5
    assert whole(probe.ids, probe.mask, probe.positions).shape == (2, 24, 101)


def test_the_reference_is_the_model_with_zeros_in_it():
    """Masked by hand in Transformers' own class, without any of our code."""
    made = pruned("Llama", ffn=0.5)
    model = models.build("Llama")
    with torch.no_grad():
        for layer, found in enumerate(made.plan.cuts):
            gone = [i for i in range(80) if i not in set(found.array.tolist())]
            mlp = model.model.layers[layer].mlp
            mlp.gate_proj.weight[gone] = 0
            mlp.up_proj.weight[gone] = 0
            mlp.down_proj.weight[:, gone] = 0
    inputs = v.probes(101)
    whole = v.reference(made.axes, made.plan, made.full)
    found = v.differences(v.transformers_forward(model), whole, inputs)
    assert max(d.largest for d in found) < 1e-5
    untouched = v.differences(v.transformers_forward(models.tiny("Llama")), whole, inputs)
    assert min(d.largest for d in untouched) > 1e-2


def test_a_dropped_branch_is_bypassed_in_the_reference():
    made = pruned("Llama", layers=0.5)
    (layer,) = {b.split("/")[0].rsplit(".", 1)[1] for b in made.plan.branches}
    model = models.build("Llama")
    del model.model.layers[int(layer)]
    model.config.num_hidden_layers = 1
    whole = v.reference(made.axes, made.plan, made.full)
    found = v.differences(v.transformers_forward(model), whole, v.probes(101))
    assert max(d.largest for d in found) < 1e-5


# --- verdicts ----------------------------------------------------------------------------------


def test_a_right_result_is_accepted_with_its_figures():
    made = pruned(ffn=0.3, hidden=1 / 3)
    found = made.verify(models.tokenizer())
    assert found.exact and not found.reasons and found.tolerance == 1e-4
    assert len(found.probes) == 5
    assert 0 < found.largest == max(p.largest for p in found.probes) < 1e-5
    data = json.loads(json.dumps(found.to_json()))
    assert data["exact"] is True and len(data["probes"]) == 5


PARAMETERS = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.v_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_any_disturbed_weight_fails(name: str):
    made = pruned(ffn=0.3, kv_heads=0.34)
    model = made.model
    assert check(made, model).largest < 1e-5
    with torch.no_grad():
        dict(model.named_parameters())[name].mul_(1.02)
    with pytest.raises(SurgeonError) as caught:
        check(made, model)
    error = caught.value
    assert error.code == Code.VERIFY_FAILED and error.data["largest"] > error.data["tolerance"]
    assert error.at.startswith("probe: random")


def test_channels_of_another_order_fail():
    """The right channels, two of them exchanged in one tensor only."""
    made = pruned(ffn=0.3)
    model = made.model
    with torch.no_grad():
        weight = model.model.layers[0].mlp.gate_proj.weight
        weight[[0, 1]] = weight[[1, 0]].clone()
    with pytest.raises(SurgeonError):
        check(made, model)


def test_another_plan_fails():
    """The same sizes from other indices are not what the plan says."""
    made = pruned(ffn=0.5)
    (first, *rest) = made.plan.cuts
    axis = made.axes.by_name[first.axis]
    others = [i for i in range(axis.size) if i not in set(first.array.tolist())]
    other = replace(made, plan=replace(made.plan, cuts=(cut(axis, others), *rest)))
    assert check(other, other.model).largest < 1e-5
    with pytest.raises(SurgeonError):
        check(made, other.model)


def test_the_tolerance_decides():
    made = pruned(hidden=1 / 3)
    largest = check(made, made.model, tolerance=1.0).largest
    assert check(made, made.model, tolerance=largest).largest == largest
    with pytest.raises(SurgeonError):
        check(made, made.model, tolerance=largest / 2)


def test_a_model_that_was_cast_reports_what_that_makes():
    # What is removed from the residual width is folded into weights, which then have to be rounded.
    made = prune(open_model(models.build("Llama").to(torch.bfloat16)), roles={"hidden": 0.25})
    found = made.verify()
    assert found.largest < 1e-5 and found.cast is not None and found.cast > 1e-4
    assert made.model.dtype == torch.bfloat16


# --- what is not exact -------------------------------------------------------------------------


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["GPT2", "OPT", "GPTNeoX", "StableLm", "Phi", "Starcoder2"])
def test_layer_norm_makes_the_width_inexact_and_nothing_else(name: str):
    axes = opened(name).axes
    (hidden,) = axes.of_role("hidden")
    width = Plan((cut(hidden, range(24)),))
    (reason, *_) = v.inexact(axes, width)
    assert reason.startswith(hidden.name) and "mean" in reason
    ffn = Plan(tuple(cut(a, range(40)) for a in axes.of_role("ffn")))
    assert v.inexact(axes, ffn) == ()


def test_root_mean_squares_are_exact():
    axes = opened("Llama").axes
    every = Plan(tuple(cut(a, range(1, a.size)) for a in axes.axes if a.prunable))
    assert len(every.cuts) > 5 and v.inexact(axes, every) == ()


@pytest.mark.zoo
def test_an_inexact_result_says_why():
    made = pruned("Starcoder2", hidden=0.25, ffn=0.25)
    found = made.verify()
    assert not found.exact and found.reasons and found.largest < 1e-4
    assert made.plan.cuts and all("hidden" in reason for reason in found.reasons)
    # Masking alone, with normalisers that see zeros, is another model: the report says no less.
    from surgeon.runtime.apply import masked
    from surgeon.runtime.lower import lower

    plain = lower(made.axes.program, lambda n: masked(made.selection, n, made.full(n)))
    (apart, *_) = v.differences(v.transformers_forward(made.model), plain, v.probes(101))
    assert apart.largest > 1e-3
