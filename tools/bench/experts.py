"""Mixtures of experts as ONNX graphs: a loop over the experts in use, all experts, and torch.

    python tools/bench/experts.py [--threads 1] [--repeat 7]

Models of random weights, in the proportions of Mixtral (8 experts, 2 of them a token) and of
Qwen3-MoE (64, 8). The three are timed in turn, in one process on as many threads; the medians are
of a text read at once and of one further token. torch is Transformers' own model with its own way
of computing experts.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from surgeon.emit.onnx_decoder import Options, write_decoder
from surgeon.opening import open_model

SHAPES = {"8 experts, 2 a token": (8, 2, 1792), "64 experts, 8 a token": (64, 8, 384)}
HIDDEN, LAYERS, VOCAB, TEXT = 1024, 4, 1000, 128


def build(experts: int, chosen: int, width: int) -> Any:
    """Returns a mixture with random weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
    )
    return MixtralForCausalLM(config).eval()


def of_graph(path: Path, threads: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns what reads the text, and what reads one token after it."""
    settings: Any = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session: Any = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    ids = np.arange(TEXT)[None] % VOCAB
    past = {
        v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32)
        for v in session.get_inputs()[2:]
    }
    text = {"input_ids": ids, "attention_mask": np.ones((1, TEXT), np.int64), **past}
    made = session.run(None, text)[1:]
    token = {"input_ids": ids[:, :1], "attention_mask": np.ones((1, TEXT + 1), np.int64)}
    token |= dict(zip(past, made, strict=True))
    return lambda: session.run(None, text), lambda: session.run(None, token)


def of_torch(model: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Returns the same two of a Transformers model."""
    ids = torch.arange(TEXT)[None] % VOCAB

    @torch.no_grad()
    def text() -> Any:
        return model(input_ids=ids, use_cache=True).past_key_values

    @torch.no_grad()
    def token() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    cache = text()
    return text, token


def medians(calls: list[Callable[[], Any]], repeat: int) -> list[float]:
    """Returns the median milliseconds of calls, taken in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(repeat + 1):
        for own, call in zip(times, calls, strict=True):
            start = time.perf_counter()
            call()
            if turn:  # the first is not counted
                own.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(own) for own in times]


def main() -> None:
    """Prints a row for every shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=7)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("| mixture | | loop, ms | all experts | torch | all / loop | torch / loop |")
    print("|---|---|---:|---:|---:|---:|---:|", flush=True)
    for label, shape in SHAPES.items():
        model = build(*shape)
        origin = open_model(model)
        with TemporaryDirectory() as folder:
            loop, every = Path(folder) / "loop.onnx", Path(folder) / "every.onnx"
            options = Options("ort", positions=2 * TEXT)
            write_decoder(origin.program, origin.read, loop, options=options, check=False)
            with mock.patch("surgeon.emit.ort.decoder.mixtures", lambda _: ({}, frozenset())):
                write_decoder(origin.program, origin.read, every, options=options, check=False)
            runs = [of_graph(loop, asked.threads), of_graph(every, asked.threads), of_torch(model)]
            for which, what in enumerate((f"{TEXT} tokens", "one more")):
                own = medians([run[which] for run in runs], asked.repeat)
                cells = [f"{ms:.1f}" for ms in own] + [f"{ms / own[0]:.2f}" for ms in own[1:]]
                print(f"| {label} | {what} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
