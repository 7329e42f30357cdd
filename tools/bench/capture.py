"""Seconds and memory of capture and analysis, for shapes from 135M to 671B; no weights are made.

    python tools/bench/capture.py [smollm2|7b|70b|405b|qwen3-235b|deepseek-v3]

Every shape runs in a process of its own, so that the peak is its own.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

SHAPES: dict[str, dict[str, object]] = {
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-235b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    # The sizes of DeepSeek-V3 are what its configuration class has without any.
    "deepseek-v3": {},
}

CLASSES = {"qwen3-235b": "Qwen3Moe", "deepseek-v3": "DeepseekV3"}
"""The architectures that are not Llama."""


def _peak() -> float:
    """Returns the MiB that this program held at most; a process's usage counts its parent's too."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = (line.split() for line in status.read_text().splitlines())
        return next(float(words[1]) for words in lines if words[0] == "VmHWM:") / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str) -> dict[str, float | str]:
    import torch
    import transformers

    from surgeon.axes import analyse
    from surgeon.capture.model import capture_model

    libraries = _peak()
    start, begun = time.perf_counter(), time.process_time()
    with torch.device("meta"):
        config = getattr(transformers, f"{CLASSES.get(name, 'Llama')}Config")(**SHAPES[name])
        model = getattr(transformers, f"{CLASSES.get(name, 'Llama')}ForCausalLM")(config)
    made = time.perf_counter()
    program = capture_model(model).program
    captured = time.perf_counter()
    axes = analyse(program)
    analysed = time.perf_counter()
    return {
        "shape": name,
        "operations": len(program.ops),
        "axes": len(axes.axes),
        "build_s": round(made - start, 2),
        "capture_s": round(captured - made, 2),
        "analyse_s": round(analysed - captured, 2),
        "cpu_s": round(time.process_time() - begun, 2),
        "libraries_mib": round(libraries),
        "peak_mib": round(_peak()),
    }


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2])))
    else:
        for shape in sys.argv[1:] or SHAPES:
            subprocess.run([sys.executable, __file__, "--one", shape], check=True)
