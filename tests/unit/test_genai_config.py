"""What onnxruntime-genai is told of a graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from surgeon.emit.genai import CacheFacts, GraphFacts, genai_config, read_facts

LAYER = CacheFacts(kv_heads=2, key=16, value=16, shared=True)
FACTS = GraphFacts(
    filename="model.onnx",
    inputs=("input_ids", "attention_mask"),
    caches=(LAYER, LAYER),
    vocab=128,
    positions=256,
    dtype="fp32",
)
CONFIG = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}


def made(
    facts: GraphFacts = FACTS, config: Any = CONFIG, generation: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    found, _ = genai_config(facts, config, generation or {})
    assert found is not None
    return found["model"], found["search"]


def refused(facts: GraphFacts = FACTS, config: Any = CONFIG) -> str:
    found, reason = genai_config(facts, config, {})
    assert found is None
    return reason


def test_the_graph_is_described() -> None:
    model, search = made()
    assert model["vocab_size"] == 128 and model["context_length"] == search["max_length"] == 256
    decoder = model["decoder"]
    assert decoder["filename"] == "model.onnx"
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"]) == (2, 2)
    assert decoder["head_size"] == 16
    assert decoder["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert decoder["session_options"]["provider_options"] == []


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("llama", "llama"),
        ("qwen3", "qwen3"),
        ("gemma3_text", "gemma3_text"),
        ("gpt_oss", "gptoss"),
        ("olmo2", "decoder"),
        ("gpt2", "decoder"),  # the library's own takes other inputs
        ("phi3", "decoder"),
        (None, "decoder"),
    ],
)
def test_the_type_is_the_sources_where_the_library_treats_it_as_a_decoder(
    own: str | None, expected: str
) -> None:
    model, _ = made(config={**CONFIG, "model_type": own} if own else {"eos_token_id": 2})
    assert model["type"] == expected


def test_one_buffer_for_past_and_present_only_if_all_layers_can() -> None:
    assert made()[1]["past_present_share_buffer"] is True
    mixed = replace(FACTS, caches=(LAYER, replace(LAYER, shared=False)))
    assert made(mixed)[1]["past_present_share_buffer"] is False


def test_bf16_needs_cuda() -> None:
    model, _ = made(replace(FACTS, dtype="bf16"))
    assert model["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]


def test_generation_settings_come_before_the_config() -> None:
    model, search = made(
        generation={
            "eos_token_id": [5, 6],
            "bos_token_id": 3,
            "pad_token_id": 4,
            "do_sample": True,
            "temperature": 0.6,
            "top_p": 0.9,
            "top_k": None,
        }
    )
    assert (model["eos_token_id"], model["bos_token_id"], model["pad_token_id"]) == ([5, 6], 3, 4)
    assert (search["do_sample"], search["temperature"], search["top_p"]) == (True, 0.6, 0.9)
    assert search["top_k"] == 50
    assert made()[1]["do_sample"] is False


def test_tokens_that_the_library_would_invent_or_refuse_are_not_left_to_it() -> None:
    model, _ = made(config={"eos_token_id": [2, 999], "bos_token_id": None, "pad_token_id": -1})
    assert (model["eos_token_id"], model["pad_token_id"]) == ([2], 2)
    assert "bos_token_id" not in model
    assert made(replace(FACTS, vocab=20))[1]["top_k"] == 20


def test_a_setting_without_a_field_is_reported() -> None:
    found, note = genai_config(FACTS, CONFIG, {"min_p": 0.1, "typical_p": 1.0, "top_p": 0.9})
    assert found is not None and note.endswith("no field for min_p")
    assert genai_config(FACTS, CONFIG, {})[1] == ""


def test_the_text_part_of_a_config_counts() -> None:
    inner = {"eos_token_id": 7, "max_position_embeddings": 99}
    config = {"model_type": "gemma3", "text_config": inner}
    model, _ = made(replace(FACTS, positions=None), config)
    assert (model["eos_token_id"], model["context_length"]) == ([7], 99)


def test_what_it_cannot_say_is_refused_with_the_reason() -> None:
    assert "no key/value cache" in refused(replace(FACTS, caches=()))
    wider = replace(FACTS, caches=(LAYER, replace(LAYER, value=24)))
    assert "layer 1" in refused(wider) and "24" in refused(wider)
    assert "token_type_ids" in refused(replace(FACTS, inputs=(*FACTS.inputs, "token_type_ids")))
    assert "no limit" in refused(replace(FACTS, positions=None))
    assert "ends the text" in refused(config={"eos_token_id": None})
    assert "vocabulary of 128" in refused(config={"eos_token_id": 128})


def test_a_graph_says_its_facts_itself(tmp_path: Path) -> None:
    from onnx import TensorProto, helper, save

    half = TensorProto.FLOAT16

    def value(name: str, type_: int, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, type_, shape)

    inputs = [value(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")]
    outputs = [value("logits", half, ["b", "s", 128])]
    nodes = [helper.make_node("Cast", ["input_ids"], ["cast"], to=half)]
    nodes.append(helper.make_node("Unsqueeze", ["cast", "axis"], ["logits"]))
    # Eleven layers, so that their numbers sort otherwise as text.
    for i in range(11):
        for kind, width in (("key", 16), ("value", 24 if i == 10 else 16)):
            past, present = f"past_key_values.{i}.{kind}", f"present.{i}.{kind}"
            inputs.append(value(past, half, ["b", 1 + i, "p", width]))
            outputs.append(value(present, half, ["b", 1 + i, "t", width]))
            nodes.append(helper.make_node("Identity", [past], [present]))
    axis = helper.make_tensor("axis", TensorProto.INT64, [1], [2])
    model = helper.make_model(helper.make_graph(nodes, "graph", inputs, outputs, [axis]))
    for key, said in {"dtype": "fp16", "positions": "64", "shared_cache": "0,10"}.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = f"surgeon.{key}", said
    save(model, tmp_path / "graph.onnx")

    facts = read_facts(tmp_path / "graph.onnx")
    assert facts.inputs == ("input_ids", "attention_mask")
    assert (facts.filename, facts.vocab, facts.positions, facts.dtype) == (
        "graph.onnx",
        128,
        64,
        "fp16",
    )
    assert [cache.kv_heads for cache in facts.caches] == list(range(1, 12))
    assert [cache.shared for cache in facts.caches] == [True, *[False] * 9, True]
    assert facts.caches[10] == CacheFacts(11, 16, 24, True)
