"""Text from a prompt: with a cache, through Transformers' own `generate`, or without a cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.decoder import Decoder
from surgeon.runtime.logits import is_transformers, logits_of, positions_of
from surgeon.runtime.sampling import GREEDY, Sampler, Sampling, bad_option
from surgeon.runtime.text import TextStream

__all__ = ["GREEDY", "Generation", "Sampling", "generate", "stream"]

OnText = Callable[[int, str], None]
"""Takes the number of a prompt and a further piece of its text."""

Steps = Iterator[list[int | None]]
"""For each step the new token of every row, None where a row has ended."""


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a prompt."""

    text: str
    """The new text alone, without the prompt."""
    tokens: tuple[int, ...]
    """The new tokens, an end-of-text token included if the model wrote one."""
    seconds: float
    """For all prompts of the batch together."""


@overload
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    on_text: OnText | None = None,
) -> Generation: ...
@overload
def generate(
    model: Any,
    tokenizer: Any,
    prompt: list[str] | tuple[str, ...],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    on_text: OnText | None = None,
) -> list[Generation]: ...
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | list[str] | tuple[str, ...],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
    on_text: OnText | None = None,
) -> Generation | list[Generation]:
    """Returns what the model writes after the prompt, or after each of several.

    Args:
        model: a `Decoder`, a Transformers model, or anything else that `logits_of` takes: an
            `OrtSession`, a graph module. The last are run anew on the whole text for every token.
        tokenizer: the model's own tokenizer.
        prompt: the text to go on from; several are one batch.
        max_new_tokens: an upper limit; an end-of-text token stops before it.
        sampling: greedy without it.
        on_text: called with each piece of text as soon as it is there.

    Raises:
        SurgeonError: an empty prompt, no tokenizer, a length that the model has no positions for.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = _rows(model, tokenizer, prompts, max_new_tokens)
    start = time.perf_counter()
    texts = [TextStream(tokenizer, row) for row in rows]
    new: list[list[int]] = [[] for _ in rows]

    def take(step: list[int | None]) -> None:
        for row, token in enumerate(step):
            if token is not None:
                new[row].append(token)
                _give(on_text, row, texts[row].push(token))

    if is_transformers(model):
        _with_transformers(model, tokenizer, rows, max_new_tokens, sampling, take)
    else:
        for step in _steps(model, tokenizer, rows, max_new_tokens, sampling):
            take(step)
    for row, text in enumerate(texts):
        _give(on_text, row, text.close())
    seconds = time.perf_counter() - start
    found = [
        Generation(text.text, tuple(tokens), seconds)
        for text, tokens in zip(texts, new, strict=True)
    ]
    return found[0] if isinstance(prompt, str) else found


def stream(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    sampling: Sampling = GREEDY,
) -> Iterator[str]:
    """Yields what the model writes after the prompt, piece by piece as it is written.

    Args:
        model: as for `generate`. A Transformers model is run anew on the whole text for every
            token, since its own loop can't be paused; `generate` with `on_text` uses its cache.
        tokenizer: the model's own tokenizer.
        prompt: the text to go on from.
        max_new_tokens: an upper limit; an end-of-text token stops before it.
        sampling: greedy without it.

    Raises:
        SurgeonError: as `generate`, when the first piece is asked for.
    """
    rows = _rows(model, tokenizer, [prompt], max_new_tokens)
    text = TextStream(tokenizer, rows[0])
    for (token,) in _steps(model, tokenizer, rows, max_new_tokens, sampling):
        piece = "" if token is None else text.push(token)
        if piece:
            yield piece
    rest = text.close()
    if rest:
        yield rest


def _give(on_text: OnText | None, row: int, piece: str) -> None:
    if on_text is not None and piece:
        on_text(row, piece)


def _rows(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Returns the token ids of every prompt, after checking that the model can go on from them."""
    if tokenizer is None:
        raise SurgeonError(
            Code.MISSING_FILE,
            "there is no tokenizer for this model",
            at=f"a {type(model).__name__}",
            why="a prompt can't be turned into token ids without one",
            try_="put the tokenizer's files beside the model, or name a folder that has them",
        )
    if max_new_tokens < 1:
        raise bad_option("max_new_tokens", max_new_tokens, "it has to be 1 or more")
    rows = [list(tokenizer(text)["input_ids"]) if text.strip() else [] for text in prompts]
    if not rows or not all(rows):
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            "the prompt is empty" if rows else "there is no prompt",
            at=f"prompt {prompts[rows.index([])]!r}" if rows else "an empty batch",
            why="a model goes on from at least one token",
            try_='give some words, such as "The capital of France is"',
        )
    positions = positions_of(model)
    longest = max(range(len(rows)), key=lambda row: len(rows[row]))
    if positions is not None and len(rows[longest]) + max_new_tokens > positions:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            f"{len(rows[longest])} tokens of prompt and {max_new_tokens} new ones are too many",
            at=f"prompt {prompts[longest][:40]!r}",
            why=f"the model was made for {positions} positions",
            try_="a shorter prompt, or fewer new tokens",
            data={"positions": positions, "prompt": len(rows[longest])},
        )
    return rows


