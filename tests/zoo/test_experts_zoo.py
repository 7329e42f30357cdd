"""Mixtures of experts: their axes, masked against removed, and what is written of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from passes.score.expert_output import ExpertOutput
from passes.score.routing_frequency import RoutingFrequency
from surgeon.axes import Axis
from surgeon.axes.budget import Budget
from surgeon.axes.costs import Costs
from surgeon.axes.plan import Plan, check, cut
from surgeon.calibrate.data import Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.capture.source import resolve
from surgeon.errors import SurgeonError
from surgeon.pipeline import prune
from surgeon.plugin import Context
from surgeon.report import verify
from tests import mixtures
from tests.exactness import Subject, difference, prunable, random_cut, subject_of
from tests.models import tokens

pytestmark = pytest.mark.zoo
every = pytest.mark.parametrize("name", mixtures.MIXTURES)


@cache
def subject(name: str) -> Subject:
    return subject_of(mixtures.tiny(name))


def of_role(name: str, role: str) -> list[Axis]:
    return [a for a in prunable(subject(name).axes) if a.role == role]


def equal(name: str, plan: Plan) -> None:
    """Asserts that removal is masking, and that what is removed mattered."""
    made = subject(name)
    found = made.masked(plan)
    assert difference(found, made.original) > 1e-3, "the cut is too small to show a mistake"
    assert difference(made.removed(plan), found) <= 1e-5


@every
def test_experts_and_their_widths_are_axes(name: str):
    axes = subject(name).axes
    whole = ("vocab", "pair")
    assert not {a.name: a.pins for a in axes.axes if a.pins and a.role not in whole}
    layers = [layer for layer in mixtures.tiny(name).model.layers if _experts(layer)]
    widths = [a for a in of_role(name, "ffn") if a.outer]
    assert len(widths) == len(layers) == len(axes.of_role("experts"))
    for width, layer in zip(widths, layers, strict=True):
        experts = axes.get(width.outer[-1])
        assert width.exact and experts.role == "experts" and not experts.exact
        assert width.size == 12 and experts.least == 2
        # Of the router and the experts every tensor has the experts, as its first dimension.
        (own,) = _experts(layer)
        held = {id(p): n for n, p in mixtures.tiny(name).named_parameters()}
        mine = {held[id(p)] for p in own.parameters()}
        carried = {m.param: m.dim for m in experts.members}
        assert mine < set(carried) and set(carried.values()) == {0}
        assert any("gate.weight" in n or "router.weight" in n for n in set(carried) - mine)


def _experts(layer: Any) -> list[Any]:
    return [m for m in layer.modules() if hasattr(m, "_apply_gate")]


@every
def test_each_axis_alone(name: str):
    rng = np.random.default_rng(0)
    axes = subject(name).axes
    for axis in prunable(axes):
        keep = max(axis.least, int(axis.size * 0.6))
        equal(name, Plan((random_cut(axes, axis, rng, keep=keep),)))


@every
def test_all_axes_at_once(name: str):
    rng = np.random.default_rng(1)
    axes = subject(name).axes
    sizes = {a: max(a.least, a.size - 1) for a in prunable(axes)}
    equal(name, Plan(tuple(random_cut(axes, a, rng, keep=n) for a, n in sizes.items())))


def loaded(folder: Path) -> Any:
    """The checkpoint as Transformers loads it, nothing missing and nothing left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@every
def test_transformers_loads_what_is_left_of_a_saved_mixture(name: str, tmp_path: Path):
    mixtures.tiny(name).save_pretrained(tmp_path / "dense")  # each expert by itself, as on the hub
    roles = {"ffn": 0.25, "experts": 0.3}
    made = prune(tmp_path / "dense", roles=roles, score="random", verify=False)
    made.save(tmp_path / "small")
    model = loaded(tmp_path / "small")
    assert type(model) is type(mixtures.tiny(name))
    masked = verify.reference(made.axes, made.plan, made.full)
    forward = verify.transformers_forward(model)
    verify.check(forward, masked, verify.probes(100), made.axes, made.plan)
    before = [a for a in made.axes.of_role("experts") if a.name in made.plan.by_axis]
    assert before and all(made.plan.by_axis[a.name].count < a.size for a in before)


def test_a_tensor_of_many_experts_is_read_in_part(tmp_path: Path):
    mixtures.tiny("Mixtral").save_pretrained(tmp_path)
    source = resolve(tmp_path)
    assert source.weights is not None
    held = resolve(mixtures.tiny("Mixtral")).weights
    assert held is not None and held.fingerprint() == source.weights.fingerprint()
    for name, tensor in mixtures.tiny("Mixtral").state_dict().items():
        assert torch.equal(source.weights[name], tensor)
        assert torch.equal(source.weights.rows(name, 1, 3), tensor[1:3])
        assert source.weights.shape(name) == tuple(tensor.shape)


