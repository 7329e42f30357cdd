"""A checkpoint goes in, a smaller one comes out that Transformers loads without Surgeon."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgeon as api
from tests import models
from tests.command import Outcome, checkpoint, python, surgeon, weights_of
from tests.pruned_checkpoints import FAMILIES, dense

pytestmark = pytest.mark.slow

# Every checkpoint in the folder given, loaded by Transformers with Surgeon out of reach.
ALONE = """
import json, sys
sys.modules["surgeon"] = sys.modules["passes"] = None  # importing either now fails
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

out = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    remote = (folder / "modeling_surgeon_pruned.py").exists()
    found = {"remote": remote}
    for attention in ("eager", "sdpa"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=remote, attn_implementation=attention,
            output_loading_info=True, dtype=torch.float32,
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        model.eval()
        ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
        mask = (ids > 0).long()
        new = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        cached = model.generate(ids, attention_mask=mask, use_cache=True, **new)
        plain = model.generate(ids, attention_mask=mask, use_cache=False, **new)
        assert torch.equal(cached, plain), (folder.name, attention)
        # A forward in two pieces, the second with what the first one cached.
        with torch.no_grad():
            whole = model(ids, attention_mask=mask).logits
            first = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True)
            second = model(ids[:, 4:], attention_mask=mask, past_key_values=first.past_key_values)
        assert torch.isfinite(whole[mask.bool()]).all()
        apart = (second.logits - whole[:, 4:]).abs().max() / whole[mask.bool()].abs().max()
        assert apart < 1e-5, (folder.name, attention, float(apart))
        found[attention] = cached.tolist()
    assert found["eager"] == found["sdpa"]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    found["tied"] = head.weight is embedding.weight
    found["class"] = type(model).__name__
    found["parameters"] = sum(p.numel() for p in model.parameters())
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
        found["text"] = tokenizer.decode(tokenizer("hello")["input_ids"], skip_special_tokens=True)
    out[folder.name] = found
