"""Capture of Transformers models. What needs several architectures is in the zoo."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from surgeon.capture import model as capture
from surgeon.capture.model import capture_model, on_meta
from surgeon.capture.repeat import IN, OUT, SKIP, find_layers
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program, parse, to_text, verify
from tests import golden

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tiny) -> Program:
    return capture_model(tiny("Llama")).program


def test_without_open_sizes_it_is_the_same_program(llama: Program):
    from tests.models import tiny

    fixed = capture_model(tiny("Llama"), dynamic=False).program
    assert fixed.params == llama.params and not fixed.symbols
    assert [op.target for op in fixed.ops] == [op.target for op in llama.ops]
    assert [op.kwargs for op in fixed.ops] == [op.kwargs for op in llama.ops]


def test_the_inputs_are_dynamic_in_batch_and_sequence(llama: Program):
    assert llama.symbols == ("batch", "seq")
    assert [(i.name, i.type.dtype, i.type.shape) for i in llama.inputs] == [
        ("input_ids", "i64", ("batch", "seq")),
        ("attention_mask", "i64", ("batch", "seq")),
        ("position_ids", "i64", ("batch", "seq")),
    ]
    (logits,) = llama.outputs
    assert llama.types[logits].shape == ("batch", "seq", 101)


def test_the_program_is_the_golden_one(llama: Program):
    """Without line numbers, which belong to a version of Transformers."""
    golden.compare("ir/Llama.txt", golden.without_lines(to_text(llama)))


def test_it_survives_print_and_parse_and_is_well_formed(llama: Program):
    assert parse(to_text(llama)) == llama and verify(llama) is llama


def test_attention_is_one_operation_without_mask_arithmetic(llama: Program):
    targets = [op.target for op in llama.ops]
    assert targets.count("surgeon.attention") == 2
    assert not {"aten.arange.default", "aten.le.Tensor", "aten.index.Tensor"} & set(targets)
    first = next(op for op in llama.ops if op.target == "surgeon.attention")
    assert first.kwarg("causal") is True and first.kwarg("scale") == 8**-0.5


def test_nested_graphs_are_inlined(llama: Program):
    assert not any("wrap" in op.target for op in llama.ops)
    rotary = [op.target for op in llama.ops if op.module == "model.rotary_emb"]
    assert "aten.cos.default" in rotary and "aten.sin.default" in rotary


def test_every_operation_has_a_module_and_a_line(llama: Program):
    import transformers.models.llama.modeling_llama as modeling

    lines = Path(modeling.__file__).read_text().splitlines()
    for op in llama.ops:
        assert op.module, op
        file, line = op.source.split(":")
        assert file in ("modeling_llama.py", "activations.py") and int(line) > 0
        if op.target == "aten.silu.default":
            assert op.module.endswith(".mlp.act_fn")
        if op.target == "aten.linear.default" and "gate_proj" in op.module:
            assert "self.gate_proj(x)" in lines[int(line) - 1]


def test_parameters_have_the_models_own_names_and_order(tiny, llama: Program):
    model = tiny("Llama")
    stored = [p for p in llama.params if p.kind == "parameter"]
    assert [p.name for p in stored] == [n for n, _ in model.named_parameters()]
    assert [p.type.shape for p in stored] == [tuple(t.shape) for t in model.parameters()]
    # No checkpoint stores the rotary frequencies.
    assert [p.name for p in llama.params if p.kind == "computed"] == ["model.rotary_emb.inv_freq"]


def test_a_tied_head_is_one_parameter_with_two_uses(tiny):
    program = capture_model(tiny("Llama", tie_word_embeddings=True, num_hidden_layers=1)).program
    (embedding,) = (p for p in program.params if p.aliases)
    assert (embedding.name, embedding.aliases) == ("model.embed_tokens.weight", ("lm_head.weight",))
    assert "lm_head.weight" not in program.param
    assert [program.ops[i].target for i in program.readers[embedding.name]] == [
        "aten.embedding.default",
        "aten.linear.default",
    ]


def state(model: Any) -> Any:
    return {
        "tensors": {k: (id(v), v.device.type) for k, v in model.state_dict(keep_vars=True).items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attention": model.config._attn_implementation,
        "modes": {n: m.training for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        "layer_idx": [layer.self_attn.layer_idx for layer in model.model.layers],
    }


def test_the_model_is_left_as_it_was():
    from tests import models

    model = models.build("Llama", num_hidden_layers=3).train()
    values = {k: v.clone() for k, v in model.state_dict().items()}
    before = state(model)
    capture_model(model)
    assert state(model) == before
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


# --- repetition ---------------------------------------------------------------------------


def traced(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> tuple[Program, list[Program]]:
    """The program of a model, and what was traced before it was repeated."""
    seen: list[Program] = []
    real = capture.expand

    def expand(program: Program, *args: Any) -> Program | None:
        seen.append(program)
        return real(program, *args)

    monkeypatch.setattr(capture, "expand", expand)
    return capture_model(model).program, seen


def count(program: Program, target: str) -> int:
    return sum(op.target == target for op in program.ops)


def test_of_eighty_layers_one_is_traced(monkeypatch, tiny, llama: Program):
    from tests import models

    with torch.device("meta"):
        model = LlamaForCausalLM(models.config("Llama", num_hidden_layers=80))
    program, seen = traced(monkeypatch, model)
    (short,) = seen
    assert [count(short, target) for target in (IN, OUT, SKIP)] == [1, 1, 79]
    assert len(short.ops) < len(llama.ops) + 80
    assert count(program, "surgeon.attention") == 80
    assert count(program, IN) == count(program, OUT) == count(program, SKIP) == 0
    a_layer = (len(program.ops) - len(llama.ops)) / 78
    assert a_layer == sum(op.module.startswith("model.layers.0") for op in llama.ops)


@pytest.mark.zoo
def test_repeating_gives_what_capturing_everything_gives(tiny, monkeypatch):
    model = tiny("Llama", num_hidden_layers=4)
    program, seen = traced(monkeypatch, model)
    assert count(seen[0], SKIP) == 3
    assert to_text(program) == to_text(capture_model(model, repeat=False).program)
    assert len(seen) == 1  # the second time nothing was repeated


def kinds(model: nn.Module) -> list[int]:
    """For every layer, the place of the layer that is traced for it."""
    layers, _ = find_layers(on_meta(model))
    return [int(layers.representative[path].rsplit(".", 1)[1]) for path in layers.paths]


def test_layers_of_one_class_and_shape_are_of_one_kind(tiny):
    assert kinds(tiny("Llama", num_hidden_layers=4)) == [0, 0, 0, 0]
    assert kinds(tiny("Gemma2", num_hidden_layers=4)) == [0, 1, 0, 1]


def layers_of(model: nn.Module, change: Any) -> list[int]:
    meta = on_meta(model)
    change(meta.model.layers)
    layers, _ = find_layers(meta)
    return [int(layers.representative[path].rsplit(".", 1)[1]) for path in layers.paths]


def test_what_tells_layers_apart(tiny):
    model = tiny("Llama", num_hidden_layers=4)

    def other_eps(layers: Any) -> None:
        layers[2].input_layernorm.variance_epsilon = 0.2

    def other_width(layers: Any) -> None:
        with torch.device("meta"):
            layers[1].mlp.down_proj = nn.Linear(79, 48, bias=False)

    def other_class(layers: Any) -> None:
        layers[3].mlp.act_fn = nn.GELU()

    def nested(layers: Any) -> None:
        for i, layer in enumerate(layers):
            layer.settings = {"bands": [1, (2, float(i // 2))]}

    def bias(layers: Any) -> None:
        with torch.device("meta"):
            layers[1].self_attn.q_proj = nn.Linear(48, 48, bias=True)

    assert layers_of(model, lambda layers: None) == [0, 0, 0, 0]
    assert layers_of(model, other_eps) == [0, 0, 2, 0]
    assert layers_of(model, other_width) == [0, 1, 0, 0]
    assert layers_of(model, other_class) == [0, 0, 0, 3]
    assert layers_of(model, nested) == [0, 0, 2, 2]
    assert layers_of(model, bias) == [0, 1, 0, 0]


class Scaled(LlamaForCausalLM):
    """Every layer's MLP is divided by the layer's own number, which tracing has to notice."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.model.layers):
            layer.mlp.number = i
            layer.mlp.forward = _divided.__get__(layer.mlp)


