"""Text from a prompt: through Transformers' own `generate`, or token by token without a cache."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.logits import is_transformers, logits_of, positions_of


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a prompt."""

    text: str
    """The new text alone, without the prompt."""
    tokens: tuple[int, ...]
    """The new tokens, an end-of-text token included if the model wrote one."""
    seconds: float


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. At temperature 0 the likeliest one is taken (greedy)."""

    temperature: float = 0.0
    """0 for greedy; above 0 the logits are divided by it before one is drawn."""
    top_k: int | None = None
    """Draw from this many of the likeliest tokens only."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens whose probabilities add up to this."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses settings that mean nothing."""
        wrong = (
            ("temperature", self.temperature, "0 or more")
            if not (math.isfinite(self.temperature) and self.temperature >= 0)
            else ("top_k", self.top_k, "1 or more")
            if self.top_k is not None and self.top_k < 1
            else ("top_p", self.top_p, "above 0 and at most 1")
            if self.top_p is not None and not 0 < self.top_p <= 1
            else None
        )
        if wrong is not None:
            name, value, need = wrong
            raise _bad_option(name, value, f"it has to be {need}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            name = "top_k" if self.top_k is not None else "top_p"
            raise _bad_option(
                name, getattr(self, name), "at temperature 0 nothing is drawn, so it has no effect"
            )


GREEDY = Sampling()


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
) -> Generation:
    """Returns what the model writes after the prompt.

    Args:
        model: a Transformers model, or anything else that `logits_of` takes: an `OrtSession`, a
            graph module. The latter are run anew on the whole text for every token.
        tokenizer: the model's own tokenizer.
        prompt: the text to go on from.
        max_new_tokens: an upper limit; an end-of-text token stops before it.
        sampling: greedy without it.

    Raises:
        SurgeonError: an empty prompt, no tokenizer, a length that the model has no positions for.
    """
    if tokenizer is None:
        raise SurgeonError(
            Code.MISSING_FILE,
            "there is no tokenizer for this model",
            at=f"a {type(model).__name__}",
            why="a prompt can't be turned into token ids without one",
            try_="put the tokenizer's files beside the model, or name a folder that has them",
        )
    if max_new_tokens < 1:
        raise _bad_option("max_new_tokens", max_new_tokens, "it has to be 1 or more")
    ids: list[int] = list(tokenizer(prompt)["input_ids"]) if prompt.strip() else []
    if not ids:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            "the prompt is empty",
            at=f"prompt {prompt!r}",
            why="a model goes on from at least one token",
            try_='give some words, such as "The capital of France is"',
        )
    positions = positions_of(model)
    if positions is not None and len(ids) + max_new_tokens > positions:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            f"{len(ids)} tokens of prompt and {max_new_tokens} new ones are too many",
            at=f"prompt {prompt[:40]!r}",
            why=f"the model was made for {positions} positions",
            try_="a shorter prompt, or fewer new tokens",
            data={"positions": positions, "prompt": len(ids)},
        )
    start = time.perf_counter()
    if is_transformers(model):
        new = _with_transformers(model, tokenizer, ids, max_new_tokens, sampling)
    else:
        new = _by_recomputation(model, tokenizer, ids, max_new_tokens, sampling)
    seconds = time.perf_counter() - start
    return Generation(tokenizer.decode(new, skip_special_tokens=True), tuple(new), seconds)


def _with_transformers(
    model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, sampling: Sampling
) -> list[int]:
    import torch
    from transformers import GenerationConfig

    own = model.generation_config
    stop = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else tokenizer.pad_token_id
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        # 0 and 1 switch the filters off: the model's own settings don't count unless asked for.
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        }
    first_stop = stop[0] if isinstance(stop, list) else stop
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stop,
        pad_token_id=first_stop if pad is None else pad,
        bos_token_id=own.bos_token_id,
        **drawn,
    )
    batch = torch.tensor([ids], device=model.device)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        out = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=config)
    return out[0, len(ids) :].tolist()


def _by_recomputation(
    model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int, sampling: Sampling
) -> list[int]:
    run = logits_of(model)
    draw = np.random.default_rng(sampling.seed)
    new: list[int] = []
    for _ in range(max_new_tokens):
        logits = run(np.asarray([ids + new], dtype=np.int64))[0, -1]
        last = np.asarray(logits.float().cpu() if hasattr(logits, "cpu") else logits, np.float64)
        new.append(_next(last, sampling, draw))
        if new[-1] == tokenizer.eos_token_id:
            break
    return new


def _next(logits: NDArray[np.float64], sampling: Sampling, draw: np.random.Generator) -> int:
    """Draws one token from logits [vocab]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[: sampling.top_k]
    scaled = logits[order] / sampling.temperature
    weights = np.exp(scaled - scaled[0])
    weights /= weights.sum()
    if sampling.top_p is not None:
        # The token that crosses the line belongs to the set, so at least one always stays.
        kept = int(np.searchsorted(np.cumsum(weights), sampling.top_p)) + 1
        order, weights = order[:kept], weights[:kept] / weights[:kept].sum()
    return int(draw.choice(order, p=weights))


def _bad_option(name: str, value: Any, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        f"{name} can't be {value}",
        at=f"option {name}",
        why=why,
        try_="leave it out for greedy text of 64 tokens",
        data={"option": name},
    )
