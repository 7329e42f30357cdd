"""Tiny models whose every parameter matters, so that a mistake shows in the logits."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

EXPECTED_AXES = Path(__file__).parent / "golden" / "expected_axes.json"

# The configs are those of the recorded axes, so that both speak of the same models.
RECORDED: dict[str, dict[str, Any]] = json.loads(EXPECTED_AXES.read_text())
ARCHITECTURES: tuple[str, ...] = tuple(RECORDED)


def config(name: str, **overrides: Any) -> Any:
    """Returns the config of architecture `name`, its eps at 0.1, with `overrides` on top.

    With the usual eps a normaliser that is scaled wrongly hides in the rounding.
    """
    cls = getattr(transformers, RECORDED[name]["class"]).config_class
    fields = cls(**RECORDED[name]["config"]).to_dict()
    eps = {key: 0.1 for key, value in fields.items() if "eps" in key and isinstance(value, float)}
    return cls(**{**RECORDED[name]["config"], **eps, **overrides})


def build(name: str, *, seed: int = 0, **overrides: Any) -> Any:
    """Returns a new model of architecture `name` in fp32 and eval mode, drawn by `seed`."""
    settings = config(name, **overrides)
    model = getattr(transformers, RECORDED[name]["class"])(settings)
    randomise(model, seed=seed)
    return model.eval()


@cache
def _cached(name: str, overrides: str) -> Any:
    return build(name, **json.loads(overrides))


def tiny(name: str, **overrides: Any) -> Any:
    """Returns the session's one model of these settings. To modify one, `build` it."""
    return _cached(name, json.dumps(overrides, sort_keys=True))


def randomise(model: torch.nn.Module, *, seed: int = 0) -> None:
    """Draws every parameter anew: no norm weight is 1, no bias 0, logits are of order 1 to 10."""
    draw = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=draw) * std)

    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False):
                if id(parameter) in seen:  # a tied head is drawn once, as the embedding
                    continue
                seen.add(id(parameter))
                if isinstance(module, torch.nn.Embedding):
                    # Gemma multiplies the embedding by √hidden, and would drown its layers in it.
                    scaled = hasattr(module, "embed_scale") or "Gemma" in type(model).__name__
                    normal(parameter, parameter.shape[1] ** -0.5 if scaled else 1.0)
                elif "bias" in key:
                    normal(parameter, 0.5)
                elif parameter.ndim == 1:
                    # Gemma stores the weight less one, so its neutral value is 0 and not 1.
                    neutral = parameter.flatten()[0].round()
                    noise = torch.rand(parameter.shape, generator=draw) - 0.5
                    parameter.copy_(neutral + noise)
                else:
                    transposed = type(module).__name__ == "Conv1D"
                    fan_in = parameter.shape[0 if transposed else 1]
                    normal(parameter, 1.5 * fan_in**-0.5)


def tokens(vocab: int, batch: int = 2, length: int = 12, *, seed: int = 0) -> torch.Tensor:
    """Returns random token ids, int64, shape [batch, length]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (batch, length), generator=draw)


def tokenizer() -> Any:
    """Returns a tokenizer of one token per printable ASCII character, after a <s>."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", "<unk>", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
