"""Runs a GGUF file by llama.cpp, in the environment that tools/llama_cpp makes, not in Surgeon's.

    .venv-llama/bin/python tools/llama_runner.py REQUEST.json ANSWER.json

The request names the file and may have `prompt` (token ids to go on from) with `new` (how many
tokens to write, the likeliest each time) and `vocab` (its size), and `texts` (to be cut into
tokens). The answer has the tokens that were written, for each of them the logarithms of all tokens'
probabilities, and the texts' tokens. Keys and values are cached in fp32: a difference is then the
file's, and not the cache's.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


def started(model: str) -> Any:
    """Returns llama.cpp's server with the model loaded."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx = 512
    params.n_gpu_layers = 0
    params.n_parallel = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.port = 0
    return xllamacpp.Server(params)


def tokens(server: Any, text: str) -> list[int]:
    """Returns the token ids of a text, with those that begin and end it."""
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    url = f"{server.listening_address}/tokenize"
    with urllib.request.urlopen(urllib.request.Request(url, body)) as found:
        return json.load(found)["tokens"]


def written(server: Any, prompt: list[int], new: int, vocab: int) -> dict[str, Any]:
    """Returns the likeliest tokens after a prompt, and before each all log-probabilities.

    The server is asked for one token at a time: it holds back tokens that end amid a character, and
    keeps some from being written, but tells the probabilities of all. There are fewer than `new`
    where the server tells nothing of the next.
    """
    ids, rows = list(prompt), list[list[float]]()
    for _ in range(new):
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0.0, "n_probs": vocab}
        found = server.handle_completions({**asked, "cache_prompt": False})
        told = found["choices"][0]["logprobs"]
        if told is None:
            break  # the likeliest token ends the text, or stands amid a character
        steps = told["content"]
        if len(steps) != 1:
            raise SystemExit(f"llama.cpp told of {len(steps)} tokens where one was asked for")
        row = [float("-inf")] * vocab
        for token in steps[0]["top_logprobs"]:
            row[token["id"]] = token["logprob"]
        rows.append(row)
        ids.append(max(range(vocab), key=row.__getitem__))
    return {"written": ids[len(prompt) :], "logprobs": rows}


def main(request: str, answer: str) -> None:
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    server = started(asked["model"])
    out: dict[str, Any] = {"texts": [tokens(server, text) for text in asked.get("texts", [])]}
    if "prompt" in asked:
        out |= written(server, asked["prompt"], asked["new"], asked["vocab"])
    Path(answer).write_text(json.dumps(out), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
