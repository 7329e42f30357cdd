"""Results for runtimes with classes of their own: what is written, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from surgeon.axes.plan import Plan
from surgeon.capture.weights import SafetensorsWeights
from surgeon.emit.gguf_target import halved, interleaved
from surgeon.errors import Code, SurgeonError
from surgeon.exporting import export
from tests import models

pytestmark = pytest.mark.slow

IDS = torch.tensor([[5, 40, 9, 77, 23, 6, 31, 12]])


@pytest.fixture(scope="module")
def opened() -> Any:
    return surgeon.open_model(models.tiny("Llama"))


def prune(opened: Any, target: str, **asked: Any) -> Any:
    return surgeon.prune(opened, recipe="fast", target=target, verify=False, **asked)


def per_layer(opened: Any, target: str, *gone: str) -> Any:
    """Half of the first layer's MLP and one of its key/value heads go, and branches."""
    shares = {"ffn": 0.5, "kv_heads": 1 / 3}
    plan = prune(opened, "transformers", roles=shares, only=["model.layers.0"]).plan
    names = [b.name for b in opened.axes.branches if (b.layer[-1] + b.kind) in gone]
    plan = replace(plan, branches=tuple(names))
    return surgeon.prune(opened, plan=plan, target=target, verify=False)


@pytest.fixture(scope="module")
def uniform(opened: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is alike in every layer, for both targets: the hidden width goes as well."""
    shares = {"ffn": 0.5, "kv_heads": 1 / 3, "hidden": 0.25}
    folder = tmp_path_factory.mktemp("formats") / "uniform"
    prune(opened, "gguf,vllm", roles=shares).save(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(opened: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same numbers of heads; another MLP in the first layer, no attention in the second."""
    folder = tmp_path_factory.mktemp("formats") / "mixed"
    per_layer(opened, "vllm,gguf", "1attention").save(folder)
    return folder


def fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {key: field.contents() for key, field in GGUFReader(file).fields.items()}


def refused(code: Code, run: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as found:
        run()
    assert found.value.code is code
    return found.value


# --- GGUF ----------------------------------------------------------------------------------------


def test_rows_of_a_rotary_pair_become_neighbours_and_come_back() -> None:
    rows = torch.arange(12).reshape(12, 1)  # two heads of six: pairs (0, 3), (1, 4), (2, 5)
    assert interleaved(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(halved(interleaved(rows, 2), 2), rows)


def test_layers_that_are_alike_are_a_llama_that_another_reader_finds_the_same(
    opened: Any, uniform: Path
) -> None:
    found = fields(uniform / "gguf" / "model.gguf")
    assert found["general.architecture"] == "llama"
    assert (found["llama.attention.head_count"], found["llama.attention.head_count_kv"]) == (4, 2)
    assert (found["llama.feed_forward_length"], found["llama.embedding_length"]) == (40, 36)
    # Transformers' own GGUF reader knows nothing of us, and averages over what is there.
    plan, rewrites = _plan(uniform)
    again = surgeon.open_model(uniform / "gguf" / "model.gguf")
    theirs = surgeon.prune(again, plan=Plan(), verify=False).model
    ours = surgeon.prune(opened, plan=plan, rewrites=rewrites, verify=False).model
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=1e-4)


def _plan(folder: Path) -> tuple[Plan, Any]:
    from surgeon.saving import read_plan

    return read_plan(folder)


def test_layers_that_differ_are_a_deci_with_arrays(mixed: Path) -> None:
    found = fields(mixed / "gguf" / "model.gguf")
    assert found["general.architecture"] == "deci"
    assert found["deci.feed_forward_length"] == [40, 80]
    assert found["deci.attention.head_count"] == [4, 0]
    assert found["deci.attention.head_count_kv"] == [2, 0]
    assert found["deci.attention.key_length"] == found["deci.rope.dimension_count"] == 8


def test_attention_without_an_mlp_after_it_is_refused_with_the_layer(opened: Any) -> None:
    error = refused(Code.TARGET_REFUSED, lambda: per_layer(opened, "gguf", "1mlp"))
    assert "target gguf" in error.what and error.at == "model.layers.1"
    assert "passed over" in error.why and "--role layers" in error.try_


@pytest.mark.parametrize("target", ["gguf", "vllm"])
def test_a_first_layer_without_attention_is_refused(opened: Any, target: str) -> None:
    error = refused(Code.TARGET_REFUSED, lambda: per_layer(opened, target, "0attention"))
    assert f"target {target}" in error.what and "model.layers.0" in error.at


def test_heads_that_are_narrower_alike_keep_their_frequencies_and_their_scale(
    opened: Any, tmp_path: Path
) -> None:
    made = prune(opened, "gguf", roles={"rotary": 0.5, "v": 0.5})
    made.save(tmp_path / "o")  # compares what the tensors mean with the masked model
    from gguf import GGUFReader

    reader = GGUFReader(tmp_path / "o" / "model.gguf")
    held = {tensor.name: tensor for tensor in reader.tensors}
    cut = next(c for c in made.plan.cuts if opened.axes.by_name[c.axis].role == "rotary")
    kept = torch.tensor(cut.kept, dtype=torch.float64)
    wanted = 10000.0 ** (kept / 4)  # of four pairs, those that stayed
    natural = 10000.0 ** (-torch.arange(2, dtype=torch.float64) / 2)
    factors = torch.from_numpy(held["rope_freqs.weight"].data.copy()).double()
    torch.testing.assert_close(factors, natural * wanted, rtol=1e-5, atol=0)
    assert held["blk.0.attn_q.weight"].shape.tolist() == [48, 24]


def test_values_alone_can_t_be_narrower(opened: Any) -> None:
    error = refused(Code.TARGET_REFUSED, lambda: prune(opened, "gguf", roles={"v": 0.5}))
    assert "--role v" in error.why and "--role rotary" in error.why


def test_a_file_may_be_packed_and_says_what_is_not(opened: Any, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    whole = export(opened, "gguf", file, quantize="q8_0")
    # A row of 48 is not whole blocks of 32.
    assert whole.target["dtype"] == "f16" and not whole.notes[1:]
    assert export(opened, "gguf", tmp_path / "h.gguf", dtype="bf16").target["dtype"] == "bf16"
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["h.gguf", "m.gguf"]


def test_other_types_are_refused_with_those_that_there_are(opened: Any, tmp_path: Path) -> None:
    run = lambda: export(opened, "gguf", tmp_path / "m.gguf", quantize="int4")  # noqa: E731
    assert refused(Code.BAD_OPTION, run).try_ == "--quantize q8_0"
    run = lambda: export(opened, "vllm", tmp_path / "m", dtype="fp16")  # noqa: E731
    assert "--dtype" in refused(Code.BAD_OPTION, run).what


def test_qwen_has_architectures_of_its_own_where_they_can_say_it(tmp_path: Path) -> None:
    three = surgeon.open_model(models.tiny("Qwen3"))
    assert export(three, "gguf", tmp_path / "3.gguf").target["architecture"] == "qwen3"
    error = refused(Code.TARGET_REFUSED, lambda: prune(three, "vllm", roles={"ffn": 0.5}))
    assert "normalise queries and keys" in error.why
    two = surgeon.open_model(models.tiny("Qwen2"))
    square = two.source.config.num_attention_heads * 8 == two.source.config.hidden_size
    wanted = "qwen2" if square else "llama"
    assert export(two, "gguf", tmp_path / "2.gguf").target["architecture"] == wanted
    made = prune(two, "gguf", roles={"kv_heads": 0.5})
    assert made.save(tmp_path / "o").target["architecture"] == "llama"  # with biases, rows turned


# --- vLLM ----------------------------------------------------------------------------------------


def vllm_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """The parameters that vLLM's DeciLMForCausalLM makes of a configuration, by its own rules."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    out = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (config.vocab_size, hidden)
    for i in range(config.num_hidden_layers):
        block, at = config.block_configs[i], f"model.layers.{i}."
        if not block.attention.no_op:
            kv = heads // block.attention.n_heads_in_group
            out[at + "input_layernorm.weight"] = (hidden,)
            out[at + "self_attn.q_proj.weight"] = (heads * head, hidden)
            out[at + "self_attn.k_proj.weight"] = (kv * head, hidden)
            out[at + "self_attn.v_proj.weight"] = (kv * head, hidden)
            out[at + "self_attn.o_proj.weight"] = (hidden, heads * head)
        if not block.ffn.no_op:
            assert not hasattr(block.ffn, "ffn_mult")  # it would be read in place of the width
            width = block.ffn.intermediate_size
            out[at + "post_attention_layernorm.weight"] = (hidden,)
            for name in ("gate_proj", "up_proj"):
                out[f"{at}mlp.{name}.weight"] = (width, hidden)
            out[at + "mlp.down_proj.weight"] = (hidden, width)
    return out


@pytest.mark.parametrize("which", ["uniform", "mixed"])
def test_the_tensors_are_those_that_vllm_s_class_makes(
    which: str, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoConfig

    folder = request.getfixturevalue(which) / "vllm"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    stored = SafetensorsWeights(folder)
    assert {name: tuple(stored[name].shape) for name in stored.names()} == vllm_shapes(config)
    assert config.architectures == ["DeciLMForCausalLM"] and config.model_type == "nemotron-nas"
    assert config.rope_parameters["rope_theta"] == 10000.0
    told = json.loads((folder / "config.json").read_text())
    assert config.to_dict()["block_configs"] == told["block_configs"]


def test_query_heads_that_differ_are_refused_before_anything_is_cut(opened: Any) -> None:
    error = refused(Code.TARGET_REFUSED, lambda: per_layer(opened, "vllm"))
    assert "query heads are as many in every layer, and there would be 4, 6" in error.why


# --- both ----------------------------------------------------------------------------------------


def test_several_targets_have_a_folder_each_and_one_plan(uniform: Path) -> None:
    assert {p.name for p in uniform.iterdir()} >= {"gguf", "vllm", "plan.json", "surgeon.json"}
    told = json.loads((uniform / "surgeon.json").read_text())["target"]
    assert told["name"] == "gguf,vllm" and set(told["targets"]) == {"gguf", "vllm"}
    assert told["bytes"] == sum(one["bytes"] for one in told["targets"].values())


def test_a_changed_byte_is_found_by_verify(opened: Any, mixed: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "m"
    shutil.copytree(mixed, folder)
    found = surgeon.verify(folder, source=opened)
    assert found.largest < 1e-5 and found.rounded
    file = folder / "gguf" / "model.gguf"
    data = bytearray(file.read_bytes())
    data[-64] ^= 64
    file.write_bytes(data)
    error = refused(Code.VERIFY_FAILED, lambda: surgeon.verify(folder, source=opened))
    assert error.at == str(file)


@pytest.mark.parametrize("target", ["gguf", "vllm", "transformers,gguf"])
def test_other_families_are_refused_before_anything_is_scored(target: str) -> None:
    error = refused(
        Code.TARGET_REFUSED, lambda: prune(models.tiny("GPT2"), target, roles={"ffn": 0.5})
    )
    assert "gpt2" in error.why and "--to" in error.try_


def test_targets_are_named_once_and_right(opened: Any) -> None:
    error = refused(Code.BAD_OPTION, lambda: prune(opened, "gguf,gguf", roles={"ffn": 0.5}))
    assert error.try_ == "--to gguf"
    error = refused(Code.BAD_OPTION, lambda: prune(opened, "gguf,vlm", roles={"ffn": 0.5}))
    assert "vllm" in error.try_
