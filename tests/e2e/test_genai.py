"""onnxruntime-genai runs an exported folder as it is, in an environment of its own.

Its package for the CPU brings the plain onnxruntime, which must not go beside onnxruntime-gpu.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from surgeon.emit.genai import FILE
from tests import models

pytestmark = pytest.mark.slow

PACKAGE = "onnxruntime-genai==0.18.0"
NEW = 24
TEXTS = ("Once upon a time", "The capital of France is", "def add(a, b):\n")
IDS = ([1, 5, 9, 33, 80], [1, 7], list(range(3, 30)))

# Reads {folder: [text or ids]}, writes the ids of each and the greedy continuation. The tiny
# models are given ids, for the library can't read their tokenizer of whole words.
SCRIPT = """
import json, sys
import onnxruntime_genai as og

out = {}
for folder, given in json.load(sys.stdin).items():
    model = og.Model(folder)
    rows = []
    for ids in given:
        if isinstance(ids, str):
            ids = [int(i) for i in og.Tokenizer(model).encode(ids)]
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(ids) + NEW)
        generator = og.Generator(model, params)
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
        rows.append([ids, [int(i) for i in generator.get_sequence(0)][len(ids):]])
    out[folder] = {"type": model.type, "rows": rows}
print(json.dumps(out))
"""


@pytest.fixture(scope="session")
def genai_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with onnxruntime-genai."""
    folder = tmp_path_factory.mktemp("genai") / "venv"
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    command = [python, "-m", "pip", "install", "-q", "--only-binary", ":all:", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, env=_clean(), timeout=900)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        pytest.skip(f"{PACKAGE} can't be installed here: {(said or ['?'])[-1]}")
    return python


def _clean() -> dict[str, str]:
    """This process's variables without those that would lead to its own packages."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in hidden}


def generated(python: Path, folders: Mapping[Path, Sequence[Any]]) -> dict[Path, dict[str, Any]]:
    """What onnxruntime-genai makes of each folder's texts or ids."""
    done = subprocess.run(
        [python, "-c", SCRIPT.replace("NEW", str(NEW))],
        input=json.dumps({str(folder): given for folder, given in folders.items()}),
        capture_output=True,
        text=True,
        env=_clean(),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(folder): found for folder, found in json.loads(done.stdout).items()}


def greedy(model: Any, ids: list[int]) -> list[list[int]]:
    """Token ids and their continuation by Transformers, less the token that ends it.

    onnxruntime-genai stops at that token and doesn't give it.
    """
    import torch

    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False
    )
    stop = model.generation_config.eos_token_id
    return [ids, [token for token in out[0, len(ids) :].tolist() if token != stop]]


def exported(source: Path, out: Path, style: str = "ort") -> Path:
    from surgeon.exporting import export

    export(str(source), "onnx", out, style=style, trust_remote_code=True)
    return out


def checkpoint(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """By label: a checkpoint, and the folder exported from it."""
    from surgeon.pipeline import prune

    root = tmp_path_factory.mktemp("tiny")
    tokenizer = models.tokenizer()
    sources = {
        name: checkpoint(models.build(name), tokenizer, root / name)
        for name in ("Llama", "Qwen3", "Gemma2", "GPT2", "Olmo2", "Phi3")
    }
    for label, roles in (("kv_heads", {"kv_heads": 0.5, "ffn": 0.25}), ("v", {"v": 0.25})):
        pruned = prune(sources["Llama"], roles=roles, only=["*layers.1*"], verify=False)
        sources[label] = root / label
        pruned.save(sources[label], verify=False)
    found = {
        label: (source, exported(source, root / f"{label}-onnx"))
        for label, source in sources.items()
    }
    found["standard"] = (sources["Llama"], exported(sources["Llama"], root / "std", "standard"))
    return found


@pytest.fixture(scope="module")
def tiny_runs(
    genai_python: Path, tiny_folders: dict[str, tuple[Path, Path]]
) -> dict[str, dict[str, Any]]:
    wanted = {out: IDS for _, out in tiny_folders.values() if (out / FILE).exists()}
    found = generated(genai_python, wanted)
    return {label: found[out] for label, (_, out) in tiny_folders.items() if out in found}


@pytest.mark.parametrize(
    ("label", "type_"),
    [
        ("Llama", "llama"),
        ("Qwen3", "qwen3"),
        ("Gemma2", "gemma2"),
        ("GPT2", "decoder"),
        ("Olmo2", "decoder"),
        ("Phi3", "decoder"),
        ("kv_heads", None),
        ("standard", "llama"),
    ],
)
def test_it_writes_what_transformers_writes(
    tiny_folders: dict[str, tuple[Path, Path]],
    tiny_runs: dict[str, dict[str, Any]],
    label: str,
    type_: str | None,
) -> None:
    from transformers import AutoModelForCausalLM

    source, _ = tiny_folders[label]
    model: Any = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    assert tiny_runs[label]["rows"] == [greedy(model, ids) for ids in IDS]
    assert type_ is None or tiny_runs[label]["type"] == type_


def test_per_layer_heads_come_from_the_graph(
    tiny_folders: dict[str, tuple[Path, Path]], tiny_runs: dict[str, dict[str, Any]]
) -> None:
    from surgeon.emit.genai import read_facts

    facts = read_facts(tiny_folders["kv_heads"][1] / "model.onnx")
    assert len({cache.kv_heads for cache in facts.caches}) == 2
    assert "kv_heads" in tiny_runs


def test_no_config_where_it_could_not_run_and_the_report_says_why(
    tiny_folders: dict[str, tuple[Path, Path]],
) -> None:
    out = tiny_folders["v"][1]
    assert not (out / FILE).exists()
    notes = json.loads((out / "surgeon.json").read_text())["notes"]
    assert any(FILE in note and "value head" in note for note in notes), notes


@pytest.mark.real
def test_a_pretrained_model_dense_and_pruned(
    genai_python: Path, smollm2_gguf: Path, smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    from surgeon.pipeline import prune

    dense, tokenizer = smollm2
    small = tmp_path / "small"
    prune(str(smollm2_gguf), ratio=0.2, verify=False).save(small, verify=False)
    pruned: Any = AutoModelForCausalLM.from_pretrained(small, dtype="float32")
    expected = {}
    for model, source, name in ((dense, smollm2_gguf, "dense"), (pruned, small, "pruned")):
        out = exported(source, tmp_path / f"{name}-onnx")
        expected[out] = [greedy(model, tokenizer(text)["input_ids"]) for text in TEXTS]
    found = generated(genai_python, dict.fromkeys(expected, TEXTS))
    assert {out: run["rows"] for out, run in found.items()} == expected
