"""Every command and every option, run as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import models
from tests.command import ROOT, Outcome, checkpoint, python, surgeon, weights_of

pytestmark = pytest.mark.slow

COMMANDS = {
    "prune": (
        "--output --to --recipe --ratio --role --freeze --only --transform --score --select "
        "--transform-option --score-option --select-option --compensate --compensate-option "
        "--then --then-option "
        "--measure --limit --multiple-of --tensor-parallel "
        "--calibration --samples --length --statistics --plan --seed --dry-run --overwrite "
        "--no-verify --json --trust-remote-code"
    ),
    "inspect": "--layer --role --param --json --trust-remote-code",
    "calibrate": (
        "--output --calibration --samples --length --seed --statistics --device --offload "
        "--overwrite --json --trust-remote-code"
    ),
    "explain": "--channel --json --trust-remote-code",
    "diff": "--source --json --trust-remote-code",
    "graph": "--output --of --within --layout --source --overwrite --trust-remote-code",
    "ir": "--trust-remote-code",
    "verify": "--source --json --trust-remote-code",
    "export": "--to --output --style --dtype --positions --overwrite --no-check "
    "--trust-remote-code",
    "eval": (
        "--text --tokenizer --window --windows --prompt --new-tokens --speed --repeat --threads "
        "--tasks --tasks-path --limit --device --json --markdown --html --overwrite "
        "--trust-remote-code"
    ),
    "compare": (
        "--against --text --tokenizer --window --windows --agreement-windows --prompt --new-tokens "
        "--no-writing --no-speed --repeat --threads --tasks --tasks-path --limit --device --json "
        "--markdown --html --overwrite --trust-remote-code"
    ),
    "generate": (
        "--tokenizer --max-new-tokens --temperature --top-k --top-p --seed --device "
        "--trust-remote-code"
    ),
    "bench": (
        "--prompt-tokens --new-tokens --batch --threads --repeat --device --json "
        "--trust-remote-code"
    ),
    "run": "--output --ratio --calibration --statistics --dry-run --overwrite --no-verify --json "
    "--trust-remote-code",
    "recipe": "",
    "passes": "--json",
    "demo": "--output --ratio --windows",
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama") / "m", models.tiny("Llama"), tiny_tokenizer)


@pytest.fixture(scope="module")
def pruned(llama: Path) -> Path:
    out = llama.parent / "pruned"
    ran(surgeon("prune", llama, "-o", out, "--ratio", "0.2"))
    return out


def ran(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


# --- help ----------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    code = """
import sys
from surgeon.cli import main
for command in sys.argv[1:]:
    sys.argv = ["surgeon", *([command] if command != "-" else []), "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxruntime", "networkx", "numpy"}
