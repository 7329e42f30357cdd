"""The demonstration, whole: a pretrained Llama pruned, loaded back, exported and run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command import surgeon

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path
) -> tuple[Path, dict[str, Any]]:
    del smollm2_gguf  # skips nothing: it fails where the package is missing
    from surgeon.demo import run

    out = tmp_path_factory.mktemp("demo")
    run(out, 0.2, windows=1)
    return out, json.loads((out / "demo.json").read_text())


def test_a_fifth_of_the_decoder_is_gone_within_half_a_step(demo: Any) -> None:
    decoder = demo[1]["report"]["parameters"]["decoder"]
    assert decoder["before"] == 106_202_880
    step = 30 * 3 * 576
    assert abs(decoder["before"] - decoder["after"] - 0.2 * decoder["before"]) <= step / 2


def test_it_equals_the_masked_original(demo: Any) -> None:
    found = demo[1]["report"]["verification"]
    assert found["exact"] and found["rounded"]
    assert found["largest"] <= 1e-4
    assert any("text" in probe["probe"] for probe in found["probes"])


def test_it_still_speaks(demo: Any) -> None:
    dense, small = demo[1]["perplexity"]
    # Random removal of as many channels multiplies perplexity by sixteen.
    assert math.isfinite(small) and dense < small < 8 * dense


def test_the_graph_in_onnx_runtime_gives_the_same(demo: Any) -> None:
    assert demo[1]["onnx"]["largest_difference"] <= 1e-4
    assert demo[1]["onnx"]["same_tokens"] is True


def test_plain_transformers_loads_it_where_surgeon_can_not_be_imported(demo: Any) -> None:
    script = (
        "import sys; sys.modules['surgeon'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert m.lm_head.weight.data_ptr() == m.model.embed_tokens.weight.data_ptr()\n"
        "out = m.generate(**t('Once', return_tensors='pt'), max_new_tokens=4, do_sample=False)\n"
        "print(type(m).__name__, m.config.intermediate_size, out.shape[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(demo[0] / "model")],
        check=True,
        capture_output=True,
        text=True,
    )
    name, width, length = done.stdout.split()
    assert name == "LlamaForCausalLM" and int(width) < 1536 and int(length) >= 2


def test_left_padded_batches_generate_the_same_with_and_without_a_cache(demo: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(demo[0] / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(demo[0] / "model")
    texts = ["The heart is a muscle that", "Water"]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    new: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    cached = model.generate(**batch, use_cache=True, **new)
    assert torch.equal(cached, model.generate(**batch, use_cache=False, **new))


def test_the_command_plans_the_same(demo: Any) -> None:
    planned = surgeon("prune", "smollm2", "--ratio", "0.2", "--dry-run", "--json", "--no-verify")
    assert planned.code == 0, planned.err
    found = json.loads(planned.out)
    for key in ("parameters", "ratio", "axes", "source"):
        assert found[key] == demo[1]["report"][key]


def test_the_command_goes_on_alike_from_the_checkpoint_and_its_graph(demo: Any) -> None:
    prompt = ("The heart is a muscle that", "--max-new-tokens", "6")
    text = surgeon("generate", demo[0] / "model", *prompt)
    graph = surgeon("generate", demo[0] / "model.onnx", *prompt, "--tokenizer", demo[0] / "model")
    assert text.code == graph.code == 0 and text.out == graph.out
    assert text.out.startswith(prompt[0]) and len(text.out) > len(prompt[0]) + 5


def test_the_demonstration_runs_again_into_its_folder(demo: Any) -> None:
    before = (demo[0] / "model" / "model.safetensors").read_bytes()
    again = surgeon("demo", "-o", demo[0], "--windows", "1")
    assert again.code == 0, again.err
    for text in ("decoder-layer parameters", "perplexity", "before:", "after:", "onnx:"):
        assert text in again.out
    assert "NOT the same" not in again.out
    assert (demo[0] / "model" / "model.safetensors").read_bytes() == before
    assert not [p.name for p in demo[0].iterdir() if p.name.startswith(".")]
