"""Checkpoints with 8 and 4 bits a weight: written, read back, loaded by Transformers, refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import surgeon as api
from surgeon.emit.lowbit import eight, four
from surgeon.errors import Code, SurgeonError
from surgeon.exporting import load
from surgeon.ready import open_ready
from surgeon.report.facts import module_bytes
from tests import models
from tests.command import checkpoint, surgeon
from tests.refusals import refused

pytestmark = pytest.mark.slow

SIMPLE = {"score": "magnitude", "select": "uniform", "compensate": ()}
IDS = models.tokens(100)


def pruned(ratio: float = 0.25, tied: bool = True, **options: Any) -> api.Pruned:
    model = models.tiny("Llama", tie_word_embeddings=tied)
    return api.prune(model, roles={"ffn": ratio}, verify=False, **SIMPLE, **options)


def loaded(folder: Path) -> Any:
    remote = (folder / "modeling_surgeon_pruned.py").exists()
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=remote, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def apart(a: Any, b: Any) -> float:
    with torch.no_grad():
        want, got = a(IDS).logits, b(IDS).logits
    return float((want - got).abs().max() / want.abs().max())


def unpacked(folder: Path, dense: Any) -> Any:
    """A model in full precision with what the stored weights stand for."""
    stored, state = load_file(folder / "model.safetensors"), {}
    for name in dense.state_dict():
        for packed, read in (
            (four.names(name), four.read),
            (eight.names(name, stored), eight.read),
        ):
            if packed and packed <= stored.keys():
                state[name] = read(name, stored)[0]
    assert state
    made = copy.deepcopy(dense)
    made.load_state_dict(state, strict=False)
    return made


NEAR = {"int8": 0.2, "w8": 0.1, "int4": 0.9}
"""Of these models' logits, whose weights are drawn at random."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", NEAR)
def test_every_scheme_is_written_and_loads_and_is_near(
    tmp_path: Path, scheme: str, tied: bool
) -> None:
    dense, out = pruned(tied=tied), tmp_path / "out"
    report = dense.save(out, quantize=scheme)
    found = report.quantize
    assert found is not None
    assert found["weights"] == 14
    assert 0.3 < found["largest_step"] <= 0.501
    assert 0 < found["logits"] < NEAR[scheme]
    before, after = found["steps"]
    assert after["bytes"] == (out / "model.safetensors").stat().st_size < before["bytes"]
    assert not [p for p in out.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    model = loaded(out)
    assert apart(dense.model, model) < NEAR[scheme]
    # Where activations are not rounded, it computes with the values that are stored.
    assert apart(unpacked(out, dense.model), model) < (0.2 if scheme == "int8" else 1e-5)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 14)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is table.weight) is tied
    assert type(table.weight) is torch.nn.Parameter
    # What it holds in memory is what is in the file, and a little beside it.
    held = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert held <= module_bytes(loaded(out)) < 1.1 * held
    assert json.loads((out / "surgeon.json").read_text())["quantize"] == found


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_and_the_head_are_rounded_where_asked_for(tmp_path: Path, tied: bool) -> None:
    dense, out = pruned(tied=tied), tmp_path / "out"
    report = dense.save(out, quantize={"scheme": "w8", "embeddings": True})
    assert report.quantize is not None and report.quantize["weights"] == (15 if tied else 16)
    model = loaded(out)
    assert type(model.get_output_embeddings().weight).__name__ == "Int8Tensor"
    assert apart(unpacked(out, dense.model), model) < 1e-5
    with safe_open(out / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if name.endswith("embed_tokens.weight")]  # noqa: SIM118


def test_a_group_that_does_not_divide_a_row_is_made_smaller_and_said(tmp_path: Path) -> None:
    report = pruned().save(tmp_path / "out", quantize="int4")  # 80 channels become 60
    assert any("groups of 30" in note and "down_proj" in note for note in report.notes)
    assert any("groups of 24" in note and "q_proj" in note for note in report.notes)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.weight_scale"].shape[1] == 60 // 30
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].shape[1] == 48 // 24