print("heavy:", sorted(heavy & set(sys.modules)))
"""
    found = python(code, "-", *COMMANDS, path=ROOT)
    assert found.code == 0, found.err
    assert found.out.splitlines()[-1] == "heavy: []"


def test_help_names_every_command() -> None:
    shown = ran(surgeon("--help")).out
    for command in COMMANDS:
        assert f"\n  {command} " in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = ran(surgeon(command, "--help")).out
    for option in COMMANDS[command].split():
        assert option in shown


@pytest.mark.parametrize("args", [[], ["prune"], ["prune", "x", "--bogus"], ["nothing"]])
def test_wrong_usage_says_so_without_a_traceback(args: list[str]) -> None:
    found = surgeon(*args)
    assert found.code == 2 and "Usage:" in found.err + found.out
    assert "Traceback" not in found.err


def test_a_run_leaves_nothing_on_stderr(llama: Path, tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'surgeon'; from surgeon.cli import main; main()"
    out = tmp_path / "o"
    found = python(code, "prune", llama, "-o", out, "--ratio", "0.2", path=ROOT)
    assert (found.code, found.err) == (0, "") and (out / "surgeon.json").exists()


# --- inspect, ir, passes ------------------------------------------------------------------------


def test_inspect_prints_the_documented_json(llama: Path) -> None:
    found = json.loads(ran(surgeon("inspect", llama, "--json")).out)
    for axis in found["axes"]:
        assert axis.keys() >= {
            "name", "role", "size", "scope", "prunable", "pins", "gauge", "members"
        }  # fmt: skip
        assert isinstance(axis["pins"], list) and axis["prunable"] is not bool(axis["pins"])
        for member in axis["members"]:
            assert member.keys() == {"param", "dim", "expr"}
            assert member["expr"] == found["params"][member["param"]]["dims"][member["dim"]]
            assert axis["name"] in member["expr"]
    for param in found["params"].values():
        assert param.keys() == {"shape", "dims"} and len(param["dims"]) == len(param["shape"])
    state = models.tiny("Llama").state_dict()
    assert {n: found["params"][n]["shape"] for n in state} == {
        n: list(t.shape) for n, t in state.items()
    }
    dims = {name: param["dims"] for name, param in found["params"].items()}
    here = "model.layers.0.self_attn"
    rotary = "(model/rotary:4 + model/rotary:4)"
    groups = f"{here}/kv_heads:3 × {here}/q_per_kv:2"
    assert dims["model.embed_tokens.weight"] == ["model.embed_tokens/vocab:101", "hidden:48"]
    assert dims[f"{here}.q_proj.weight"] == [f"{groups} × {rotary}", "hidden:48"]
    assert dims[f"{here}.o_proj.weight"] == ["hidden:48", f"{groups} × {here}/v:8"]
    roles = {axis["name"]: (axis["role"], axis["size"], axis["scope"]) for axis in found["axes"]}
    assert roles["model.layers.1.mlp/ffn"] == ("ffn", 80, "model.layers.1.mlp")
    assert roles[f"{here}/kv_heads"] == ("kv_heads", 3, here)


def test_inspect_prints_a_tree(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = ran(surgeon("inspect", llama)).out
    for text in ("layers 0–1, each", "mlp/ffn: 80 channels", "any invertible map", "attention: a"):
        assert text in shown


def test_a_config_alone_is_enough_to_inspect(llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((llama / "config.json").read_text())
    alone = ran(surgeon("inspect", config, "--json")).out
    assert json.loads(alone) == json.loads(ran(surgeon("inspect", llama, "--json")).out)


def test_the_printed_program_parses_back(llama: Path) -> None:
    from surgeon.ir import parse, to_text

    text = ran(surgeon("ir", llama)).out
    program = parse(text)
    assert to_text(program) == text
    assert {p.name for p in program.params} >= set(models.tiny("Llama").state_dict())


def test_passes_are_listed_with_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = ran(surgeon("passes")).out
    for text in ("magnitude", "random", "uniform", "multiple_of: int = 1", "builtin"):
        assert text in shown


# --- prune --------------------------------------------------------------------------------------


def axes_after(folder: Path) -> dict[str, tuple[int, int]]:
    report = json.loads((folder / "surgeon.json").read_text())
    return {a["name"]: (a["before"], a["after"]) for a in report["axes"]}


def test_a_pruned_folder_holds_what_the_manual_says(pruned: Path, llama: Path) -> None:
    names = {p.name for p in pruned.iterdir()}
    assert names >= {"config.json", "model.safetensors", "plan.json", "surgeon.json"}
    report = json.loads((pruned / "surgeon.json").read_text())
    state = models.tiny("Llama").state_dict()
    inside = {n: t for n, t in state.items() if ".layers." in n}
    left = weights_of(pruned)
    assert report["parameters"] == {
        "decoder": {
            "before": sum(t.numel() for t in inside.values()),
            "after": sum(left[n].numel() for n in inside),
        },
        "total": {
            "before": sum(t.numel() for t in state.values()),
            "after": sum(t.numel() for t in left.values()),
        },
    }
    assert [r["pass"] for r in report["recipe"]] == ["score/magnitude", "select/uniform"]
    assert report["ratio"]["asked"] == 0.2 and abs(report["ratio"]["removed"] - 0.2) < 0.004
    assert report["versions"].keys() >= {"python", "torch", "transformers", "model-surgeon"}
    assert 0 <= report["verification"]["largest"] <= report["verification"]["tolerance"] == 1e-4
    assert report["source"]["id"] == str(llama)
    plan = json.loads((pruned / "plan.json").read_text())
    assert plan["source"]["id"] == str(llama) and len(plan["source"]["fingerprint"]) == 64
    assert {c["axis"]: len(c["kept"]) for c in plan["cuts"]} == {
        name: after for name, (before, after) in axes_after(pruned).items() if after < before
    }


def test_json_on_the_terminal_is_the_report_in_the_folder(llama: Path, tmp_path: Path) -> None:
    shown = ran(surgeon("prune", llama, "-o", tmp_path / "o", "--ratio", "0.1", "--json")).out
    assert shown == (tmp_path / "o" / "surgeon.json").read_text()


def test_the_terminal_shows_before_and_after(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    out = llama.parent / "shown"
    shown = ran(surgeon("prune", llama, "-o", out, "--ratio", "0.2")).out
    for text in ("37,056", "parameters, decoder", "one selection step", "LlamaForCausalLM"):
        assert text in shown
    assert "verified: largest difference" in shown


def test_a_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    args = ["prune", llama, "-o", tmp_path / "o", "--ratio", "0.2", "--dry-run"]
    assert "nothing is written" in ran(surgeon(*args)).out
    report = json.loads(ran(surgeon(*args, "--json")).out)
    assert report["parameters"]["decoder"]["after"] < report["parameters"]["decoder"]["before"]
    assert list(tmp_path.iterdir()) == []
    ran(surgeon("prune", llama, "--ratio", "0.2", "--dry-run"))


def test_a_config_alone_can_be_planned(llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text((llama / "config.json").read_text())
    args = ["prune", config, "--ratio", "0.2", "--dry-run", "--json"]
    report = json.loads(ran(surgeon(*args, "--score", "random")).out)
    assert report["parameters"]["decoder"]["before"] == 37056
    assert abs(report["ratio"]["removed"] - 0.2) < 0.004
    refused = surgeon(*args)
    assert refused.code == 1 and refused.err.startswith("[missing-file]")
    assert "--score random" in refused.lines[-1]
    out = tmp_path / "o"
    refused = surgeon("prune", config, "-o", out, "--ratio", "0.2", "--score", "random")
    assert refused.code == 1 and refused.err.startswith("[missing-file]") and not out.exists()


def test_roles_are_cut_as_asked_and_the_ratio_fills_the_rest(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    ran(surgeon("prune", llama, "-o", out, "--role", "kv_heads=1/3", "--ratio", "0.3"))
    sizes = axes_after(out)
    assert sizes["model.layers.0.self_attn/kv_heads"] == (3, 2)
    assert sizes["model.layers.1.self_attn/kv_heads"] == (3, 2)
    assert sizes["model.layers.0.mlp/ffn"][1] < 80
    report = json.loads((out / "surgeon.json").read_text())
    assert abs(report["ratio"]["removed"] - 0.3) < 0.004


def test_roles_without_a_ratio_cut_nothing_else(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    args = ["--role", "ffn=0.25", "--role", "q_per_kv=0.5", "--role", "hidden=0.125"]
    ran(surgeon("prune", llama, "-o", out, *args))
    changed = {n.split("/")[-1]: v for n, v in axes_after(out).items() if v[0] != v[1]}
    assert changed == {"ffn": (80, 60), "q_per_kv": (2, 1), "hidden": (48, 42)}


def test_freeze_and_only_take_globs(llama: Path, tmp_path: Path) -> None:
    def cut(*args: str) -> set[str]:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        ran(surgeon("prune", llama, "-o", out, "--no-verify", *args))
        return {name for name, (before, after) in axes_after(out).items() if after < before}

    first, second = "model.layers.0.mlp/ffn", "model.layers.1.mlp/ffn"
    assert cut("--ratio", "0.1") == {first, second}
    assert cut("--ratio", "0.1", "--freeze", "model.layers.0") == {second}
    assert cut("--ratio", "0.1", "--only", "model.layers.0.*") == {first}
    assert cut("--ratio", "0.1", "--only", "hidden") == {"hidden"}
    assert cut("--role", "ffn=0.2", "--freeze", "*.1.mlp.up_proj*") == {first}
    # Two globs add up.
    heads = {f"model.layers.{i}.self_attn/kv_heads" for i in range(2)}
    assert cut("--role", "kv_heads=1/3", "--only", "*.0.*", "--only", "*.1.*") == heads


@pytest.mark.slow
def test_scores_and_their_options(llama: Path, tmp_path: Path) -> None:
    def kept(*args: object) -> Any:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        ran(surgeon("prune", llama, "-o", out, "--ratio", "0.2", "--no-verify", *args))
        report = json.loads((out / "surgeon.json").read_text())
        return json.loads((out / "plan.json").read_text())["cuts"], report["recipe"]

    usual, recipe = kept()
    assert recipe[0]["options"] == {"p": "max", "normalise": "none"}
    other, recipe = kept("--score-option", "p=1", "--score-option", "normalise=mean")
    assert recipe[0]["options"] == {"p": 1, "normalise": "mean"} and other != usual
    first, recipe = kept("--score", "random", "--seed", 7)
    assert recipe[0]["pass"] == "score/random"
    assert kept("--score", "random", "--seed", 7)[0] == first
    assert kept("--score", "random", "--seed", 8)[0] != first
    wide, recipe = kept("--select", "uniform", "--select-option", "multiple_of=16")
    assert recipe[1]["options"]["multiple_of"] == 16
    assert all(len(c["kept"]) % 16 == 0 for c in wide)


def test_magnitude_keeps_the_largest_channels(llama: Path, tmp_path: Path) -> None:
    ran(surgeon("prune", llama, "-o", tmp_path / "o", "--role", "ffn=0.25", "--no-verify"))
    plan = json.loads((tmp_path / "o" / "plan.json").read_text())
    state = models.tiny("Llama").state_dict()
    for cut in plan["cuts"]:
        mlp = cut["axis"].removesuffix("/ffn")
        gate, up, down = (state[f"{mlp}.{n}_proj.weight"] for n in ("gate", "up", "down"))
        largest = [gate.abs().amax(1), up.abs().amax(1), down.abs().amax(0)]
        norm = torch.stack(largest).amax(0)
        assert cut["kept"] == sorted(torch.topk(norm, 60).indices.tolist())


def test_without_verification_there_is_no_figure(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    shown = ran(surgeon("prune", llama, "-o", out, "--ratio", "0.1", "--no-verify")).out
    assert "verified" not in shown
    assert json.loads((out / "surgeon.json").read_text())["verification"] is None


def test_a_result_is_replaced_only_when_asked(llama: Path, tmp_path: Path) -> None:
    args = ["prune", llama, "-o", tmp_path / "o", "--no-verify"]
    ran(surgeon(*args, "--ratio", "0.1"))
    before = (tmp_path / "o" / "surgeon.json").read_text()
    assert surgeon(*args, "--ratio", "0.3").code == 1
    assert (tmp_path / "o" / "surgeon.json").read_text() == before
    ran(surgeon(*args, "--ratio", "0.3", "--overwrite"))
    assert json.loads((tmp_path / "o" / "surgeon.json").read_text())["ratio"]["asked"] == 0.3


@pytest.mark.parametrize("name", ["", "plan.json"])
def test_a_plan_replays_to_the_same_bits(
    llama: Path, pruned: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "o"
    ran(surgeon("prune", llama, "-o", out, "--plan", pruned / name))
    for file in ("model.safetensors", "config.json", "plan.json", "tokenizer.json"):
        assert (out / file).read_bytes() == (pruned / file).read_bytes()


@pytest.mark.parametrize(
    "extra",
    [
        ["--ratio", "0.2"],
        ["--role", "ffn=0.1"],
        ["--freeze", "hidden"],
        ["--only", "hidden"],
        ["--score", "magnitude"],
        ["--select", "uniform"],
        ["--seed", "1"],
    ],
)
def test_a_replay_ignores_no_option(
    llama: Path, pruned: Path, tmp_path: Path, extra: list[str]
) -> None:
    found = surgeon("prune", llama, "-o", tmp_path / "o", "--plan", pruned, *extra)
    assert found.code == 1 and found.err.startswith("[bad-option]") and extra[0] in found.err
    assert not (tmp_path / "o").exists()


# --- verify -------------------------------------------------------------------------------------


def test_verify_compares_with_the_source(pruned: Path, llama: Path, tmp_path: Path) -> None:
    assert "largest difference" in ran(surgeon("verify", pruned)).out
    found = json.loads(ran(surgeon("verify", pruned, "--json", "--source", llama)).out)
    assert found["largest"] <= 1e-4 and found["rounded"] is True and found["exact"] is True
    probes = {p["probe"] for p in found["probes"]}
    assert {"random", "random, padded left", "random, padded right"} < probes
    assert {"text, padded left", "text, padded right"} < probes


def test_verify_asks_for_a_source_that_moved(llama: Path, tmp_path: Path) -> None:
    moved = checkpoint(tmp_path / "before", models.tiny("Llama"))
    out = tmp_path / "o"
    ran(surgeon("prune", moved, "-o", out, "--ratio", "0.1", "--no-verify"))
    moved.rename(tmp_path / "after")
    found = surgeon("verify", out)
    assert found.code == 1 and "--source" in found.lines[-1]
    ran(surgeon("verify", out, "--source", tmp_path / "after"))


def test_verify_refuses_another_source(pruned: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "m", models.build("Llama", seed=1))
    found = surgeon("verify", pruned, "--source", other)
    assert found.code == 1 and found.err.startswith("[plan-mismatch]")


# --- export, eval, generate ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_export_writes_a_file(pruned: Path, tmp_path: Path, to: str) -> None:
    out = tmp_path / f"m.{to}"
    shown = ran(surgeon("export", pruned, "--to", to, "-o", out)).out
    assert f"wrote m.{to}" in shown and "nodes" in shown
    assert sum(file.stat().st_size for file in tmp_path.glob("m.*")) > 100_000
    before = out.read_bytes()
    assert surgeon("export", pruned, "--to", to, "-o", out).err.startswith("[bad-output]")
    assert out.read_bytes() == before
    ran(surgeon("export", pruned, "--to", to, "-o", out, "--overwrite"))


def test_an_unknown_target_is_refused(pruned: Path, tmp_path: Path) -> None:
    found = surgeon("export", pruned, "--to", "onx", "-o", tmp_path / "m.onnx")
    assert found.code == 1 and found.err.startswith("[bad-option]") and "onnx" in found.lines[-1]
    assert list(tmp_path.iterdir()) == []


def scored(outcome: Outcome) -> list[dict[str, Any]]:
    """Returns the texts of the one model in an evaluation's JSON."""
    (model,) = json.loads(ran(outcome).out)["models"]
    return model["texts"]


