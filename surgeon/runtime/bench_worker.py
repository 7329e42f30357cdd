"""The process of one model in a comparison: loads it, and runs it when told to."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.bench import Settings
from surgeon.runtime.decoder import Decoder
from surgeon.runtime.logits import is_transformers, logits_of, positions_of, vocabulary_of
from surgeon.runtime.session import OrtSession

_LEAST_VOCAB = 64
"""Random prompts stay below it where the vocabulary's size is not known."""


class Runner(Protocol):
    """A model ready to be measured, greedy, its results on the host when a call returns."""

    kind: str
    device: str
    note: str

    def prefill(self, ids: NDArray[np.int64]) -> None:
        """Reads a prompt [batch, tokens] and chooses the next tokens."""
        ...

    def decode(self, tokens: int) -> None:
        """Writes so many tokens a row."""
        ...


class _WithCache:
    """A `Decoder`, its cache allocated once."""

    def __init__(self, model: Decoder, settings: Settings) -> None:
        cached = f"{model.signature.style or 'cached'}, {model.signature.dtype}"
        self.kind = f"ONNX Runtime, {cached}"
        self.device, self.note = model.device, model.note
        self._model = model
        self._cache = model.cache(settings.batch, settings.prompt_tokens + settings.new_tokens)

    def prefill(self, ids: NDArray[np.int64]) -> None:
        self._cache.reset()
        rows = [list(map(int, row)) for row in ids]
        self._next = self._model.prefill(self._cache, rows).argmax(axis=1)

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            logits = self._model.extend(self._cache, self._next[:, None])
            self._next = logits.argmax(axis=1)


class _Transformers:
    """A Transformers model with its own cache, as its `generate` uses it."""

    def __init__(self, model: Any, note: str) -> None:
        import inspect

        self.kind = f"Transformers, {str(model.dtype).removeprefix('torch.')}"
        self.device, self.note = model.device.type, note
        self._model = model
        wanted = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in wanted else {}

    def prefill(self, ids: NDArray[np.int64]) -> None:
        import torch

        self._past: Any = None
        self._step(torch.from_numpy(ids).to(self._model.device))

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            self._step(self._next)

    def _step(self, ids: Any) -> None:
        import torch

        with torch.inference_mode():
            out = self._model(
                input_ids=ids, past_key_values=self._past, use_cache=True, **self._options
            )
            self._past = out.past_key_values
            self._next = out.logits[:, -1].argmax(dim=-1, keepdim=True)
        if self._next.is_cuda:
            torch.cuda.synchronize()


class _Recomputed:
    """A function of token ids alone, run on the whole text for every token."""

    def __init__(self, model: Any) -> None:
        self.kind = "ONNX Runtime, no cache" if isinstance(model, OrtSession) else "no cache"
        self.device, self.note = getattr(model, "device", "cpu"), getattr(model, "note", "")
        self._run = logits_of(model)

    def prefill(self, ids: NDArray[np.int64]) -> None:
        self._ids = ids
        self._step()

    def decode(self, tokens: int) -> None:
        for _ in range(tokens):
            self._step()

    def _step(self) -> None:
        logits = np.asarray(self._run(self._ids))
        self._ids = np.concatenate([self._ids, logits[:, -1].argmax(axis=-1)[:, None]], axis=1)


def runner_of(model: Any, settings: Settings) -> Runner:
    """Returns a model ready to be measured.

    Args:
        model: a `Decoder`, a Transformers model, or anything else that `logits_of` takes.
        settings: what will be measured.

    Raises:
        SurgeonError: more tokens than the model has positions for.
    """
    positions, needed = positions_of(model), settings.prompt_tokens + settings.new_tokens
    if positions is not None and needed > positions:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{settings.prompt_tokens} tokens of prompt and {settings.new_tokens} new ones are "
            "too many",
            at="--prompt-tokens, --new-tokens",
            why=f"the model was made for {positions} positions",
            try_="fewer of either",
            data={"positions": positions},
        )
    if isinstance(model, Decoder):
        return _WithCache(model, settings)
    if is_transformers(model):
        return _Transformers(model, getattr(model, "device_note", ""))
    return _Recomputed(model)


def prompt_of(model: Any, settings: Settings) -> NDArray[np.int64]:
    """Returns the same random token ids [batch, prompt_tokens] for models of one vocabulary."""
    shape = (settings.batch, settings.prompt_tokens)
    return np.random.default_rng(0).integers(0, vocabulary_of(model) or _LEAST_VOCAB, shape)


def peak_bytes() -> int | None:
    """Returns the largest resident set that this process has had, or None if it can't be told."""
    status = Path("/proc/self/status")
    if status.exists():
        # `getrusage` counts what the parent held before this program took its place.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(runner: Runner, ids: NDArray[np.int64], tokens: int) -> dict[str, float]:
    """Returns the seconds of one prefill and of writing so many tokens a row after it."""
    start = time.perf_counter()
    runner.prefill(ids)
    middle = time.perf_counter()
    runner.decode(tokens)
    return {"prefill": middle - start, "decode": time.perf_counter() - middle}


def serve() -> None:
    """Loads the model that standard input names, then answers one request a line until it ends."""
    # An interruption is the parent's business, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print must not get between the answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)

        def answer(found: dict[str, Any]) -> None:
            out.write(json.dumps(found) + "\n")
            out.flush()

        job = json.loads(sys.stdin.readline())
        settings = Settings(**job["settings"])
        try:
            home, _, name = job["load"].partition(":")
            load = getattr(importlib.import_module(home), name)
            model = load(job["model"], **job["arguments"])
            ids, runner = prompt_of(model, settings), runner_of(model, settings)
            answer({"kind": runner.kind, "device": runner.device, "note": runner.note})
            for line in sys.stdin:
                if json.loads(line)["do"] == "peak":
                    answer({"bytes": peak_bytes()})
                else:
                    answer(measure(runner, ids, settings.new_tokens))
        except SurgeonError as error:
            parts = {"what": error.what, "at": error.at, "why": error.why, "try_": error.try_}
            answer({"error": {"code": error.code.value, **parts}})
