"""Small tokenizers, trained on this project's own texts, and tiny models that have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests import models
from tests.command import ROOT, checkpoint

SIZE = 700
"""Tokens of a trained tokenizer, about."""

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant, what now?\n{% endif %}"
)


@cache
def learnt() -> str:
    """What the tokenizers are trained on."""
    texts = ("LICENSE", "README.md")
    return "\n".join((ROOT / name).read_text(encoding="utf-8") for name in texts)


@cache
def corpus() -> str:
    """A part of it that doesn't need all of the tokens."""
    return (ROOT / "LICENSE").read_text(encoding="utf-8")[1200:4200]


def _lines() -> list[str]:
    return learnt().splitlines(keepends=True)


@cache
def byte_level(ignore_merges: bool = False) -> str:
    """A tokenizer like SmolLM2's, Llama 3's and Qwen2's, as JSON."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
    from tokenizers import models as kinds

    core: Any = Tokenizer(kinds.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_lines(), trainer)
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    core.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", core.token_to_id("<|im_start|>"))]
    )
    data = json.loads(core.to_str())
    data["model"]["ignore_merges"] = ignore_merges
    return json.dumps(data)


@cache
def byte_fallback() -> str:
    """A tokenizer like Llama 2's and Mistral's: characters, and bytes for those it hasn't."""
    from tokenizers import Tokenizer, decoders, normalizers, processors, trainers
    from tokenizers import models as kinds

    special = ["<unk>", "<s>", "</s>"]
    every = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    core: Any = Tokenizer(kinds.BPE(unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE + 256, special_tokens=every, show_progress=False, max_token_length=12
    )
    core.train_from_iterator(_lines(), trainer)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    data = json.loads(core.to_str())
    data["model"]["byte_fallback"] = True
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] in special]
    return json.dumps(data)


@cache
def unigram() -> str:
    """A tokenizer like T5's, of likely pieces."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as kinds

    core: Any = Tokenizer(kinds.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=SIZE,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    core.train_from_iterator(_lines(), trainer)
    return core.to_str()


KINDS: dict[str, Callable[[], str]] = {
    "byte level": byte_level,
    "byte level, whole words first": lambda: byte_level(True),
    "byte fallback": byte_fallback,
    "unigram": unigram,
}


def fast(data: str) -> Any:
    """Returns a tokenizer of Transformers with this JSON."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core: Any = Tokenizer.from_str(data)
    ends = ["<|im_end|>", "</s>"]
    end = next(token for token in ends if core.token_to_id(token) is not None)
    made: Any = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end)
    made.chat_template = TEMPLATE
    return made


def with_vocabulary(
    folder: Path, name: str = "Llama", kind: str = "byte level", *, rows: int = 0, **overrides: Any
) -> Path:
    """Saves a tiny model with a real tokenizer.

    Args:
        folder: that is written.
        name: of the architecture.
        kind: of the tokenizer.
        rows: of the embedding, beyond the tokenizer's.
        overrides: of the configuration.
    """
    tokenizer = fast(KINDS[kind]())
    size, end = len(tokenizer), tokenizer.eos_token_id
    settings = {"vocab_size": size + rows, "eos_token_id": end, "pad_token_id": end}
    model = models.build(name, **{**settings, **overrides})
    model.generation_config.eos_token_id = [end, 3]
    model.generation_config.suppress_tokens = [5, end]
    return checkpoint(folder, model, tokenizer)