def test_eval_scores_text(pruned: Path, tmp_path: Path) -> None:
    small = ["--window", "32", "--windows", "3"]
    shown = ran(surgeon("eval", pruned, *small)).out
    assert "pydoc_data.topics" in shown and "3 windows of 32 tokens" in shown
    (builtin,) = scored(surgeon("eval", pruned, *small, "--json"))
    assert builtin["tokens"] == 3 * 31 and 1 < builtin["perplexity"] < 1e6
    text = tmp_path / "own.txt"
    text.write_text("A short text of my own. " * 20)
    other = tmp_path / "other.txt"
    other.write_text("Words, words, words. " * 20)
    texts = ("--text", text, "--text", other)
    own, second = scored(surgeon("eval", pruned, *small, "--json", *texts))
    assert (own["text"], second["text"]) == ("own.txt", "other.txt")
    assert len({found["perplexity"] for found in (own, second, builtin)}) == 3


def test_compare_puts_models_side_by_side(llama: Path, pruned: Path, tmp_path: Path) -> None:
    graph, program = tmp_path / "onnx", tmp_path / "pt2"
    ran(surgeon("export", pruned, "--to", "onnx", "-o", graph))
    ran(surgeon("prune", llama, "-o", program, "--ratio", "0.2", "--to", "pt2"))
    small = ["--window", "32", "--windows", "2", "--prompt", "Hello", "--new-tokens", "4"]
    page, table = tmp_path / "out.html", tmp_path / "out.md"
    files = ["--html", page, "--markdown", table]
    models = [llama, pruned, graph, program]
    found = ran(surgeon("compare", *models, *small, "--no-speed", "--device", "cpu", *files))
    for part in ("perplexity", "parameters", "KL", "Hello", "unknown: onnx"):
        assert part in found.out
    assert "×1.19" in table.read_text() and page.read_text().startswith("<!doctype html>")
    again = surgeon("compare", *models, *small, "--no-speed", *files)
    assert again.err.startswith("[bad-output]")
    data = json.loads(ran(surgeon("compare", *models, *small, "--no-speed", "--json")).out)
    kinds = [model["kind"] for model in data["models"]]
    assert kinds == ["checkpoint", "checkpoint", "onnx", "pt2"]
    small_ones = data["models"][1:]
    assert len({model["parameters"] for model in small_ones}) == 1
    kl = [model["texts"][0]["agreement"]["kl"] for model in small_ones]
    assert kl == pytest.approx([kl[0]] * 3, rel=1e-3) and kl[0] > 0
    assert len({model["written"][0]["text"] for model in small_ones}) == 1