def test_a_row_without_a_group_stays_in_full_precision_and_is_said(tmp_path: Path) -> None:
    dense = pruned(13 / 80)  # a prime number of channels, which only itself divides
    report = dense.save(tmp_path / "out", quantize="int4")
    assert report.quantize is not None and report.quantize["weights"] == 12
    assert any("stays as it is" in note for note in report.notes)
    assert apart(dense.model, loaded(tmp_path / "out")) < NEAR["int4"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_layers_of_different_width(tmp_path: Path, scheme: str) -> None:
    dense, out = pruned(only=["*layers.0*"]), tmp_path / "out"
    dense.save(out, quantize=scheme)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "surgeon_pruned" and config["quantization_config"]
    assert apart(dense.model, loaded(out)) < NEAR[scheme]


def test_a_half_precision_checkpoint(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "bf16", models.build("Llama").bfloat16())
    for scheme in ("int8", "int4"):
        api.quantize(source, tmp_path / scheme, scheme)
        model = loaded(tmp_path / scheme)
        with torch.no_grad():
            assert model(IDS).logits.dtype == torch.bfloat16


def test_a_recipe_prunes_rounds_and_packs_in_one_run_without_a_second_loss(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", models.tokens(100, 1, 600).numpy()[0])
    source = checkpoint(tmp_path / "dense", models.build("Llama"), models.tokenizer())
    (tmp_path / "r.yaml").write_text(
        "version: 1\n"
        "budget: {roles: {ffn: 0.25}}\n"
        f"calibration: {{sources: [{tmp_path / 'ids.npy'}], samples: 4, length: 32}}\n"
        "passes: [{score: magnitude}, {select: uniform}, {transform: gptq, group: 24}]\n"
        "quantize: {scheme: int4, group: 24}\n"
    )
    (tmp_path / "text.txt").write_text("A text to be scored, some words long. " * 9)
    done = surgeon(
        *("run", tmp_path / "r.yaml", source, "-o", tmp_path / "out", "--json"),
        *("--measure-text", tmp_path / "text.txt", "--measure-window", 32),
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["as_recipe"]["quantize"] == {"scheme": "int4", "group": 24}
    found = report["quantize"]
    assert found["without_loss"] == found["weights"] == 14
    assert found["largest_step"] < 1e-4
    assert found["logits"] < 1e-4
    assert [step["name"] for step in found["steps"]] == ["pruned", "int4"]
    before, after = (step["perplexity"] for step in found["steps"])
    assert after == pytest.approx(before, rel=1e-4)
    again = surgeon("verify", tmp_path / "out")
    assert again.code == 0, again.err
    scored = surgeon("eval", tmp_path / "out", "--text", tmp_path / "text.txt", "--window", 32)
    assert scored.code == 0, scored.err
    _, tokenizer = load(str(tmp_path / "out"), device="cpu")
    assert tokenizer is not None


def test_options_hold_in_place_of_the_recipe(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", models.build("Llama"))
    simple = ("--role", "ffn=0.25", "--score", "magnitude", "--select", "uniform")
    simple += ("--compensate", "none", "--quantize", "int4", "--quantize-option", "group=16")
    done = surgeon("prune", source, "-o", tmp_path / "out", "--json", *simple)
    assert done.code == 0, done.err
    assert json.loads(done.out)["quantize"]["group"] == 16


def test_a_stored_weight_that_is_not_the_plans_is_found(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", models.build("Llama"))
    assert surgeon("quantize", source, "-o", tmp_path / "out", "--scheme", "w8").code == 0
    file = tmp_path / "out" / "model.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    state = load_file(file)
    state["model.layers.1.mlp.up_proj._weight_qdata"][3, 5] += 1
    save_file(state, file, metadata=header)
    refused(surgeon("verify", tmp_path / "out"), "verify-failed", "up_proj", "of a step")


def test_a_quantised_folder_is_not_pruned(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "dense", models.build("Llama"))
    assert surgeon("quantize", source, "-o", tmp_path / "q", "--scheme", "int4").code == 0
    for command in (("prune", "--ratio", "0.2"), ("quantize",)):
        name, *options = command
        outcome = surgeon(name, tmp_path / "q", "-o", tmp_path / "out", *options)
        refused(outcome, "bad-checkpoint", "quantised (compressed-tensors)", "quantise the result")


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        (("--quantize", "int3"), "bad-option", "int8, w8, int4"),
        (("--quantize", "int8", "--quantize-option", "group=64"), "bad-option", "no groups"),
        (("--quantize", "int4", "--quantize-option", "group=2"), "bad-option", "2 weights"),
        (("--quantize", "int4", "--quantize-option", "embeddings=true"), "bad-option", "lookup"),
        (("--quantize", "int4", "--quantize-option", "bits=3"), "bad-option", "'bits'"),
        (("--quantize-option", "group=64"), "bad-option", "belongs to a scheme"),
        (("--quantize", "int8", "--to", "onnx"), "target-refused", "surgeon export"),
        (("--measure-text", __file__), "bad-option", "nothing is quantised"),
    ],
)
def test_refusals(tmp_path: Path, options: tuple[str, ...], code: str, text: str) -> None:
    source = checkpoint(tmp_path / "dense", models.build("Llama"))
    outcome = surgeon("prune", source, "-o", tmp_path / "out", "--role", "ffn=0.25", *options)
    refused(outcome, code, text)
    assert not (tmp_path / "out").exists()


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else find(name, *a)
    )
    with pytest.raises(SurgeonError, match="quantize") as caught:
        api.prune(models.tiny("Llama"), roles={"ffn": 0.25}, quantize="int8", **SIMPLE)
    assert caught.value.code is Code.MISSING_EXTRA


def test_a_model_without_linear_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgeonError, match="nothing to quantise"):
        api.quantize(models.tiny("GPT2"), tmp_path / "out", "w8")


def test_what_a_plan_replaced_is_no_part_of_its_size(tmp_path: Path) -> None:
    out = tmp_path / "out"
    pruned().save(out, quantize="w8")
    shutil.copyfile(out / "model.safetensors", out / "plan.safetensors")
    facts = open_ready(str(out)).facts
    assert facts.disk_bytes == (out / "model.safetensors").stat().st_size
