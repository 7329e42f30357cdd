"""`genai_config.json`: what onnxruntime-genai has to know of a graph to run its folder.

What each field does was found out on onnxruntime-genai 0.18.0, by running graphs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "genai_config.json"

PLAIN = "decoder"
"""The type of any graph that takes tokens, a mask and a cache, and gives logits."""

NAMED = frozenset(
    {
        "chatglm",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma4_text",
        "gptoss",
        "granite",
        "granitemoehybrid",
        "internlm2",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
"""The types that run as `decoder` does; of Qwen's the library also knows the tool call tokens.

Left out are those that expect another graph: `gpt2` and `lfm2` (other inputs), and `phi3`,
`phi3small` and `phimoe` (two rotary tables: the prompt is read anew where the second begins).
"""

_FED = ("input_ids", "attention_mask", "position_ids")
_CACHE = re.compile(r"past_key_values\.(\d+)\.(key|value)")

# Generation settings without a field in `search`, with the value that makes each do nothing.
_UNSAID: Mapping[str, Any] = {
    "min_p": 0.0,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}


@dataclass(frozen=True)
class CacheFacts:
    """The cache of one attention layer: keys [B, kv_heads, T, key], values [B, kv_heads, T, value].

    Attributes:
        kv_heads: key/value heads.
        key: width of a key head.
        value: width of a value head.
        shared: whether past and present may be one buffer.
    """

    kv_heads: int
    key: int
    value: int
    shared: bool


@dataclass(frozen=True)
class GraphFacts:
    """What a graph with a key/value cache takes and gives.

    Attributes:
        filename: of the graph, in the folder of `genai_config.json`.
        inputs: names of the inputs that are no cache.
        caches: the attention layers with a cache, in order.
        vocab: width of the logits.
        positions: the longest sequence; None if there is no limit.
        dtype: of cache and logits: `fp32`, `fp16` or `bf16`.
    """

    filename: str
    inputs: tuple[str, ...]
    caches: tuple[CacheFacts, ...]
    vocab: int
    positions: int | None
    dtype: str


def read_facts(path: str | Path) -> GraphFacts:
    """Returns what an ONNX file written by Surgeon says of itself; its weights aren't read."""
    import onnx

    path = Path(path)
    model = onnx.load(str(path), load_external_data=False)
    said = {entry.key: entry.value for entry in model.metadata_props}
    shared = set(filter(None, said.get("surgeon.shared_cache", "").split(",")))
    sizes: dict[tuple[str, str], tuple[int, int]] = {}
    inputs: list[str] = []
    for value in model.graph.input:
        found = _CACHE.fullmatch(value.name)
        if found is None:
            inputs.append(value.name)
            continue
        _, heads, _, width = value.type.tensor_type.shape.dim
        sizes[found[1], found[2]] = heads.dim_value, width.dim_value
    caches = tuple(
        CacheFacts(*sizes[number, "key"], sizes[number, "value"][1], number in shared)
        for number in sorted({number for number, _ in sizes}, key=int)
    )
    return GraphFacts(
        filename=path.name,
        inputs=tuple(inputs),
        caches=caches,
        vocab=model.graph.output[0].type.tensor_type.shape.dim[-1].dim_value,
        positions=int(said["surgeon.positions"]) if "surgeon.positions" in said else None,
        dtype=said.get("surgeon.dtype", "fp32"),
    )