def test_no_plan_leaves_fewer_experts_than_are_chosen():
    axes = subject("Mixtral").axes
    (experts, *_) = axes.of_role("experts")
    with pytest.raises(SurgeonError, match="2 of its indices have to stay"):
        check(axes, Plan((cut(experts, [0]),)))
    budget = Budget(roles={"experts": 0.9}, axes=frozenset({experts.name}))
    assert list(budget.kept(experts)) == [4, 3, 2]


def test_chosen_groups_hold_what_is_chosen_in_them():
    axes = subject("DeepseekV3").axes
    (groups, *_), (within, *_) = axes.of_role("expert_groups"), axes.of_role("experts")
    # 2 groups of 3, which are told apart by their two best; 3 experts of those 2 groups.
    assert (groups.size, groups.least) == (3, 2) and (within.size, within.least) == (4, 2)
    assert within.outer == (groups.name,)


def counted(name: str) -> tuple[Any, list[tuple[Any, ...]]]:
    """The model's calibration data, and what Transformers' own experts were given for it."""
    model = mixtures.tiny(name)
    ids = tokens(100, 3, 16)
    seen: list[tuple[Any, ...]] = []
    hooks = [
        m.register_forward_pre_hook(lambda m, args: seen.append((m, *args)))
        for m in _experts(model)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    made = subject(name)
    return Gathered(made.axes, made.weights.__getitem__, Windows(ids.numpy())), seen


def test_experts_are_scored_by_how_often_they_are_chosen():
    data, seen = counted("Qwen3Moe")
    axes = subject("Qwen3Moe").axes
    (axis,) = axes.of_role("experts")
    context = Context(axes, lambda n: None, targets=(axis.name,), calibration=data)
    found = RoutingFrequency().score(context)[axis.name]
    (_, _, chosen, _) = seen[0]
    wanted = torch.bincount(chosen.flatten(), minlength=6) / len(chosen)
    assert found.shape == (6,) and found == pytest.approx(wanted.numpy())
    with pytest.raises(SurgeonError, match="isn't one of experts"):
        RoutingFrequency().score(replace(context, targets=(axes.of_role("hidden")[0].name,)))


def test_experts_are_scored_by_the_norm_of_what_they_add():
    data, seen = counted("DeepseekV3")
    axes = subject("DeepseekV3").axes
    axis, groups = (axes.of_role(r)[0] for r in ("experts", "expert_groups"))
    context = Context(axes, lambda n: None, (axis.name, groups.name), calibration=data)
    module, x, chosen, weights = seen[0]
    wanted, used = torch.zeros(2, 12)
    for token, experts, shares in zip(x, chosen, weights, strict=True):
        for expert, share in zip(experts.tolist(), shares, strict=True):
            inner = module._apply_gate(module.gate_up_proj[expert] @ token)
            wanted[expert] += (module.down_proj[expert] @ inner * share).detach().norm()
            used[expert] += 1
    every = ExpertOutput(over="all").score(context)
    assert every[axis.name].shape == (3, 4) and every[groups.name].shape == (3,)
    assert every[axis.name].flatten() == pytest.approx((wanted / len(x)).numpy(), rel=1e-4)
    assert every[groups.name] == pytest.approx(every[axis.name].sum(1))
    sent = ExpertOutput().score(context)[axis.name]
    assert sent.flatten() == pytest.approx((wanted / used.clamp(min=1)).numpy(), rel=1e-4)


def test_a_token_costs_the_experts_that_it_is_sent_to():
    axes = subject("Mixtral").axes
    (experts, *_) = axes.of_role("experts")
    (width, *_) = (a for a in axes.of_role("ffn") if a.outer)
    costs = Costs(axes)
    gate = {m.param for m in experts.members if m.dim == 0}
    assert len(gate) == 3
    # An expert that goes saves its row of the router, and no product of experts.
    assert costs.channel(experts).flops == 2 * 32
    assert costs.channel(experts).parameters == 32 + 3 * 12 * 32
    # 2 of 4 experts: a row of two maps and a column of the third.
    assert costs.channel(width).flops == 2 * 2 * 3 * 32
    assert costs.channel(width).parameters == 4 * 3 * 32


def test_the_same_plan_is_written_as_a_torch_program(tmp_path: Path):
    model = mixtures.tiny("Mixtral")
    roles = {"experts": 0.25, "ffn": 0.25}
    made = prune(model, roles=roles, score="random", target="pt2", verify=False)
    made.save(tmp_path / "out", verify=False)
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    assert not any("surgeon" in str(node.target) for node in program.graph.nodes)
    ids = tokens(100)
    mask, positions = torch.ones_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    masked = verify.reference(made.axes, made.plan, made.full)
    with torch.no_grad():
        wanted = masked(ids, mask, positions)
        torch.testing.assert_close(
            program.module()(ids, mask, positions), wanted, rtol=1e-4, atol=1e-4
        )
