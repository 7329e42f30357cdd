"""Everything that needs the pretrained model, in one file so that one worker reads it once.

The demonstration is whole: a pretrained Llama pruned, loaded back, exported and run.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from surgeon.capture.gguf_file import GGUFHeader
from surgeon.capture.source import resolve
from surgeon.emit.onnx_graph import check_onnx, write_onnx
from surgeon.emit.pt2 import samples
from surgeon.report import evaluate
from surgeon.report.evaluate import perplexity
from tests.command import surgeon
from tests.gguf_files import gguf_weights
from tests.unit.test_emit_pt2 import captured, forward

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    ran = surgeon("demo", "-o", out, "--windows", "1")
    assert ran.code == 0, ran.err
    for text in ("decoder-layer parameters", "perplexity", "before:", "after:", "onnx:"):
        assert text in ran.out
    assert "NOT the same" not in ran.out
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


def test_the_command_goes_on_alike_from_the_checkpoint_and_its_graph(demo: Any) -> None:
    prompt = ("The heart is a muscle that", "--max-new-tokens", "6")
    text = surgeon("generate", demo[0] / "model", *prompt)
    graph = surgeon("generate", demo[0] / "onnx", *prompt)
    assert text.code == graph.code == 0 and text.out == graph.out
    assert text.out.startswith(prompt[0]) and len(text.out) > len(prompt[0]) + 5


# --- the model itself ----------------------------------------------------------------------------


def test_smollm2_is_a_source() -> None:
    source = resolve("smollm2")
    assert (source.kind, source.id, source.quantized) == ("alias", "smollm2", "Q4_1")
    assert source.config.num_hidden_layers == 30
    assert source.tokenizer("Hello")["input_ids"]


def test_smollm2_is_read_as_transformers_reads_it(
    smollm2: tuple[Any, Any], smollm2_gguf: Path
) -> None:
    import gguf

    model, _ = smollm2
    header = GGUFHeader(smollm2_gguf)
    assert header.architecture == "llama" and header.quantised == "Q4_1"
    theirs = [
        (t.name, t.tensor_type.name, int(t.data_offset), int(t.n_bytes))
        for t in gguf.GGUFReader(smollm2_gguf).tensors
    ]
    assert [(t.name, t.kind, t.start, t.nbytes) for t in header.tensors] == theirs
    weights = gguf_weights(smollm2_gguf, model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name


def test_smollm2_on_the_built_in_text(smollm2: Any) -> None:
    """A wrong shift, window or tokenisation moves this by far more than its tolerance."""
    model, tokenizer = smollm2
    result = perplexity(model, tokenizer, window=256, max_windows=4)
    own = evaluate.default_text().content
    ids = torch.tensor(tokenizer(own, add_special_tokens=False)["input_ids"][:1024]).view(4, 1, 256)
    with torch.no_grad():
        expected = math.exp(sum(model(x, labels=x).loss.item() for x in ids) / 4)
    assert result.perplexity == pytest.approx(expected, rel=1e-4)
    assert 2 < result.perplexity < 40


def test_smollm2_in_onnx_runtime(smollm2: Any, tmp_path: Path) -> None:
    model, _ = smollm2
    program, weights = captured(model)
    path = tmp_path / "model.onnx"
    written = write_onnx(program, weights, path, check=False)
    assert check_onnx(path, forward(model), samples(program)) < 1e-4
    assert written.nodes < 2000
    weighed = sum(p.numel() * 4 for p in model.parameters())
    assert path.stat().st_size < weighed + 1_000_000  # the tied embedding once