print(json.dumps(out))
"""


def ran(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


def load_alone(folder: Path) -> dict[str, Any]:
    return json.loads(ran(python(ALONE, folder)).out.splitlines()[-1])


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "surgeon.json").read_text())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    model = models.build("Llama")
    model.generation_config.max_new_tokens = 7
    model.generation_config.temperature = 0.625
    model.generation_config.do_sample = True
    return checkpoint(tmp_path_factory.mktemp("llama") / "m", model, tiny_tokenizer)


CUTS = {
    "ratio": ["--ratio", "0.2"],
    "kv": ["--role", "kv_heads=1/3", "--role", "q_per_kv=0.5"],
    "hidden": ["--role", "hidden=0.125"],
    "alias": ["--role", "hidden=0.1"],
    "layers": ["--role", "layers=0.5"],
    "qk": ["--role", "qk=0.5"],
    "v": ["--role", "v=0.25"],
    "one": ["--role", "ffn=0.25", "--only", "model.layers.0"],
    "all": ["--role", "ffn=0.25", "--role", "q_per_kv=0.5", "--role", "v=0.25", "--role", "qk=0.25",
            "--role", "hidden=0.1"],
}  # fmt: skip
ARCHITECTURES = {
    "alias": "MistralForCausalLM",
    **dict.fromkeys(("qk", "v", "one", "all"), "SurgeonPrunedForCausalLM"),
}


@pytest.fixture(scope="module")
def results(llama: Path) -> Path:
    """One folder of checkpoints, one for each of `CUTS`, all verified as they were written."""
    folder = llama.parent / "results"
    for name, args in CUTS.items():
        ran(surgeon("prune", llama, "-o", folder / name, *args))
    return folder


@pytest.mark.slow
def test_results_load_without_surgeon_and_generate(results: Path) -> None:
    found = load_alone(results)
    assert found.keys() == CUTS.keys()
    for name, loaded in found.items():
        report = report_of(results / name)
        assert loaded["class"] == ARCHITECTURES.get(name, "LlamaForCausalLM")
        assert report["target"]["architecture"] == loaded["class"]
        assert report["target"]["remote_code"] is loaded["remote"]
        assert report["parameters"]["total"]["after"] == loaded["parameters"]
        assert report["verification"]["largest"] <= 1e-4
        assert loaded["text"] == "hello" and not loaded["tied"]
    said = {name: " ".join(report_of(results / name)["notes"]) for name in CUTS}
    assert "rotary pairs are missing" in said["qk"] and "rotary" not in said["v"]
    assert "value heads and query heads differ" in said["v"]
    assert "its layers differ in width" in said["one"]
    assert not any("layers differ" in said[name] for name in CUTS if name != "one")
    notes = report_of(results / "alias")["notes"]
    assert any("MistralForCausalLM" in n and "divisible" in n for n in notes)


def test_what_belongs_to_the_tokenizer_and_generation_is_carried(
    llama: Path, results: Path
) -> None:
    for name in CUTS:
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (results / name / file).read_bytes() == (llama / file).read_bytes()


def test_files_of_other_kinds_are_not_carried(llama: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "README.md", "own.py"):
        (llama / name).write_text("not of the pruned model")
    ran(surgeon("prune", llama, "-o", tmp_path / "o", "--ratio", "0.2", "--no-verify"))
    names = {p.name for p in (tmp_path / "o").iterdir()}
    assert not names & {"pytorch_model.bin", "training_args.bin", "README.md", "own.py"}


def test_a_mistral_alias_has_no_window(results: Path) -> None:
    config = json.loads((results / "alias" / "config.json").read_text())
    assert config["model_type"] == "mistral" and config["sliding_window"] is None
    assert config["hidden_size"] == 43 and config["num_attention_heads"] == 6


def test_a_model_with_biases_becomes_granite(tmp_path: Path) -> None:
    for tied in (False, True):
        model = models.build("Llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
        source = checkpoint(tmp_path / f"m{tied}", model)
        out = tmp_path / "o" / str(tied)
        ran(surgeon("prune", source, "-o", out, "--role", "hidden=0.1", "--role", "ffn=0.25"))
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == ["GraniteForCausalLM"]
        assert any("Granite" in note for note in report_of(out)["notes"])
    found = load_alone(tmp_path / "o")
    assert {name: f["tied"] for name, f in found.items()} == {"False": False, "True": True}


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_four_families_have_layers_of_different_widths(tmp_path: Path, tied: bool) -> None:
    """Layer 0 loses its attention or half its heads: cache slots count what is left."""
    for family in FAMILIES:
        source = checkpoint(tmp_path / family, dense(family, tied))
        only = ["--only", "model.layers.0", "--only", "model.layers.2"]
        heads = ["--role", "kv_heads=1/3", "--role", "ffn=0.25", "--role", "v=0.25"]
        ran(surgeon("prune", source, "-o", tmp_path / "o" / f"{family}-heads", *heads, *only))
        plan = api.Plan(branches=("model.layers.0/attention", "model.layers.1/mlp"))
        api.prune(source, plan=plan).save(tmp_path / "o" / f"{family}-branches")
    for name, found in load_alone(tmp_path / "o").items():
        assert found["class"] == "SurgeonPrunedForCausalLM" and found["tied"] is tied
        assert report_of(tmp_path / "o" / name)["verification"]["largest"] <= 1e-4
        config = json.loads((tmp_path / "o" / name / "config.json").read_text())
        assert config["per_layer_config"].keys() < {"0", "1", "2"}


@pytest.mark.parametrize("name", ["Gemma2", "GPT2", "Phi3", "Olmo2"])
def test_other_families_with_different_widths_are_refused(tmp_path: Path, name: str) -> None:
    source = checkpoint(tmp_path / "m", models.tiny(name))
    first = next(n for n, _ in models.tiny(name).named_modules() if n.endswith(".0"))
    for more in ([], ["--dry-run"]):
        found = surgeon(
            "prune", source, "-o", tmp_path / "o", "--role", "ffn=0.25", "--only", first, *more
        )
        assert found.code == 1 and found.err.startswith("[target-refused]")
        assert "layers differ in width" in found.err and len(found.lines) == 4
        assert "no per-layer modelling file" in found.err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["GPT2", "GPTNeoX", "OPT", "StableLm"])
def test_classes_without_a_head_size_keep_their_heads(tmp_path: Path, name: str) -> None:
    source = checkpoint(tmp_path / "m", models.tiny(name))
    found = surgeon("prune", source, "-o", tmp_path / "o", "--role", "kv_heads=1/3")
    assert found.code == 1 and found.err.startswith("[target-refused]")
    ran(surgeon("prune", source, "-o", tmp_path / "o", "--role", "ffn=0.25"))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
@pytest.mark.zoo
def test_every_architecture_is_pruned_by_a_ratio(tmp_path: Path, name: str) -> None:
    model = models.tiny(name)
    source = checkpoint(tmp_path / "m", model)
    ran(surgeon("prune", source, "-o", tmp_path / "o", "--ratio", "0.15"))
    report = report_of(tmp_path / "o")
    assert abs(report["ratio"]["removed"] - 0.15) < 0.01
    assert report["target"]["architecture"] == type(model).__name__
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert type(loaded) is type(model)
    assert sum(p.numel() for p in loaded.parameters()) == report["parameters"]["total"]["after"]


def test_a_result_that_needs_no_code_names_none(llama: Path, tmp_path: Path) -> None:
    """Code that came with the source, such as a tokenizer's, doesn't come with the result."""
    source = Path(shutil.copytree(llama, tmp_path / "m"))
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "own.Tokenizer"]}
    (source / "config.json").write_text(json.dumps(config))
    assert surgeon("inspect", source).err.startswith("[remote-code]")
    trusted = ("--ratio", "0.2", "--trust-remote-code")
    ran(surgeon("prune", source, "-o", tmp_path / "o", *trusted))
    assert "auto_map" not in json.loads((tmp_path / "o" / "config.json").read_text())
    ran(surgeon("inspect", tmp_path / "o"))


def test_tied_weights_are_stored_once_and_tied_when_loaded(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", models.tiny("Llama", tie_word_embeddings=True))
    ran(surgeon("prune", source, "-o", tmp_path / "o", "--role", "hidden=0.125"))
    stored = weights_of(tmp_path / "o")
    assert ("lm_head.weight" in stored) + ("model.embed_tokens.weight" in stored) == 1
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_half_precision_is_kept_and_its_rounding_reported(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", models.build("Llama").to(torch.bfloat16))
    shown = ran(surgeon("prune", source, "-o", tmp_path / "o", "--role", "hidden=0.125")).out
    assert "rounding to the checkpoint's element type" in shown
    assert {t.dtype for t in weights_of(tmp_path / "o").values()} == {torch.bfloat16}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    found = report_of(tmp_path / "o")["verification"]
    assert found["largest"] <= 1e-4 < found["cast"] and found["rounded"] is True
    assert "rounding" in ran(surgeon("verify", tmp_path / "o")).out


def test_shards_are_read(llama: Path, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m", models.tiny("Llama"), max_shard_size="60KB")
    assert len(list(source.glob("model-*.safetensors"))) > 2
    for model, out in ((source, "sharded"), (llama, "whole")):
        ran(surgeon("prune", model, "-o", tmp_path / out, "--ratio", "0.2", "--no-verify"))
    sharded, whole = (weights_of(tmp_path / out) for out in ("sharded", "whole"))
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


# --- again ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of the results pruned once more, and that twice."""
    folder = tmp_path_factory.mktemp("again")
    for first in CUTS:
        share = ["--role", "ffn=0.1", "--role", "q_per_kv=0.5"]
        if first in ("kv", "all"):  # one query head to a group is left
            share = ["--role", "ffn=0.1"]
        once = folder / f"{first} once"
        ran(surgeon("prune", results / first, "-o", once, *share))
        ran(surgeon("prune", once, "-o", folder / f"{first} twice", "--ratio", "0.1"))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("first", CUTS)