def test_compare_times_models_in_turns(pruned: Path) -> None:
    small = ["--window", "40", "--windows", "1", "--no-writing", "--repeat", "1", "--threads", "1"]
    data = json.loads(ran(surgeon("compare", pruned, pruned, *small, "--json")).out)
    first, second = (model["speed"] for model in data["models"])
    assert first["prefill_speed_up"] == 1 and second["decode_speed_up"] > 0
    assert len(second["decode_seconds"]) == 1 and second["run_by"].startswith("Transformers")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ([], "bad-option"),
        (["nowhere"], "not-a-model"),
        (["{}", "--against", "else"], "bad-option"),
        (["{}", "--text", "nowhere"], "missing-file"),
        (["{}", "--tokenizer", "nowhere"], "not-a-model"),
        (["{}", "--tasks", "colours", "--tasks-path", "nowhere"], "missing-file"),
        (["nowhere.pt2"], "missing-file"),
    ],
)
def test_comparing_with_nonsense(llama: Path, args: list[str], code: str) -> None:
    given = [str(llama) if arg == "{}" else arg for arg in args]
    found = surgeon("compare", llama, *given, "--window", "32", "--windows", "1", "--no-speed")
    assert found.code == 1 and found.err.startswith(f"[{code}] ") and len(found.lines) == 4


