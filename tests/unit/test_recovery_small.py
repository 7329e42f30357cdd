"""What a training changes in the smaller model is what the plan's tensors then say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from surgeon.errors import Code, SurgeonError
from surgeon.opening import Model
from surgeon.plugin import Plan, cut
from surgeon.recovering import Ground
from surgeon.recovery.lora import adapted, maps, merged
from surgeon.recovery.losses import hidden_loss
from tests import models
from tests.recovering import FFN, logits, options, origin, thinner

pytestmark = pytest.mark.slow

IDS = models.tokens(100, 2, 9)


def nudge(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


def hidden(model: Model) -> Plan:
    """The residual stream loses channels, which stock classes have folded into their weights."""
    (axis,) = model.axes.of_role("hidden")
    return Plan((cut(axis, range(0, axis.size, 2)),))


PLANS = {
    "Llama": thinner,
    "Gemma2": hidden,
    "GPT2": lambda m: Plan((cut(m.axes.of_role("ffn")[0], range(50)),)),
    "Qwen2": lambda m: thinner(m, 30, (1,)),
}
BY_PROGRAM = ("Llama", "GPT2")
"""Without a source the model is its program. No class has a GPT-2 with one thinner layer."""


@pytest.mark.parametrize(
    ("name", "program"),
    [(n, p) for n in PLANS for p in (False, True) if p == (n in BY_PROGRAM)] + [("Llama", False)],
)
def test_what_is_learnt_gives_the_trained_model_back(name: str, program: bool) -> None:
    model = origin(name)
    plan = PLANS[name](model)
    ground = Ground(replace(model, source=None) if program else model, plan)
    small = ground.small()
    assert small.learnt() == {}
    nudge(small.model)
    learnt = small.learnt()
    assert learnt.keys() == small.names.keys()
    before, trained = logits(ground.small().model, IDS), logits(small.model, IDS)
    again = logits(replace(ground, rewrites=learnt).small().model, IDS)
    assert not torch.allclose(trained, before, atol=0.1)
    torch.testing.assert_close(again, trained, rtol=1e-4, atol=1e-4)


def test_elements_that_go_are_left_as_they_were() -> None:
    model = origin()
    small = Ground(model, thinner(model, 40)).small()
    nudge(small.model)
    down = "model.layers.0.mlp.down_proj.weight"
    learnt = small.learnt()[down]
    assert torch.equal(learnt[:, 40:], model.read(down)[:, 40:])
    assert torch.equal(learnt[:, :40], small.model.get_parameter(down))


def test_a_tied_table_is_learnt_once() -> None:
    model = origin("Gemma2", tied=True)
    small = Ground(model, hidden(model)).small()
    head = small.model.get_output_embeddings().weight
    assert head is small.model.get_input_embeddings().weight
    nudge(small.model)
    assert sum("embed" in name or "head" in name for name in small.learnt()) == 1


def test_a_round_is_told_in_its_own_sizes() -> None:
    model = origin()
    first = Ground(model, thinner(model, 60, (0,)), scheduled=True)
    down = "model.layers.0.mlp.down_proj.weight"
    assert first.left({down: model.read(down)})[down].shape == (48, 60)
    smaller = replace(model.axes.get(FFN.format(0)), size=60)
    second = first.then(Plan((cut(smaller, range(20, 60)),)), {})
    assert second.plan.by_axis[FFN.format(0)].kept == tuple(range(20, 60))
    assert second.small().model.get_parameter(down).shape == (48, 40)


# --- the residual stream -------------------------------------------------------------------------


def streams(ground: Ground) -> dict[str, torch.Tensor]:
    small, found = ground.small(), {}
    for stream in small.streams:
        module = small.model.get_submodule(stream.module)
        module.register_forward_hook(
            lambda _, given, made, layer=stream.layer: found.__setitem__(
                layer, made[0] if isinstance(made, tuple) else made
            )
        )
    logits(small.model, IDS)
    return found


def test_layers_are_mapped_through_the_plan() -> None:
    model = origin()
    gone = ("model.layers.0/attention", "model.layers.0/mlp")
    ground = Ground(model, Plan(branches=gone))
    (stream,) = ground.small().streams
    assert (stream.layer, stream.module) == ("model.layers.1", "model.layers.0")
    # Dropping what comes after leaves the layers before as they are.
    other = Ground(model, Plan(branches=tuple(name.replace(".0/", ".1/") for name in gone)))
    torch.testing.assert_close(
        streams(other)["model.layers.0"], streams(Ground(model))["model.layers.0"]
    )


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_class_and_the_program_have_the_same_streams(name: str) -> None:
    model = origin(name)
    plan = hidden(model)
    by_class = streams(Ground(model, plan))
    by_program = streams(Ground(replace(model, source=None), plan))
    assert by_class.keys() == by_program.keys() and len(by_class) == 2
    for layer, found in by_class.items():
        # Writing the model may fold a scale into its stream.
        assert float(hidden_loss([found], [by_program[layer]], [None])) < 1e-4
    kept = Ground(model, plan).small().streams[0].kept
    assert kept is not None and kept.tolist() == list(range(0, 2 * len(kept), 2))


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2", "Gemma2"])
@pytest.mark.parametrize("program", [False, True])
def test_adapters_stand_beside_every_map_but_the_head(name: str, program: bool) -> None:
    pytest.importorskip("peft")
    model = origin(name)
    ground = Ground(replace(model, source=None) if program else model)
    small = ground.small()
    found = maps(small)
    if name == "GPT2" and program:
        assert found == []  # its maps are transposed products of the program, no modules
        with pytest.raises(SurgeonError, match="no map to put an adapter beside"):
            adapted(small, options(method="lora"))
        return
    assert len(found) == {"GPT2": 8, "Gemma2": 14}[name]
    assert not any("head" in path or "embed" in path for path in found)
    before = logits(small.model, IDS)
    model_with = adapted(small, options(method="lora", rank=2))
    trained = [p for p in model_with.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.3 * sum(p.numel() for p in small.model.parameters())
    torch.testing.assert_close(logits(small.model, IDS), before)
    with torch.no_grad():
        for parameter in trained:
            parameter += 0.02
    adapting = logits(model_with, IDS)
    assert not torch.allclose(adapting, before, atol=1e-3)
    whole = merged(model_with)
    torch.testing.assert_close(logits(whole, IDS), adapting, rtol=1e-3, atol=1e-3)
    learnt = small.learnt(whole.state_dict())
    assert learnt.keys() == set(small.maps)


def test_a_model_that_lost_a_tensor_is_refused() -> None:
    small = Ground(origin()).small()
    state = dict(small.model.state_dict())
    del state["model.norm.weight"]
    with pytest.raises(SurgeonError) as caught:
        small.learnt(state)
    assert caught.value.code is Code.RUNTIME_FAILED and "model.norm.weight" in caught.value.what
