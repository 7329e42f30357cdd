"""Pruning of checkpoints larger than the memory allowed, beside copying the same bytes.

    python tools/bench/out_of_core.py [--sizes 1 3 13] [--memory 1.5GB] [--ratio 0.25] [--times 3]
        [--at FOLDER]

Every checkpoint is of Llama-2-7B's shape but for the number of layers (all 32 make 13.5 GB): random
bf16 values, written tensor by tensor in several shards. It is pruned by magnitude, in a process of
its own whose peak is its own; then it is verified layer by layer. The copy reads the bytes that
pruning reads, in as many passes, and writes as many as it writes, on the same disk, both with the
files of the source out of the page cache first and with what is written on the disk at the end.
They take turns, as a disk of a virtual machine is faster where something was read before; medians
are printed. At no time is there more than the source and one output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HIDDEN, FFN, HEADS, VOCAB, LAYERS = 4096, 11008, 32, 32000, 32
SHARD_BYTES = 2_000_000_000
BLOCK = 2**24
SURGEON = [sys.executable, "-m", "surgeon.cli"]


def generate(folder: Path, layers: int) -> None:
    """Writes a checkpoint of random values."""
    import torch
    from transformers import LlamaConfig

    from surgeon.emit.safetensors_file import TensorSpec, write_safetensors

    shapes = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for i in range(layers):
        stem = f"model.layers.{i}"
        shapes |= {f"{stem}.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shapes |= {f"{stem}.mlp.{n}_proj.weight": (FFN, HIDDEN) for n in ("gate", "up")}
        shapes |= {f"{stem}.mlp.down_proj.weight": (HIDDEN, FFN)}
        shapes |= {f"{stem}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
    draw = torch.Generator().manual_seed(0)
    # One block of values serves all: what matters is that no two rows are the same.
    base = (torch.randn(2**22, generator=draw) * 0.02).bfloat16()

    def values(number: int, shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        size, at = shape[0] * shape[1], 1009 * number % len(base)
        row = torch.cat((base[at:], base[:at]))
        flat = row.repeat(-(-size // len(row)))[:size].reshape(shape)
        # Rows of 4096 would come again after 1024: each is scaled by a number of its own.
        flat *= 1 + torch.rand(shape[0], 1, generator=draw).bfloat16()
        return flat

    specs = [
        TensorSpec(name, "bf16", shape, lambda n=number, s=shape: values(n, s))
        for number, (name, shape) in enumerate(shapes.items())
    ]
    folder.mkdir()
    write_safetensors(folder, specs, max_shard_bytes=SHARD_BYTES)
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    settle(folder)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def settle(folder: Path) -> None:
    """Sees to it that files are on the disk, and out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(command: list[str]) -> tuple[float, int, float]:
    """Returns seconds, peak bytes of resident memory and processor seconds of a command."""
    code = (
        "import json,resource,subprocess,sys,time\n"
        "start = time.perf_counter()\n"
        "rc = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(json.dumps([rc, time.perf_counter() - start, used.ru_maxrss * 1024,"
        " used.ru_utime + used.ru_stime]))"
    )
    found = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    rc, seconds, peak, busy = json.loads(found.stdout)
    if rc:
        raise SystemExit(f"{' '.join(command)} failed:\n{found.stderr}")
    return seconds, peak, busy


def passes_over(source: Path, out: Path) -> tuple[list[tuple[Path, int, int]], int]:
    """Returns the ranges of files that pruning reads, in order, and the bytes that it writes.

    Scores read the tensors that lose channels, slicing reads all of them.
    """
    from surgeon.capture.weights import SafetensorsWeights

    before, after = SafetensorsWeights(source), SafetensorsWeights(out)
    scored = [n for n in before.names() if before.shape(n) != after.shape(n)]
    every = sorted(before.names(), key=before.place)
    ranges: list[tuple[Path, int, int]] = []
    for names in (sorted(scored, key=before.place), every):
        for name in names:
            file, start = before.place(name)
            ranges.append((Path(file), start, before.nbytes(name)))
    return ranges, sum(after.nbytes(name) for name in after.names())