@pytest.mark.slow
def test_eval_and_generate_agree_on_a_folder_and_its_onnx_file(
    pruned: Path, tmp_path: Path
) -> None:
    graph = tmp_path / "m.onnx"
    ran(surgeon("export", pruned, "--to", "onnx", "-o", graph))
    score = ["--window", "32", "--windows", "2", "--json"]
    (here,) = scored(surgeon("eval", pruned, *score))
    (there,) = scored(surgeon("eval", graph, *score, "--tokenizer", pruned))
    assert there["perplexity"] == pytest.approx(here["perplexity"], rel=1e-4)
    write = ["hello", "--max-new-tokens", "8"]
    text = ran(surgeon("generate", pruned, *write)).out
    assert text.startswith("hello") and len(text) > len("hello\n")
    assert ran(surgeon("generate", graph, *write, "--tokenizer", pruned)).out == text
    without = surgeon("generate", graph, *write)
    assert without.code == 1 and "--tokenizer FOLDER" in without.lines[-1]
    # A tokenizer beside the graph is found.
    for file in pruned.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert ran(surgeon("generate", graph, *write)).out == text


def test_sampling_follows_its_seed(pruned: Path) -> None:
    draw = ["generate", pruned, "hello", "--max-new-tokens", "12", "--temperature", "1.5"]
    first = ran(surgeon(*draw, "--seed", "1", "--top-k", "50", "--top-p", "0.99")).out
    assert ran(surgeon(*draw, "--seed", "1", "--top-k", "50", "--top-p", "0.99")).out == first
    assert ran(surgeon(*draw, "--seed", "2", "--top-k", "50", "--top-p", "0.99")).out != first
