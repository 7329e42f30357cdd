"""Sources that are no model, and models whose weights are not whole."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.command import surgeon
from tests.refusals import RATIO, prune, refused, rewrite

pytestmark = pytest.mark.slow

# --- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "nowhere", "/nowhere/at/all", "./nowhere/x/y"])
@pytest.mark.parametrize("command", ["prune", "inspect", "ir", "export", "eval", "generate"])
def test_a_name_of_nothing(command: str, name: str, tmp_path: Path) -> None:
    rest = {
        "prune": ["-o", tmp_path / "o", *RATIO],
        "export": ["--to", "onnx", "-o", tmp_path / "o"],
        "generate": ["hello"],
    }
    refused(surgeon(command, name, *rest.get(command, [])), "not-a-model")
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    found = prune("org/model", tmp_path / "o", *RATIO)
    refused(found, "not-a-model", "from the hub", "Name or service not known")


@pytest.mark.parametrize("suffix", [".txt", ".onnx", ".pt2", ".bin", ".safetensors"])
def test_a_file_of_another_kind(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"something else")
    refused(prune(file, tmp_path / "o", *RATIO), "not-a-model", file.name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    refused(prune(tmp_path / "m", tmp_path / "o", *RATIO), "not-a-model", "no config.json")


def test_a_checkpoint_of_pickles(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(prune(copy, tmp_path / "o", *RATIO), "bad-checkpoint", "pickle")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"model_type": "llama"', "{}", "\x00\x01", '{"model_type": 3}']
)
def test_a_config_that_is_none(copy: Path, tmp_path: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    refused(prune(copy, tmp_path / "o", *RATIO), "not-a-model", "config.json")


def test_a_config_that_is_not_text(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_bytes(b"\xff\xfe{\x00")
    refused(prune(copy, tmp_path / "o", *RATIO), "not-a-model", "config.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", "wide"), ("hidden_size", 10**15), ("hidden_size", -48)),
        *(("num_attention_heads", 0), ("num_attention_heads", 10**12)),
        *(("num_hidden_layers", -1), ("num_hidden_layers", 10**9), ("num_hidden_layers", 1.5)),
        *(("num_key_value_heads", "3"), ("head_dim", -2), ("head_dim", 10**18)),
        *(("vocab_size", 10**30), ("vocab_size", None), ("intermediate_size", float("nan"))),
        *(("rms_norm_eps", float("nan")), ("rope_parameters", [3]), ("hidden_act", "../x")),
    ],
)
def test_a_config_of_nonsense(copy: Path, tmp_path: Path, key: str, value: object) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, key: value}))
    found = prune(copy, tmp_path / "o", *RATIO)
    assert found.code == 1 and "Traceback" not in found.err
    assert len(found.lines) == 4 and found.err.startswith("[")


@pytest.mark.parametrize("kind", ["BertConfig", "ViTConfig", "T5Config", "CLIPConfig"])
def test_a_model_that_is_no_decoder(tmp_path: Path, kind: str) -> None:
    config = getattr(transformers, kind)()
    (tmp_path / "m").mkdir()
    config.save_pretrained(tmp_path / "m")
    found = surgeon("inspect", tmp_path / "m" / "config.json")
    refused(found, "not-a-model")


def test_an_unknown_architecture(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    text = json.dumps({**config, "model_type": "lama", "architectures": ["LamaForCausalLM"]})
    (copy / "config.json").write_text(text)
    refused(prune(copy, tmp_path / "o", *RATIO), "not-a-model", "'lama'", "llama")


def test_code_of_its_own_is_not_run_unasked(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (copy / "own.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    config = json.loads((copy / "config.json").read_text())
    refs = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": refs}))
    refused(prune(copy, tmp_path / "o", *RATIO), "remote-code", "--trust-remote-code")
    assert not mark.exists()


def test_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name.startswith("llm_") else found(name, package)

    monkeypatch.setattr("importlib.util.find_spec", without)
    refused(prune("smollm2", tmp_path / "o", *RATIO), "missing-extra", "model-surgeon[demo]")


# --- weights -------------------------------------------------------------------------------------


def test_a_missing_shard(shards: Path, tmp_path: Path) -> None:
    last = sorted(shards.glob("model-*.safetensors"))[-1]
    last.unlink()
    refused(prune(shards, tmp_path / "o", *RATIO), "missing-file", last.name)


def test_a_missing_index(shards: Path, tmp_path: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    refused(prune(shards, tmp_path / "o", *RATIO), "missing-file", "index")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(shards: Path, tmp_path: Path, text: str) -> None:
    (shards / "model.safetensors.index.json").write_text(text)
    refused(prune(shards, tmp_path / "o", *RATIO), "bad-checkpoint", "index")


def test_a_missing_index_entry(shards: Path, tmp_path: Path) -> None:
    file = shards / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    gone = "model.layers.1.mlp.up_proj.weight"
    del index["weight_map"][gone]
    file.write_text(json.dumps(index))
    refused(prune(shards, tmp_path / "o", *RATIO), "bad-checkpoint", gone)


@pytest.mark.parametrize("left", [0, 4, 100, 0.5, -1])
def test_a_truncated_file(copy: Path, tmp_path: Path, left: float) -> None:
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(left * len(data)) if left == 0.5 else int(left)])
    refused(prune(copy, tmp_path / "o", *RATIO), "bad-checkpoint", "model.safetensors")


def test_a_missing_tensor(copy: Path, tmp_path: Path) -> None:
    rewrite(copy, lambda state: state.pop("model.norm.weight"))
    refused(prune(copy, tmp_path / "o", *RATIO), "bad-checkpoint", "model.norm.weight")


def test_a_tensor_of_another_shape(copy: Path, tmp_path: Path) -> None:
    rewrite(copy, lambda state: state.update({"model.norm.weight": torch.ones(47)}))
    refused(prune(copy, tmp_path / "o", *RATIO), "bad-checkpoint", "model.norm.weight", "47", "48")


def test_weights_that_are_no_numbers(copy: Path, tmp_path: Path) -> None:
    def spoil(state: dict[str, torch.Tensor]) -> None:
        state["model.layers.0.mlp.up_proj.weight"][3, 4] = torch.nan

    rewrite(copy, spoil)
    found = prune(copy, tmp_path / "o", *RATIO)
    refused(found, "bad-plan", "NaN")


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"nothing of the kind"])
def test_a_gguf_file_that_is_none(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    found = prune(file, tmp_path / "o", *RATIO)
    assert found.code == 1 and found.err.startswith(("[bad-checkpoint]", "[not-a-model]"))
    assert len(found.lines) == 4 and str(file) in found.err
