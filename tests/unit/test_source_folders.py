"""Checkpoint folders, configurations and the code that comes with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from surgeon.capture.model import all_params, capture_model
from surgeon.capture.source import resolve
from surgeon.errors import Code, SurgeonError
from tests import models, pruned_checkpoints
from tests.sources import edit, refused, saved

pytestmark = pytest.mark.slow

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