def _divided(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) / (self.number + 1)


@pytest.mark.zoo
def test_a_layer_that_computes_with_its_own_number_is_not_repeated():
    from tests import models

    model = Scaled(models.config("Llama", num_hidden_layers=3))
    program = capture_model(model).program
    factors = [op.arg(1) for op in program.ops if op.target == "aten.div.Tensor"]
    assert factors == [1, 2, 3]
    assert to_text(program) == to_text(capture_model(model, repeat=False).program)


# --- refusals and guards ------------------------------------------------------------------

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_a_rope_that_depends_on_the_data_is_traced_with_a_guard(rope):
    from tests import models

    model = models.build("Llama", num_hidden_layers=1, rope_parameters=rope)
    program = capture_model(model).program
    (guard,) = program.guards
    assert guard.startswith("model.rotary_emb: rope type " + rope["rope_type"])
    # Longer inputs get other tables, from where each of the two rope types says.
    limit = rope.get("original_max_position_embeddings", 64)
    assert guard.endswith(f"below {limit}")
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 101)


@pytest.mark.parametrize("rope", [DYNAMIC, LONG], ids=["dynamic", "longrope"])
def test_a_rope_behind_a_forward_of_its_own_is_traced_alike(rope: dict[str, Any]):
    """As in a class that a checkpoint brings, which calls Transformers' own by `super()`."""
    from tests import models

    model = models.build("Llama", num_hidden_layers=1, rope_parameters=rope)
    plain = capture_model(model).program
    changed = capture_model(Behind(model.config)).program
    assert changed.guards == plain.guards and len(plain.guards) == 1
    assert [op.target for op in changed.ops] == [op.target for op in plain.ops]
    inside = Behind(model.config)
    own = type(inside.model.rotary_emb)
    capture_model(inside)
    assert type(inside.model.rotary_emb) is own is OwnRotary