def genai_config(
    facts: GraphFacts, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """Returns the content of `genai_config.json`, or None with the reason why there can't be one.

    Where there is one, the text beside it says what of the source it leaves out, if anything.

    Args:
        facts: of the graph.
        config: the source's `config.json`.
        generation: its `generation_config.json`, empty if it has none.

    Reference: https://onnxruntime.ai/docs/genai/reference/config.html
    """
    if reason := _refusal(facts):
        return None, reason
    context = facts.positions or _field(config, "max_position_embeddings")
    if not context:
        return None, "it must give a context length, and this model's sequences have no limit"
    stops, pad, bos = _tokens(facts.vocab, config, generation)
    if not stops:
        return None, (
            "it must name a token that ends the text, and the source's configuration names none "
            f"of this vocabulary of {facts.vocab}"
        )
    # Heads and head sizes of every layer come from the graph; what is said here is the first's.
    first = facts.caches[0]
    model: dict[str, Any] = {
        "type": _type(config),
        "vocab_size": facts.vocab,
        "context_length": context,
        "eos_token_id": stops,
        "pad_token_id": pad,
        "decoder": {
            "session_options": {
                "log_id": "onnxruntime-genai",
                # ONNX Runtime has no bf16 kernels on the CPU; elsewhere the user chooses.
                "provider_options": [{"cuda": {}}] if facts.dtype == "bf16" else [],
            },
            "filename": facts.filename,
            "head_size": first.key,
            "num_hidden_layers": len(facts.caches),
            "num_key_value_heads": first.kv_heads,
            "inputs": {
                **{name: name for name in _FED if name in facts.inputs},
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    if bos is not None:
        model["bos_token_id"] = bos
    search = _search(facts, generation) | {"max_length": context}
    unsaid = [
        name
        for name, neutral in _UNSAID.items()
        if generation.get(name) not in (None, neutral, [], {})
    ]
    note = f"it has no field for {', '.join(unsaid)}" if unsaid else ""
    return {"model": model, "search": search}, note


def _refusal(facts: GraphFacts) -> str:
    """Why the library can't run this graph; empty if it can."""
    if not facts.caches:
        return "the graph has no key/value cache, and the library feeds one token at a time"
    unknown = [name for name in facts.inputs if name not in _FED]
    if unknown:
        return f"the library doesn't feed the graph's input {unknown[0]}"
    for number, cache in enumerate(facts.caches):
        if cache.key != cache.value:
            return (
                "the library gives values the cache shape of keys, and in attention layer "
                f"{number} a value head is {cache.value} wide, a key head {cache.key}"
            )
    return ""


def _type(config: Mapping[str, Any]) -> str:
    """The source's own name where the library knows it, else its name of any decoder."""
    own = str(config.get("model_type", ""))
    return next((name for name in (own, own.replace("_", "")) if name in NAMED), PLAIN)


def _field(config: Mapping[str, Any], name: str) -> Any:
    """A field of the config, or of its text part where it also describes images or sound."""
    found = config.get(name)
    inner = config.get("text_config")
    return inner.get(name) if found is None and isinstance(inner, Mapping) else found


def _tokens(
    vocab: int, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[list[int], int, int | None]:
    """The tokens that end a text, the one that pads, and the one that begins it.

    The library reads a missing padding token as 0 and a missing end as the padding token, so both
    are always said; it refuses ids outside of the vocabulary.
    """

    def ids(name: str) -> list[int]:
        for source in (generation.get(name), _field(config, name)):
            many: Sequence[Any] = source if isinstance(source, list) else [source]
            found = [one for one in many if isinstance(one, int) and 0 <= one < vocab]
            if found:
                return found
        return []

    stops = ids("eos_token_id")
    pads, starts = ids("pad_token_id") or stops or [0], ids("bos_token_id")
    return stops, pads[0], starts[0] if starts else None


def _search(facts: GraphFacts, generation: Mapping[str, Any]) -> dict[str, Any]:
    """How text is generated unless the caller says otherwise: as Transformers would."""

    def given(name: str, default: Any) -> Any:
        found = generation.get(name)
        return default if found is None else found

    return {
        "do_sample": given("do_sample", False),
        "early_stopping": generation.get("early_stopping") is True,
        "length_penalty": given("length_penalty", 1.0),
        "min_length": given("min_length", 0),
        "no_repeat_ngram_size": given("no_repeat_ngram_size", 0),
        "num_beams": given("num_beams", 1),
        # One buffer for all layers' past and present, or for none.
        "past_present_share_buffer": all(cache.shared for cache in facts.caches),
        "repetition_penalty": given("repetition_penalty", 1.0),
        "temperature": given("temperature", 1.0),
        # Transformers takes the whole vocabulary where there are fewer tokens than `top_k`.
        "top_k": min(given("top_k", 50), facts.vocab),
        "top_p": given("top_p", 1.0),
    }