def _stops(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Returns the tokens that end a text: the model's own settings go before its tokenizer's."""
    settings = model.generation_config.eos_token_id if is_transformers(model) else None
    beside = getattr(model, "stop_tokens", ()) or None
    named = (settings, beside, getattr(tokenizer, "eos_token_id", None))
    found = next((tokens for tokens in named if tokens is not None), None)
    return () if found is None else (found,) if isinstance(found, int) else tuple(found)


def _steps(
    model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int, sampling: Sampling
) -> Steps:
    stops = _stops(model, tokenizer)
    if isinstance(model, Decoder):
        return _with_cache(model, stops, rows, max_new_tokens, sampling)
    return _by_recomputation(model, stops, rows, max_new_tokens, sampling)


def _with_cache(
    model: Decoder,
    stops: tuple[int, ...],
    rows: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
) -> Steps:
    sampler = Sampler(sampling, len(rows))
    # The last token is written and not read.
    cache = model.cache(len(rows), max(map(len, rows)) + max_new_tokens - 1)
    try:
        logits = model.prefill(cache, rows)
        alive = [True] * len(rows)
        # A row that has ended repeats its last token, unread, until all have.
        last = np.zeros((len(rows), 1), np.int64)
        for count in range(max_new_tokens):
            step: list[int | None] = [None] * len(rows)
            for row in np.flatnonzero(alive):
                token = sampler(logits[row], int(row))
                step[row], last[row, 0] = token, token
                alive[row] = token not in stops
            yield step
            if not any(alive) or count + 1 == max_new_tokens:
                return
            logits = model.extend(cache, last)
    finally:
        cache.close()


def _by_recomputation(
    model: Any,
    stops: tuple[int, ...],
    rows: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
) -> Steps:
    run = logits_of(model)
    sampler = Sampler(sampling, len(rows))
    texts = [list(row) for row in rows]
    alive = [True] * len(rows)
    for _ in range(max_new_tokens):
        step: list[int | None] = [None] * len(rows)
        for row in np.flatnonzero(alive):
            # One by one: a function of token ids alone knows no padding.
            logits = run(np.asarray([texts[row]], dtype=np.int64))[0, -1]
            last = logits.float().cpu() if hasattr(logits, "cpu") else logits
            token = sampler(np.asarray(last, np.float64), int(row))
            texts[row].append(token)
            step[row] = token
            alive[row] = token not in stops
        yield step
        if not any(alive):
            return


class _Streamer:
    """What Transformers calls with the new tokens of a batch; the prompts come first."""

    def __init__(
        self, stops: tuple[int, ...], rows: int, take: Callable[[list[int | None]], None]
    ) -> None:
        self._stops, self._take = stops, take
        self._alive = [True] * rows
        self._prompts = True

    def put(self, value: Any) -> None:
        """Passes the tokens of rows that haven't ended."""
        if self._prompts:
            self._prompts = False
            return
        step: list[int | None] = [None] * len(self._alive)
        for row, token in enumerate(value.reshape(-1).tolist()):
            if self._alive[row]:
                step[row] = token
                self._alive[row] = token not in self._stops
        self._take(step)

    def end(self) -> None:
        """Does nothing more: the caller knows."""


def _with_transformers(
    model: Any,
    tokenizer: Any,
    rows: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    take: Callable[[list[int | None]], None],
) -> None:
    import torch
    from transformers import GenerationConfig

    own, stops = model.generation_config, _stops(model, tokenizer)
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
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=(stops or (0,))[0] if pad is None else pad,
        bos_token_id=own.bos_token_id,
        **drawn,
    )
    longest = max(map(len, rows))
    batch = torch.zeros((len(rows), longest), dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, tokens in enumerate(rows):
        batch[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        model.generate(
            batch.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            streamer=_Streamer(stops, len(rows), take),
        )
