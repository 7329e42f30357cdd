"""Runs GGUF results by llama.cpp and compares them with Transformers: SmolLM2 dense and pruned.

    tools/llama_cpp        # makes the environment with llama.cpp, then runs this and the tests

For each result: the largest difference between the log-probabilities of all tokens, as a share of
the largest magnitude, at the end of a prompt and after each token written; how many tokens both
write alike; and, of the dense model, into which tokens both cut texts.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import surgeon
from surgeon.axes.plan import Plan
from surgeon.exporting import export

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-llama" / "bin" / "python"
PROMPT = "The heart is a muscle that"
NEW = 16
TEXTS = (
    "Hello world, it's 12,345 o'clock!",
    "  two spaces\n\nÜber naïve façade — 漢字 🙂",
    "<|im_start|>user\nHi<|im_end|>",
)


def llama_cpp(file: Path, **asked: Any) -> dict[str, Any]:
    """Returns what llama.cpp makes of a file; see tools/llama_runner.py."""
    with TemporaryDirectory() as name:
        request, answer = Path(name, "request.json"), Path(name, "answer.json")
        request.write_text(json.dumps({"model": str(file), **asked}), encoding="utf-8")
        runner = [str(PYTHON), str(ROOT / "tools" / "llama_runner.py")]
        done = subprocess.run([*runner, request, answer], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"llama.cpp failed on {file}:\n{done.stderr[-2000:]}")
        return json.loads(answer.read_text(encoding="utf-8"))


@torch.no_grad()
def transformers(model: Any, prompt: list[int], new: int) -> tuple[list[int], torch.Tensor]:
    """Returns the likeliest tokens after a prompt, and log-probabilities [new, vocabulary]."""
    ids, rows = list(prompt), list[torch.Tensor]()
    for _ in range(new):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        rows.append(logits.log_softmax(-1))
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :], torch.stack(rows)


def compared(file: Path, model: Any, prompt: list[int], new: int, **asked: Any) -> dict[str, Any]:
    """Returns how llama.cpp's results from a file differ from a Transformers model's."""
    vocab = int(model.config.vocab_size)
    found = llama_cpp(file, prompt=prompt, new=new, vocab=vocab, **asked)
    tokens, want = transformers(model, prompt, new)
    new = len(found["written"])  # fewer where the server tells nothing of the next
    pairs = enumerate(zip(found["written"], tokens[:new], strict=True))
    same = next((i for i, (a, b) in pairs if a != b), new)
    got = torch.tensor(found["logprobs"], dtype=torch.float64)
    # After a token that differs both go on from different texts.
    rows = min(same + 1, new)
    apart = (got[:rows] - want[:rows]).abs().max() / want[:rows].abs().max()
    return {"difference": float(apart), "same_tokens": same, "of": new, "texts": found["texts"]}


def variants(opened: Any) -> Iterator[tuple[str, Any]]:
    """Yields results of every form: dense, layers alike, and layers that differ."""
    asked = {"recipe": "fast", "verify": False, "target": "gguf"}
    yield "dense", surgeon.prune(opened, plan=Plan(), verify=False, target="gguf")
    shares = {"ffn": 0.25, "kv_heads": 1 / 3}
    some = surgeon.prune(opened, roles=shares, only=["model.layers.1?.*"], **asked)
    gone = [
        b.name
        for b in opened.axes.branches
        if b.layer.endswith(".20") or (b.layer.endswith(".21") and b.kind == "attention")
    ]
    plan = replace(some.plan, branches=tuple(gone))
    mixed = surgeon.prune(opened, plan=plan, verify=False, target="gguf")
    yield "ten layers narrower, one gone, one without attention", mixed
    yield "MLPs and heads alike", surgeon.prune(opened, roles=shares, **asked)
    yield "residual width", surgeon.prune(opened, roles={"hidden": 1 / 9}, **asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="a file for the figures")
    asked = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit("llama.cpp is not there: run tools/llama_cpp")
    torch.set_num_threads(1)
    opened = surgeon.open_model("smollm2")
    tokenizer = opened.source.load_tokenizer()
    prompt = tokenizer(PROMPT)["input_ids"]
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as name:
        for i, (label, result) in enumerate(variants(opened)):
            start = time.perf_counter()
            folder = Path(name, str(i))
            report = result.save(folder)
            written = time.perf_counter() - start
            model = result.model.float()
            texts = TEXTS if i == 0 else ()
            row = compared(folder / "model.gguf", model, prompt, NEW, texts=texts)
            row |= {"result": label, "verified": report.verification["largest"], "seconds": written}
            row |= {k: report.target[k] for k in ("architecture", "dtype", "bytes")}
            rows.append(row)
            print(json.dumps({k: v for k, v in row.items() if k != "texts"}), flush=True)
            if i == 0:
                own = [tokenizer(text)["input_ids"] for text in TEXTS]
                print(json.dumps({"texts": row["texts"], "transformers": own}), flush=True)
        packed = Path(name, "packed.gguf")
        export(opened, "gguf", packed, quantize="q8_0")
        row = compared(packed, surgeon.prune(opened, plan=Plan(), verify=False).model, prompt, NEW)
        rows.append({"result": "dense, q8_0", "bytes": packed.stat().st_size, **row})
        print(json.dumps(rows[-1]))
    if asked.output:
        asked.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
