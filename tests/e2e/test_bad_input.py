"""Every mistake of the user: four parts on standard error, exit code 1, nothing written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests import models
from tests.command import Outcome, checkpoint, surgeon

RATIO = ("--ratio", "0.2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama") / "m", models.tiny("Llama"), tiny_tokenizer)


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "model", models.tiny("Llama"), max_shard_size="60KB")


def refused(outcome: Outcome, code: str, *texts: str) -> Outcome:
    """Asserts the four parts, each with something in it, and these texts among them."""
    assert outcome.code == 1, outcome.err
    assert outcome.out == ""
    assert re.fullmatch(
        r"\[[a-z-]+\] \S[^\n]*\n  at  \S[^\n]*\n  why \S[^\n]*\n  try \S[^\n]*\n", outcome.err
    ), outcome.err
    assert outcome.err.startswith(f"[{code}] "), outcome.err
    for text in texts:
        assert text in outcome.err
    return outcome


def prune(model: object, out: Path, *args: object) -> Outcome:
    """Prunes, and sees to it that a refusal leaves nothing beside `out` either."""
    before = sorted(out.parent.rglob("*"))
    outcome = surgeon("prune", model, "-o", out, *args)
    if outcome.code:
        assert sorted(out.parent.rglob("*")) == before
    return outcome


# --- ratios and roles ----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1", "1.5", "nan", "inf", "-inf", "-1/3", "4/3"])
def test_a_ratio_is_between_0_and_1(llama: Path, tmp_path: Path, ratio: str) -> None:
    refused(prune(llama, tmp_path / "o", "--ratio", ratio), "bad-ratio", "at  --ratio\n")
    role = prune(llama, tmp_path / "o", "--role", f"ffn={ratio}")
    refused(role, "bad-ratio", "at  --role ffn\n")


@pytest.mark.parametrize("ratio", ["abc", "", "1/0", "1/3/4", "20%", "0,2"])
def test_a_ratio_is_a_number(llama: Path, tmp_path: Path, ratio: str) -> None:
    refused(prune(llama, tmp_path / "o", "--ratio", ratio), "bad-ratio", repr(ratio))
    refused(prune(llama, tmp_path / "o", "--role", f"ffn={ratio}"), "bad-ratio", repr(ratio))


@pytest.mark.parametrize("role", ["ffn", "=0.2", ""])
def test_a_role_comes_with_its_share(llama: Path, tmp_path: Path, role: str) -> None:
    refused(prune(llama, tmp_path / "o", "--role", role), "bad-option", "NAME=VALUE")


def test_a_role_comes_once(llama: Path, tmp_path: Path) -> None:
    found = prune(llama, tmp_path / "o", "--role", "ffn=0.1", "--role", "ffn=0.2")
    refused(found, "bad-option", "twice")


def test_something_must_say_how_much(llama: Path, tmp_path: Path) -> None:
    refused(prune(llama, tmp_path / "o"), "bad-ratio", "--ratio 0.2")


@pytest.mark.parametrize(
    "role", ["ffn=0.999", "kv_heads=0.9", "q_per_kv=0.8", "v=0.99", "qk=0.9", "hidden=0.999"]
)
def test_no_axis_is_emptied(llama: Path, tmp_path: Path, role: str) -> None:
    refused(prune(llama, tmp_path / "o", "--role", role), "empty-axis", role.partition("=")[0])


def test_a_layer_is_left(llama: Path, tmp_path: Path) -> None:
    refused(prune(llama, tmp_path / "o", "--role", "layers=0.9"), "empty-axis", "2 layers")


def test_a_ratio_beyond_every_limit_says_what_is_reachable(llama: Path, tmp_path: Path) -> None:
    found = refused(prune(llama, tmp_path / "o", "--ratio", "0.99"), "bad-ratio", "a ratio up to")
    reach = re.search(r"a ratio up to (0\.\d+)", found.err)
    assert reach is not None
    assert surgeon("prune", llama, "--dry-run", "--ratio", reach[1]).code == 0


def test_roles_beyond_the_ratio_are_refused(llama: Path, tmp_path: Path) -> None:
    args = ("--role", "kv_heads=1/3", "--ratio", "0.05")
    refused(prune(llama, tmp_path / "o", *args), "bad-ratio", "beyond")


def test_an_unknown_role_gets_those_there_are(llama: Path, tmp_path: Path) -> None:
    found = prune(llama, tmp_path / "o", "--role", "wings=0.1")
    refused(found, "no-such-role", "'wings'", "hidden, kv_heads, q_per_kv, rotary, v, ffn, layers")


def test_a_role_that_may_not_be_pruned_says_why(llama: Path, tmp_path: Path) -> None:
    found = prune(llama, tmp_path / "o", "--role", "vocab=0.1")
    refused(found, "pinned", "rows are picked by numbers")


def test_a_glob_without_a_match_is_refused(llama: Path, tmp_path: Path) -> None:
    for option in ("--freeze", "--only"):
        found = prune(llama, tmp_path / "o", *RATIO, option, "model.layers.7")
        refused(found, "no-such-axis", "'model.layers.7'")


def test_nothing_left_to_prune_is_refused(llama: Path, tmp_path: Path) -> None:
    refused(prune(llama, tmp_path / "o", *RATIO, "--freeze", "*"), "bad-ratio", "no role is left")
    found = prune(llama, tmp_path / "o", "--role", "ffn=0.2", "--only", "hidden")
    refused(found, "bad-option", "--only")


# --- passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name", "near"), [
    ("score", "magnitud", "magnitude"),
    ("score", "xyz", "magnitude, random"),
    ("select", "unifrom", "uniform"),
])  # fmt: skip
def test_an_unknown_pass_gets_the_nearest(
    llama: Path, tmp_path: Path, kind: str, name: str, near: str
) -> None:
    found = prune(llama, tmp_path / "o", *RATIO, f"--{kind}", name)
    refused(found, "no-such-pass", repr(name), near)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("score", "q=1", "its options are p, normalise"),
        ("score", "p=3", "Input should be 1"),
        ("score", "p=[1", "YAML"),
        ("score", "p", "NAME=VALUE"),
        ("score", "normalise=half", "normalise"),
        ("select", "multiple_of=0", "multiple_of"),
        ("select", "multiple_of=-8", "multiple_of"),
        ("select", "multiple_of=x", "multiple_of"),
        ("select", "ffn_limit=.nan", "ffn_limit"),
        ("select", "ffn_limit=5", "ffn_limit"),
    ],
)
def test_an_option_that_a_pass_does_not_take(
    llama: Path, tmp_path: Path, option: str, value: str, text: str
) -> None:
    found = prune(llama, tmp_path / "o", *RATIO, f"--{option}-option", value)
    refused(found, "bad-option", text)


# --- outputs -------------------------------------------------------------------------------------


def test_somewhere_to_write_is_needed(llama: Path) -> None:
    refused(surgeon("prune", llama, *RATIO), "bad-output", "--dry-run")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_something_else_is_left_alone(
    llama: Path, tmp_path: Path, overwrite: list[str]
) -> None:
    mine = tmp_path / "o" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    refused(prune(llama, tmp_path / "o", *RATIO, *overwrite), "bad-output", "not empty")
    assert mine.read_text() == "mine"


def test_a_file_is_no_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "o").write_text("mine")
    refused(prune(llama, tmp_path / "o", *RATIO, "--overwrite"), "bad-output", "it is a file")
    refused(prune(llama, tmp_path / "o" / "below", *RATIO), "bad-output", "is a file")
    assert (tmp_path / "o").read_text() == "mine"


def test_the_model_itself_is_not_overwritten(copy: Path) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    refused(surgeon("prune", copy, "-o", copy, *RATIO, "--overwrite"), "bad-output")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_a_folder_that_may_not_be_written_to(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions don't stop root, so the answer is given in the system's place.
    monkeypatch.setattr("os.access", lambda *args, **kwargs: False)
    refused(prune(llama, tmp_path / "o", *RATIO), "bad-output", "can't be written to")


def test_a_file_system_that_refuses(llama: Path) -> None:
    found = surgeon("prune", llama, "-o", "/proc/surgeon-test", *RATIO)
    assert found.code == 1 and found.err.startswith(("[bad-output]", "[disk-full]")), found.err


def test_a_disk_without_room_is_seen_before_writing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(prune(llama, tmp_path / "o", *RATIO), "disk-full", "make room")


def test_a_disk_that_fills_up_while_writing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("surgeon.emit.huggingface.write_safetensors", full)
    refused(prune(llama, tmp_path / "o", *RATIO), "disk-full", "ran full")


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_an_export_refuses_its_output_before_working(llama: Path, tmp_path: Path, to: str) -> None:
    for path in (tmp_path, tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("mine")
        refused(surgeon("export", llama, "--to", to, "-o", path), "bad-output")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_demonstration_refuses_before_it_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(surgeon("demo", "-o", tmp_path / "o", "--ratio", "2"), "bad-ratio")
    refused(surgeon("demo", "-o", tmp_path / "file"), "bad-output")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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
    [("hidden_size", "wide"), ("num_attention_heads", 0), ("num_hidden_layers", -1)],
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
    monkeypatch.setattr("importlib.util.find_spec", lambda *args: None)
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


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file, metadata={"format": "pt"})


@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + b"\xff" * 60, b"nothing of the kind"])
def test_a_gguf_file_that_is_none(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    found = prune(file, tmp_path / "o", *RATIO)
    assert found.code == 1 and found.err.startswith(("[bad-checkpoint]", "[not-a-model]"))
    assert len(found.lines) == 4 and str(file) in found.err


# --- plans and results ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(llama: Path) -> Path:
    out = llama.parent / "pruned"
    assert surgeon("prune", llama, "-o", out, *RATIO).code == 0
    return out


def changed_plan(pruned: Path, tmp_path: Path, **changes: Any) -> Path:
    plan = json.loads((pruned / "plan.json").read_text())
    plan["cuts"][0].update(changes.pop("cut", {}))
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**plan, **changes}))
    return file


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"version": 99}', '{"version": 1}'])
def test_a_plan_that_is_none(llama: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    found = prune(llama, tmp_path / "o", "--plan", tmp_path / "plan.json")
    refused(found, "bad-plan", "plan.json")


def test_a_plan_that_is_not_there(llama: Path, tmp_path: Path) -> None:
    refused(prune(llama, tmp_path / "o", "--plan", tmp_path / "x"), "missing-file")
    refused(prune(llama, tmp_path / "o", "--plan", llama), "missing-file", "plan.json")


def test_a_plan_of_other_weights(pruned: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "m", models.build("Llama", seed=1))
    refused(prune(other, tmp_path / "o", "--plan", pruned), "plan-mismatch", str(other))


def test_a_plan_of_other_sizes(pruned: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "m", models.tiny("Llama", intermediate_size=64))
    found = prune(other, tmp_path / "o", "--plan", pruned)
    refused(found, "plan-mismatch", "64 indices", "made for 80")


@pytest.mark.parametrize(
    ("cut", "code"),
    [
        ({"axis": "model.layers.9.mlp/ffn"}, "plan-mismatch"),
        ({"size": 81}, "plan-mismatch"),
        ({"kept": []}, "empty-axis"),
        ({"kept": [0, 80]}, "bad-plan"),
        ({"kept": [3, 2]}, "bad-plan"),
        ({"kept": [2, 2]}, "bad-plan"),
        ({"kept": [-1, 2]}, "bad-plan"),
        ({"kept": [[0, 1], [2]]}, "bad-plan"),
        ({"kept": ["a"]}, "bad-plan"),
        ({"kept": [0.5]}, "bad-plan"),
        ({"axis": "model.embed_tokens/vocab", "size": 101, "kept": [0]}, "pinned"),
    ],
)
def test_a_plan_that_does_not_fit(
    llama: Path, pruned: Path, tmp_path: Path, cut: dict[str, Any], code: str
) -> None:
    plan = changed_plan(pruned, tmp_path, cut=cut)
    refused(prune(llama, tmp_path / "o", "--plan", plan), code)


def test_a_plan_with_an_unknown_branch(llama: Path, pruned: Path, tmp_path: Path) -> None:
    plan = changed_plan(pruned, tmp_path, branches=["model.layers.7/mlp"])
    refused(prune(llama, tmp_path / "o", "--plan", plan), "plan-mismatch", "model.layers.7/mlp")


def test_a_plan_without_its_rewrites(llama: Path, pruned: Path, tmp_path: Path) -> None:
    plan = changed_plan(pruned, tmp_path, rewrites=["model.norm.weight"])
    refused(prune(llama, tmp_path / "o", "--plan", plan), "missing-file", "plan.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model.layers.1.mlp.down_proj.weight"][0].mul_(1.001),
        lambda t: t["lm_head.weight"][100].zero_(),
        lambda t: t.update({"extra": torch.ones(2)}),
        lambda t: t.pop("model.norm.weight"),
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()}),
        lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1].clone()}),
    ],
)
def test_a_result_that_was_tampered_with(
    pruned: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> None:
    copied = Path(shutil.copytree(pruned, tmp_path / "o"))
    rewrite(copied, change)
    refused(surgeon("verify", copied), "verify-failed", str(copied))


def test_a_result_whose_config_was_tampered_with(pruned: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(pruned, tmp_path / "o"))
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.2}))
    refused(surgeon("verify", copied), "verify-failed", "largest logit")


def test_a_result_whose_code_was_tampered_with(llama: Path, tmp_path: Path) -> None:
    out, mark = tmp_path / "o", tmp_path / "ran"
    args = ("--role", "ffn=0.2", "--only", "model.layers.0", "--no-verify")
    assert prune(llama, out, *args).code == 0
    code = out / "modeling_surgeon_pruned.py"
    code.write_text(code.read_text() + f"\nopen({str(mark)!r}, 'w').close()\n")
    refused(surgeon("verify", out), "remote-code")
    assert not mark.exists()


def test_a_result_that_is_none(llama: Path, tmp_path: Path) -> None:
    refused(surgeon("verify", tmp_path / "nowhere"), "missing-file")
    refused(surgeon("verify", llama), "missing-file", "plan.json")


# --- texts and prompts ---------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt(llama: Path, prompt: str) -> None:
    refused(surgeon("generate", llama, prompt), "bad-text-input", "empty")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--max-new-tokens", "0"], "bad-option"),
        (["--max-new-tokens", "100"], "bad-text-input"),
        (["--temperature", "-1"], "bad-option"),
        (["--temperature", "nan"], "bad-option"),
        (["--top-k", "5"], "bad-option"),
        (["--temperature", "1", "--top-p", "2"], "bad-option"),
        (["--tokenizer", "nowhere"], "not-a-model"),
    ],
)
def test_generating_with_nonsense(llama: Path, args: list[str], code: str) -> None:
    refused(surgeon("generate", llama, "hello", *args), code)


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["--window", "1"], "bad-option"),
        (["--window", "65"], "bad-option"),
        (["--windows", "0", "--window", "8"], "bad-option"),
        (["--text", "nowhere", "--window", "8"], "missing-file"),
    ],
)
def test_scoring_with_nonsense(llama: Path, args: list[str], code: str) -> None:
    refused(surgeon("eval", llama, *args), code)


def test_a_text_that_is_short_or_none(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("short")
    refused(surgeon("eval", llama, "--text", text, "--window", "32"), "bad-text-input", "5 tokens")
    text.write_bytes(b"\xff\xfe\xfd" * 99)
    refused(surgeon("eval", llama, "--text", text, "--window", "32"), "bad-text-input", "UTF-8")


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    bare = checkpoint(tmp_path / "m", models.tiny("Llama"))
    refused(surgeon("generate", bare, "hello"), "missing-file", "--tokenizer FOLDER")
    refused(surgeon("eval", bare, "--window", "8"), "missing-file", "--tokenizer FOLDER")


def test_a_graph_that_is_none(tmp_path: Path) -> None:
    refused(surgeon("eval", tmp_path / "no.onnx"), "missing-file")
    (tmp_path / "bad.onnx").write_bytes(b"nothing of the kind")
    for command in (["eval"], ["generate"]):
        rest = ["hello"] if command == ["generate"] else []
        found = surgeon(*command, tmp_path / "bad.onnx", *rest)
        assert found.code == 1 and len(found.lines) == 4, found.err


# --- interruption --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["surgeon.pipeline.open_model", "surgeon.saving._write_plan"])
def test_an_interruption_says_so_and_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupt)
    found = prune(llama, tmp_path / "o", *RATIO)
    assert (found.code, found.out) == (130, "")
    assert found.lines[-1] == "interrupted; nothing half-written is left"
    assert list(tmp_path.iterdir()) == []
