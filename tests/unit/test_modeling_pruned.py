"""The modelling file shipped with pruned checkpoints: removed must equal masked."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from surgeon.emit import modeling_surgeon_pruned as pruned_file
from tests.pruned_checkpoints import (
    FAMILIES,
    HIDDEN,
    ROPES,
    VOCAB,
    WHOLE,
    WIDTHS,
    Cut,
    D,
    config_json,
    dense,
    masked,
    write,
)

pytestmark = pytest.mark.slow


def load(folder: Path, attention: str = "sdpa") -> Any:
    model, info = pruned_file.SurgeonPrunedForCausalLM.from_pretrained(
        folder, attn_implementation=attention, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def both(tmp_path: Path, model: Any, cut: Cut, attention: str = "sdpa") -> tuple[Any, Any]:
    """Returns the dense model, masked, and the pruned one, loaded from its files."""
    removed = load(write(tmp_path / "pruned", model, cut), attention)
    model.set_attn_implementation(attention)
    return masked(model, cut), removed


def batch(side: str, length: int = 12) -> dict[str, torch.Tensor]:
    """Returns three rows of ids, two of them padded, with what `generate` would add."""
    ids = torch.randint(1, VOCAB, (3, length), generator=torch.Generator().manual_seed(7))
    mask = torch.ones_like(ids)
    for row, padding in ((1, 3), (2, 6)):
        where = slice(0, padding) if side == "left" else slice(length - padding, length)
        ids[row, where], mask[row, where] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> torch.Tensor:
    """Returns the logits at the positions that are not padding."""
    return model(**inputs, **kwargs).logits[inputs["attention_mask"].bool()]


@torch.no_grad()
def in_chunks(
    model: Any, inputs: dict[str, torch.Tensor], sizes: list[int], cache: Any
) -> torch.Tensor:
    """Returns the same logits, computed piece by piece with a cache."""
    pieces: list[torch.Tensor] = []
    start = 0
    for size in sizes:
        end = start + size
        out = model(
            input_ids=inputs["input_ids"][:, start:end],
            position_ids=inputs["position_ids"][:, start:end],
            attention_mask=inputs["attention_mask"][:, :end],
            past_key_values=cache,
            use_cache=True,
        )
        pieces.append(out.logits)
        cache, start = out.past_key_values, end
    return torch.cat(pieces, 1)[inputs["attention_mask"].bool()]


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert got.isfinite().all()
    error = (got - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


def generated(model: Any, inputs: dict[str, torch.Tensor], **kwargs: Any) -> list[list[int]]:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**given, do_sample=False, max_new_tokens=8, **kwargs).tolist()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_unpruned_equals_the_source(tmp_path: Path, family: str, tied: bool) -> None:
    source, model = both(tmp_path, dense(family, tied), Cut((WHOLE,) * 3))
    assert sorted(model.state_dict()) == sorted(source.state_dict())
    for attention in ("sdpa", "eager"):
        for each in (source, model):
            each.set_attn_implementation(attention)
        for side in ("left", "right"):
            inputs = batch(side)
            close(logits(model, inputs), logits(source, inputs))
        assert generated(model, batch("left")) == generated(source, batch("left"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_widths_by_layer(tmp_path: Path, family: str, tied: bool, attention: str) -> None:
    cut = Cut(WIDTHS, pairs=(0, 2, 3), hidden=tuple(i for i in range(HIDDEN) if i % 5))
    source, model = both(tmp_path, dense(family, tied), cut, attention)
    for side in ("left", "right"):
        inputs = batch(side)
        close(logits(model, inputs), logits(source, inputs))
        close(in_chunks(model, inputs, [5, 4, 1, 1, 1], None), logits(source, inputs))
    assert generated(model, batch("left")) == generated(source, batch("left"))


@pytest.mark.parametrize("name", ROPES)
def test_rotary_pairs_of_every_rope_type(tmp_path: Path, name: str) -> None:
    """Beyond the original length, and back below it."""
    rope = {"rope_theta": 100.0, **ROPES[name]}
    length = 8 if name == "dynamic" else 32
    source = dense("llama", rope_parameters=rope, max_position_embeddings=length)
    # Heads differ, too: Transformers' validation of longrope must not trip over that.
    cut = Cut((WIDTHS[0], WHOLE, WHOLE), pairs=(1, 3))
    source, model = both(tmp_path, source, cut)
    del model.config.auto_map
    model.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    for inputs in (batch("left", 6), batch("left", 20), batch("left", 14), batch("left", 5)):
        close(logits(model, inputs), logits(source, inputs))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_missing_branches(tmp_path: Path, family: str, attention: str) -> None:
    """The first layer has no keys, so that a cache's first slot must not be its."""
    layers = (
        replace(WHOLE, skip=("attention",)),
        replace(WIDTHS[0], skip=("mlp",)),
        None,
        WIDTHS[2],
        replace(WHOLE, skip=("attention", "mlp")),
    )
    source, model = both(tmp_path, dense(family, layers=5), Cut(layers), attention)
    inputs = batch("left")
    expected = logits(source, inputs)
    close(logits(model, inputs), expected)
    for sizes in ([7, 5], [1] * 12, [4, 1, 4, 3]):
        close(in_chunks(model, inputs, sizes, None), expected)
        close(in_chunks(model, inputs, sizes, DynamicCache()), expected)
        close(in_chunks(model, inputs, sizes, DynamicCache(config=model.config)), expected)
        static = StaticCache(config=model.config, max_cache_len=20)
        close(in_chunks(model, inputs, sizes, static), expected)
    slots = model.config.get_text_config(decoder=True).per_layer_config
    assert [slot.num_key_value_heads for slot in slots] == [2, 3]
    assert len(DynamicCache(config=model.config).layers) == 2
    assert generated(model, inputs) == generated(source, inputs)
    assert generated(model, inputs, num_beams=2) == generated(source, inputs, num_beams=2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_sliding_window(tmp_path: Path, family: str, attention: str) -> None:
    """Full and sliding layers alternate, and the cache's slots follow the layers that are left."""
    changes: dict[str, Any] = {"sliding_window": 4}
    if family != "mistral":
        types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
        changes |= {"use_sliding_window": True, "layer_types": types}
    layers = (replace(WHOLE, skip=("attention",)), WIDTHS[0], WIDTHS[2], WHOLE)
    source = dense(family, layers=4, **changes)
    source, model = both(tmp_path, source, Cut(layers), attention)
    inputs = batch("left")
    expected = logits(source, inputs)
    close(logits(model, inputs), expected)
    windows = [getattr(x, "sliding_window", None) for x in DynamicCache(config=model.config).layers]
    assert windows == ([4, 4, 4] if family == "mistral" else [4, None, 4])
    for sizes in ([7, 5], [1] * 12, [3, 1, 6, 2]):
        close(in_chunks(model, inputs, sizes, None), expected)
        close(in_chunks(model, inputs, sizes, DynamicCache()), expected)
        static = StaticCache(config=model.config, max_cache_len=20)
        close(in_chunks(model, inputs, sizes, static), expected)
    assert generated(model, inputs) == generated(source, inputs)


def test_a_model_without_any_attention_generates(tmp_path: Path) -> None:
    cut = Cut((replace(WHOLE, skip=("attention",)),) * 3)
    source, model = both(tmp_path, dense("llama"), cut)
    inputs = batch("left")
    close(logits(model, inputs), logits(source, inputs))
    close(in_chunks(model, inputs, [5, 7], None), logits(source, inputs))
    assert generated(model, inputs) == generated(source, inputs)


def test_generation_with_a_static_cache(tmp_path: Path) -> None:
    cut = Cut((replace(WHOLE, skip=("attention",)), *WIDTHS[:2]), pairs=(0, 1, 3))
    source, model = both(tmp_path, dense("qwen3"), cut)
    options = {"cache_implementation": "static", "disable_compile": True}
    assert generated(model, batch("left"), **options) == generated(source, batch("left"))
    assert model._get_static_cache_init_shape() is None


def test_training_and_outputs(tmp_path: Path) -> None:
    layers = (replace(WHOLE, skip=("attention",)), WIDTHS[0], replace(WHOLE, skip=("mlp",)))
    source, model = both(tmp_path, dense("llama", tied=True), Cut(layers), "eager")
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    losses = [each(**inputs, labels=labels).loss for each in (source, model)]
    close(losses[1], losses[0])
    plain = torch.autograd.grad(losses[1], model.model.embed_tokens.weight)[0]
    model.gradient_checkpointing_enable()
    model.train()
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    close(model.model.embed_tokens.weight.grad, plain)
    model.eval()
    whole = model(**inputs, output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(whole.hidden_states) == 4
    assert len(whole.attentions) == 2
    assert whole.past_key_values is None
    close(model(**inputs, logits_to_keep=2).logits, whole.logits[:, -2:])
    unpadded = inputs["input_ids"][:1]
    cached = model(unpadded[:, :7], use_cache=True).past_key_values
    close(model(unpadded[:, 7:], past_key_values=cached).logits, whole.logits[:1, 7:])
    embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
    close(model(inputs_embeds=embedded, **inputs).logits, whole.logits)
    for each in (source, model):  # what assisted generation with an early exit does
        each.config.num_hidden_layers = 2
    close(logits(model, batch("right")), logits(source, batch("right")))


def test_attention_implementations(tmp_path: Path) -> None:
    source, model = both(tmp_path, dense("llama"), Cut(WIDTHS))
    calls: list[tuple[int, int, float]] = []

    def recording(module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        calls.append((k.shape[-1], v.shape[-1], kwargs["scaling"]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("recording", recording)
    model.set_attn_implementation("recording")
    model(torch.ones(1, 3, dtype=torch.long))
    assert calls == [(8, 3, D**-0.5), (8, 8, D**-0.5), (8, 5, D**-0.5)]
    assert not model._supports_flash_attn
    assert load(write(tmp_path / "equal", source, Cut((WHOLE,) * 3)))._supports_flash_attn


SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.split(".")[0] == "surgeon" for name in sys.modules)
try:
    import surgeon
    raise SystemExit("surgeon is importable")
except ImportError:
    pass
first, second, answers = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(first, trust_remote_code=True, dtype="auto").eval()
model.save_pretrained(second)
again = AutoModelForCausalLM.from_pretrained(second, trust_remote_code=True, dtype="auto").eval()
ids = torch.arange(1, 13)[None]
assert torch.equal(model(ids).logits, again(ids).logits)
tokens = again.generate(ids, do_sample=False, max_new_tokens=4)
torch.save({"logits": again(ids).logits, "tokens": tokens, "dtype": again.dtype}, answers)
"""


WITHOUT_SURGEON = """
import sys
from pathlib import Path
sys.path[:] = [p for p in sys.path if not (Path(p) / "surgeon").exists()]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
"""


def test_the_file_stands_alone(tmp_path: Path) -> None:
    """Loaded, saved and loaded again where Surgeon isn't installed."""
    dtype = torch.bfloat16
    layers = (replace(WHOLE, skip=("attention",)), *WIDTHS[:2])
    source = dense("qwen3", tied=True).to(dtype)
    source.config.dtype = dtype
    first = write(tmp_path / "first", source, Cut(layers, pairs=(0, 2)))
    second, answers = tmp_path / "second", tmp_path / "answers.pt"
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        # -I keeps the working folder and user packages off the path; the editable install puts
        # Surgeon on it again, hence the filter
        [sys.executable, "-I", "-c", WITHOUT_SURGEON + SCRIPT, first, second, answers],
        cwd=tmp_path,
        env={**inherited, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        check=True,
    )
    found = torch.load(answers)
    model = load(first)
    ids = torch.arange(1, 13)[None]
    assert model.dtype == found["dtype"] == dtype
    assert torch.equal(found["logits"], model(ids).logits)
    assert (
        found["tokens"].tolist() == model.generate(ids, do_sample=False, max_new_tokens=4).tolist()
    )
    written = json.loads((second / "config.json").read_text())
    original = json.loads((first / "config.json").read_text())
    for key in ("auto_map", "layer_types", "rotary_pairs", "attention_scaling", "model_type"):
        assert written[key] == original[key]
    code = "modeling_surgeon_pruned.py"
    assert (second / code).read_bytes() == Path(pruned_file.__file__).read_bytes()
    with safe_open(second / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_model_type": "gemma"}, "source_model_type 'gemma'"),
        ({"layer_types": ["full_attention"]}, "layer_types must hold"),
        ({"layer_types": ["sliding_attention"] * 3}, "need a sliding_window"),
        ({"rotary_pairs": [0, 2]}, "head_dim of layer 0"),
        ({"rotary_pairs": [3, 1], "head_dim": 4}, "must ascend"),
        ({"rotary_pairs": [0, 4], "head_dim": 4}, "must ascend"),
        ({"per_layer_config": {"1": {"num_key_value_heads": 4}}}, "query heads of layer 1"),
        ({"per_layer_config": {"1": {"sliding_window": 8}}}, "'sliding_window'] cannot differ"),
        ({"per_layer_config": {"1": {"hidden_size": 8}}}, "'hidden_size'] cannot differ"),
        ({"per_layer_config": {"2": {"skip": ["ffn"]}}}, "layer 2 skips ['ffn']"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], words: str) -> None:
    config = config_json(dense("llama"), Cut((WHOLE,) * 3))
    pruned_file.SurgeonPrunedConfig(**config)
    with pytest.raises(ValueError, match=re.escape(words)):
        pruned_file.SurgeonPrunedConfig(**{**config, **change})


def test_the_scaling_must_be_given() -> None:
    config = config_json(dense("llama"), Cut((WHOLE,) * 3))
    del config["attention_scaling"]
    with pytest.raises(TypeError, match="attention_scaling"):
        pruned_file.SurgeonPrunedConfig(**config)
