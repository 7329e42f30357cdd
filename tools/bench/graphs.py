"""Size, export time, memory and speed of ONNX graphs, against eager torch and other graphs.

    python tools/bench/graphs.py [--model smollm2] [--ratio 0.2] [--threads 1] [--with FOLDER …]
    python tools/bench/graphs.py --large GB

The first exports a model (and the same one pruned) in both styles, each export in a process of
its own, then runs `surgeon bench` over the checkpoint, the graphs and any further folders, such as
what onnxruntime-genai's own builder wrote. The second writes a made-up checkpoint of that many
gigabytes in bf16, exports it in fp32 and prints the peak memory beside the largest tensor's size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def surgeon(*args: str) -> str:
    command = [sys.executable, "-c", "from surgeon.cli import main; main()", *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def export(source: str, out: Path, *options: str) -> dict[str, Any]:
    """Exports in a process of its own; returns seconds, CPU seconds and peak memory."""
    script = (
        "import resource, sys, time\n"
        "from surgeon.cli import main\n"
        "start = time.perf_counter()\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code, done.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024,"
        " file=sys.stderr)\n"
    )
    args = ["export", source, "--to", "onnx", "-o", str(out), *options]
    done = subprocess.run(
        [sys.executable, "-c", script, *args], check=True, capture_output=True, text=True
    )
    seconds, cpu, peak = map(float, done.stderr.split()[-3:])
    said = json.loads((out / "surgeon.json").read_text())["target"]
    figures = {"seconds": round(seconds, 1), "cpu seconds": round(cpu, 1), "peak MiB": round(peak)}
    return {"graph": out.name, "nodes": said["nodes"], "MB": round(said["bytes"] / 1e6), **figures}


def large(folder: Path, gigabytes: float) -> None:
    """Exports a checkpoint of many equal layers and prints what it took."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, width, vocab = 2048, 5632, 32000
    layer = 2 * (2 * hidden * hidden + 2 * hidden * 512 + 3 * hidden * width)
    layers = max(1, round(gigabytes * 1e9 / layer))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=vocab,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    source = folder / "large"
    source.mkdir()
    config.save_pretrained(source)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"self_attn.k_proj": (512, hidden), "self_attn.v_proj": (512, hidden)}
    shapes |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden)}
    shapes |= {"mlp.down_proj": (hidden, width)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    files: dict[str, str] = {}
    total = 0
    for i in range(-1, layers):
        named = {f"model.layers.{i}.{n}.weight": s for n, s in shapes.items()}
        if i < 0:
            named = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
        name = f"model-{i + 2:05}-of-{layers + 1:05}.safetensors"
        tensors = {n: torch.full(s, 0.01, dtype=torch.bfloat16) for n, s in named.items()}
        total += sum(t.nbytes for t in tensors.values())
        save_file(tensors, source / name)
        files |= dict.fromkeys(named, name)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    found = export(str(source), folder / "out", "--no-check")
    biggest = vocab * hidden * 4 / 2**20
    print(json.dumps({**found, "largest tensor MiB": round(biggest), "layers": layers}))
    start = time.perf_counter()
    import onnxruntime

    onnxruntime.InferenceSession(folder / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    print(f"opened by ONNX Runtime in {time.perf_counter() - start:.1f} s")


def main() -> None:
    parse = argparse.ArgumentParser(description="ONNX graphs, measured.")
    parse.add_argument("--model", default="smollm2")
    parse.add_argument("--ratio", default="0.2")
    parse.add_argument("--with", dest="others", nargs="*", default=[])
    parse.add_argument("--threads", default="1")
    parse.add_argument("--large", type=float)
    given = parse.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        if given.large:
            large(folder, given.large)
            return
        dense, small = folder / "dense", folder / "pruned"
        import surgeon as library
        from surgeon.axes.plan import Plan

        library.prune(given.model, plan=Plan(), verify=False).save(dense, verify=False)
        surgeon("prune", given.model, "-o", str(small), "--ratio", given.ratio, "--no-verify")
        graphs: list[str] = []
        for source in (dense, small):
            for style in ("ort", "standard", "generic"):
                out = folder / f"{source.name}-{style}"
                print(json.dumps(export(str(source), out, "--style", style, "--no-check")))
                graphs += [str(out)] if style != "generic" else []
        for source, mine in ((dense, graphs[:2]), (small, graphs[2:])):
            others = given.others if source is dense else []
            models = [str(source), *mine, *others]
            print(surgeon("bench", *models, "--threads", given.threads, "--device", "cpu"))
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB in this process")


if __name__ == "__main__":
    main()