class OwnRotary(LlamaRotaryEmbedding):
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        cos, sin = super().forward(x, position_ids)
        return cos, sin


class Behind(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.rotary_emb = OwnRotary(config)


def test_a_plain_rope_needs_no_guard(llama: Program):
    assert llama.guards == ()


class Branching(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids.sum() > 3:
            input_ids = input_ids + 1
        return super().forward(input_ids=input_ids, **kwargs)


class Broken(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        raise ValueError("out of order")


class Recurrent(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
        for i in range(1, input_ids.shape[1]):
            input_ids = input_ids + input_ids[:, i - 1 : i]
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize(
    "cls, code, words",
    [
        (Recurrent, Code.CAPTURE_FAILED, "texts of one length only"),
        (Branching, Code.DATA_DEPENDENT, "data"),
        (Broken, Code.CAPTURE_FAILED, "ValueError: out of order"),
    ],
)
def test_a_model_that_cannot_be_traced_is_refused_in_four_parts(cls, code, words):
    from tests import models

    with pytest.raises(SurgeonError) as caught:
        capture_model(cls(models.config("Llama", num_hidden_layers=1)))
    error = caught.value
    assert error.code is code and error.at == cls.__name__
    assert words in error.why and error.what and error.try_


@pytest.mark.parametrize("module", [nn.Linear(2, 3), nn.Sequential()])
def test_a_module_without_a_configuration_is_no_model(module):
    with pytest.raises(SurgeonError) as caught:
        capture_model(module)
    assert caught.value.code is Code.NOT_A_MODEL
