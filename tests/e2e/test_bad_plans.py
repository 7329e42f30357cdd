"""Plans that do not fit, results that were changed, texts and prompts that are none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.command import checkpoint, surgeon
from tests.refusals import RATIO, prune, refused, rewrite

pytestmark = pytest.mark.slow

# --- plans and results ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "o"
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


@pytest.mark.parametrize("place", ["surgeon.pipeline.open_model", "surgeon.saving.write_plan"])
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