def test_a_result_is_pruned_again(results: Path, again: Path, first: str) -> None:
    """Per-layer checkpoints too, without leave to run their code, and twice."""
    totals = [
        report_of(folder)["parameters"]["total"]
        for folder in (results / first, again / f"{first} once", again / f"{first} twice")
    ]
    for before, after in itertools.pairwise(totals):
        assert before["after"] == after["before"] > after["after"]
    ran(surgeon("verify", again / f"{first} twice"))
    assert ran(surgeon("inspect", again / f"{first} twice")).out


@pytest.mark.slow
def test_what_was_pruned_again_loads_without_surgeon(again: Path) -> None:
    found = load_alone(again)
    assert len(found) == 2 * len(CUTS)
    for name, loaded in found.items():
        assert loaded["remote"] is (name.split()[0] in ("qk", "v", "one", "all")), name
        assert loaded["text"] == "hello"


def test_pruning_in_two_steps_can_be_traced_back(results: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    ran(surgeon("prune", results / "ratio", "-o", out, "--role", "kv_heads=1/3"))
    assert report_of(out)["source"]["id"] == str(results / "ratio")
    assert (
        json.loads((out / "plan.json").read_text())["source"]["fingerprint"]
        != (json.loads((results / "ratio" / "plan.json").read_text())["source"]["fingerprint"])
    )


@pytest.mark.parametrize("name", ["alias", "all"])
def test_any_result_replays_to_the_same_bits(
    llama: Path, results: Path, tmp_path: Path, name: str
) -> None:
    ran(surgeon("prune", llama, "-o", tmp_path / "o", "--plan", results / name))
    for file in ("model.safetensors", "config.json", "plan.json"):
        assert (tmp_path / "o" / file).read_bytes() == (results / name / file).read_bytes()