def copy(ranges: list[tuple[Path, int, int]], wanted: int, out: Path) -> float:
    """Reads ranges of files, writes so many bytes, and returns the seconds that both take."""
    from surgeon.ahead import ahead

    buffers = [bytearray(BLOCK) for _ in range(3)]
    whole = sum(size for _, _, size in ranges)

    def blocks():
        number = 0
        for path, start, size in ranges:
            with path.open("rb", buffering=0) as file:
                file.seek(start)
                while size:
                    view = memoryview(buffers[number % 3])[: min(BLOCK, size)]
                    count = file.readinto(view)
                    size -= count
                    number += 1
                    yield view[:count]

    begun = time.perf_counter()
    read = written = 0
    idle = whole - sum(size for _, _, size in ranges[-_last(ranges) :])
    with out.open("wb") as file:
        for view in ahead(blocks()):
            read += len(view)
            if read > idle:  # the last pass writes, evenly
                due = min(len(view), wanted * (read - idle) // (whole - idle) - written)
                written += file.write(view[:due])
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    assert written <= wanted <= written + BLOCK
    return seconds


def _last(ranges: list[tuple[Path, int, int]]) -> int:
    """Returns how many of the ranges are the last pass's, which begins where the files do."""
    first = min((path, start) for path, start, _ in ranges)
    places = [i for i, (path, start, _) in enumerate(ranges) if (path, start) == first]
    return len(ranges) - places[-1]


def once(source: Path, out: Path, asked: list[str]) -> dict[str, float]:
    """Returns what pruning one checkpoint takes, and then copying its bytes; `out` stays."""
    shutil.rmtree(out, ignore_errors=True)
    settle(source)
    seconds, peak, busy = measured(
        [*SURGEON, "prune", str(source), "-o", str(out), *asked, "--no-verify"]
    )
    ranges, wanted = passes_over(source, out)
    told = json.loads((out / "surgeon.json").read_text())
    settle(source)
    settle(out)
    copied = copy(ranges, wanted, source.parent / "copy")
    (source.parent / "copy").unlink()
    return {
        "source_gb": _bytes(source) / 1e9,
        "read_gb": sum(n for _, _, n in ranges) / 1e9,
        "written_gb": wanted / 1e9,
        "removed": told["ratio"]["removed"],
        "seconds": seconds,
        "capture_s": told["seconds"]["capture"],
        "plan_s": told["seconds"]["plan"],
        "write_s": told["seconds"]["write"],
        "cpu_s": busy,
        "peak_gb": peak / 1e9,
        "copy_s": copied,
        "times": seconds / copied,
    }


def measure(at: Path, layers: int, asked: list[str], times: int, verify: bool) -> dict[str, float]:
    """Returns the medians of several turns, and what it takes to verify the last."""
    source, out = at / "source", at / "out"
    if not source.exists():
        generate(source, layers)
    measured([*SURGEON, "inspect", str(source / "config.json")])  # libraries into the page cache
    turns = [once(source, out, asked) for _ in range(times)]
    found = {key: median(turn[key] for turn in turns) for key in turns[0]}
    found["verify_s"] = found["verify_gb"] = float("nan")
    if verify:
        found["verify_s"], most, _ = measured([*SURGEON, "verify", str(out), "--by-layer"])
        found["verify_gb"] = most / 1e9
    shutil.rmtree(out)
    shutil.rmtree(source)
    return found


COLUMNS = {
    "source_gb": ("source, GB", ".1f"),
    "read_gb": ("read", ".1f"),
    "written_gb": ("written", ".1f"),
    "seconds": ("prune, s", ".0f"),
    "capture_s": ("of it capture", ".0f"),
    "plan_s": ("scores", ".0f"),
    "write_s": ("write", ".0f"),
    "cpu_s": ("CPU", ".0f"),
    "peak_gb": ("peak RSS, GB", ".2f"),
    "copy_s": ("copy, s", ".0f"),
    "times": ("prune / copy", ".2f"),
    "verify_s": ("verify, s", ".0f"),
    "verify_gb": ("its peak, GB", ".2f"),
}


def main() -> None:
    """Measures the sizes asked for and prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 3, 13], metavar="GB")
    parser.add_argument("--memory", default="1.5GB")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--times", type=int, default=3, metavar="N", help="turns of each")
    parser.add_argument("--at", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--no-verify", action="store_true", help="prune and copy alone")
    parser.add_argument("--source", type=Path, help="one such checkpoint, which is kept")
    asked = parser.parse_args()
    names = [name for name, _ in COLUMNS.values()]
    print("| " + " | ".join(names) + " |")
    print("|" + "---:|" * len(names), flush=True)
    for size in asked.sizes:
        each = 2 * (4 * HIDDEN + 3 * FFN) * HIDDEN
        layers = min(LAYERS, max(1, round((size * 1e9 - 4 * VOCAB * HIDDEN) / each)))
        if size >= 13:
            layers = LAYERS
        with tempfile.TemporaryDirectory(dir=asked.at) as folder:
            if asked.source is not None:
                (Path(folder) / "source").mkdir()
                for path in asked.source.iterdir():
                    os.link(path, Path(folder) / "source" / path.name)
            options = ["--ratio", str(asked.ratio), "--memory", asked.memory]
            found = measure(Path(folder), layers, options, asked.times, not asked.no_verify)
        cells = [format(found[key], form) for key, (_, form) in COLUMNS.items()]
        print("| " + " | ".join(cells) + " |", flush=True)
    print(f"own peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
