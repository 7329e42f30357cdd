"""The axes of every supported architecture, at two layers."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from surgeon.axes import Axes, analyse, to_text
from surgeon.axes.producers import producers
from surgeon.capture.model import capture_model
from surgeon.ir import Program, parse
from surgeon.ir import to_text as ir_text
from surgeon.ir.verify import verify
from tests import golden, models

pytestmark = pytest.mark.zoo
every = pytest.mark.parametrize("name", models.ARCHITECTURES)


@cache
def program_of(name: str) -> Program:
    return capture_model(models.tiny(name)).program


@cache
def axes_of(name: str) -> Axes:
    return analyse(program_of(name))


@every
def test_axes_are_the_golden_ones(name: str):
    golden.compare(f"axes/{name}.txt", to_text(axes_of(name)))


@every
def test_axes_are_those_recorded_independently(name: str):
    found = [(a.size, frozenset(axes_of(name).carriers(a))) for a in axes_of(name).axes]
    recorded = [
        (axis["size"], frozenset((param, dim) for param, dim in axis["members"]))
        for axis in models.RECORDED[name]["axes"]
    ]
    assert set(found) == set(recorded)
    assert len(found) == len(set(found)) and len(recorded) == len(set(recorded))


@every
def test_nothing_is_pinned_for_want_of_a_rule(name: str):
    axes = axes_of(name)
    assert {pin.why for axis in axes.axes for pin in axis.pins} <= {
        "rows are picked by numbers that come from data",
        *(f"it is dimension 2 of the model's output {out}" for out in axes.program.outputs),
    }
    for role in ("hidden", "kv_heads", "v", "ffn"):
        assert axes.of_role(role) and all(a.prunable for a in axes.of_role(role)), role
    assert axes.of_role("qk") and all(a.prunable for a in axes.of_role("qk"))
    assert sorted(b.kind for b in axes.branches) == ["attention"] * 2 + ["mlp"] * 2


@every
def test_every_name_is_unique_and_every_expression_has_its_size(name: str):
    axes = axes_of(name)
    assert len(axes.by_name) == len(axes.axes)
    for p in axes.program.params:
        for expr, size in zip(axes.param_dims(p.name), p.type.shape, strict=True):
            assert _size(axes, expr) == size


def _size(axes: Axes, expr: Any) -> int:
    total = 1
    for factor in expr:
        if isinstance(factor, int):
            size = axes.sizes[factor]
            assert isinstance(size, int)
            total *= size
        else:
            total *= sum(_size(axes, part) for part in factor.parts)
    return total


@every
def test_every_operation_has_a_module_and_a_line(name: str):
    model, program = models.tiny(name), program_of(name)
    assert verify(parse(ir_text(program))) == program
    modules = dict(model.named_modules())
    for op in program.ops:
        file, line = op.source.split(":")
        assert file.endswith(".py") and int(line) > 0 and op.module in modules, op
    # Only what the whole model does to its logits lies in no module of its own.
    after = [op for op in program.ops if not op.module]
    assert after == list(program.ops[len(program.ops) - len(after) :]) and len(after) < 4


@every
def test_parameters_keep_their_names_and_order(name: str):
    model, program = models.tiny(name), program_of(name)
    stored = [(p.name, p.type.shape) for p in program.params if p.kind == "parameter"]
    assert stored == [(n, tuple(t.shape)) for n, t in model.named_parameters()]


@cache
def axes_as_it_is(name: str) -> Axes:
    """The axes where attention is spelled out as the model's own code does."""
    program = capture_model(models.tiny(name), attention=False).program
    assert not any(op.target == "surgeon.attention" for op in program.ops)
    return analyse(program)


@every
def test_both_ways_of_capture_give_the_same_axes(name: str):
    def seen(axes: Axes) -> set[Any]:
        return {
            (a.size, frozenset(a.members), a.prunable, a.exact, a.gauge, len(a.outer))
            for a in axes.axes
        }

    left, right = seen(axes_of(name)), seen(axes_as_it_is(name))
    assert left == right, left ^ right


# Gemma 2's soft-capped scores can't be given to torch's own attention: it multiplies matrices.
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_both_ways_of_capture_give_the_same_names(name: str):
    left, right = axes_of(name), axes_as_it_is(name)
    assert [(a.name, a.role, a.outer) for a in left.axes] == [
        (a.name, a.role, a.outer) for a in right.axes
    ]
    for p in left.program.params:
        for one, other in zip(left.param_dims(p.name), right.param_dims(p.name), strict=True):
            assert left.text(one) == right.text(other)


@pytest.mark.parametrize(
    "name", ["Llama", "Qwen3", "Gemma2", "Gemma3Text", "GPT2", "Phi", "OPT", "SmolLM3"]
)
def test_repeating_layers_gives_what_capturing_all_gives(name: str):
    model = models.tiny(name, **_layers(name, 4))
    short = capture_model(model).program
    assert ir_text(short) == ir_text(capture_model(model, repeat=False).program)


def _layers(name: str, count: int) -> dict[str, int]:
    return {"n_layer" if name == "GPT2" else "num_hidden_layers": count}


def test_layers_scaled_by_their_own_number_are_all_captured(monkeypatch: pytest.MonkeyPatch):
    from surgeon.capture import model as capture

    real, repeated = capture.expand, []
    monkeypatch.setattr(capture, "expand", lambda *a: repeated.append(a) or real(*a))
    model = models.tiny("GPT2", n_layer=4, scale_attn_by_inverse_layer_idx=True)
    program = capture_model(model).program
    assert not repeated
    scales = [op.kwarg("scale") for op in program.ops if op.target == "surgeon.attention"]
    base = scales[0]
    assert isinstance(base, float)
    assert scales == pytest.approx([base / (i + 1) for i in range(4)])
    assert ir_text(program) == ir_text(capture_model(model, repeat=False).program)


def test_parts_of_a_fused_producer_may_differ_in_width():
    axes = axes_of("Phi3")
    (fused,) = producers(axes, axes.of_role("kv_heads")[0])
    # Of each of three heads: two query heads, a key and a value, of eight channels.
    queries, keys, values = (np.arange(n).reshape(3, -1) for n in (48, 24, 24))
    assert np.array_equal(fused.groups, np.hstack([queries, 48 + keys, 72 + values]))
