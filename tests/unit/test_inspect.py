"""`surgeon inspect`: the folded tree, its filters, its JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import surgeon as library
from surgeon.axes import Axes, analyse
from surgeon.axes.costs import Costs
from surgeon.ir import parse
from surgeon.report.fold import folded, spans
from surgeon.report.inspect import tree, view
from tests import models
from tests.command import checkpoint, surgeon
from tests.refusals import refused
from tests.unit.test_explain import BARRIER

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama") / "m", models.tiny("Llama"))


def shown(axes: Axes, **options: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(tree(view("m", axes, Costs(axes), **options)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_identical_layers_are_one_branch() -> None:
    axes = library.analyse(models.tiny("Llama", num_hidden_layers=4))
    text = shown(axes)
    assert "layers 0–3, each: " in text and text.count("mlp/ffn: 80 channels") == 1
    assert "model.layers.0–3.mlp.gate_proj.weight:1" in text  # of the residual width


def test_layers_that_differ_are_branches_of_their_own() -> None:
    """The first has the input, the last the output, and one is wider: two are alike."""
    sizes = {0: 6, 1: 6, 2: 6, 3: 7, 4: 6}
    lines = ["surgeon.program 1", "symbol batch", "input %x: f32[batch, 8]"]
    for i, n in sizes.items():
        lines += [f"parameter $net.{i}.up: f32[{n}, 8]", f"parameter $net.{i}.down: f32[8, {n}]"]
    last = "%x"
    for i, n in sizes.items():
        at = f'@ "net.{i}" "net.py:1"'
        lines += [
            f"%a{i}: f32[batch, {n}] = aten.linear.default({last}, $net.{i}.up) {at}",
            f"%b{i}: f32[batch, {n}] = aten.relu.default(%a{i}) {at}",
            f"%c{i}: f32[batch, 8] = aten.linear.default(%b{i}, $net.{i}.down) {at}",
        ]
        last = f"%c{i}"
    text = "\n".join([*lines, f"return {last}\n"])
    found = shown(analyse(parse(text)))
    assert "net 1–2, each" in found
    assert all(f"net {i}\n" in found for i in (0, 3, 4))


def test_a_pinned_axis_says_why() -> None:
    text = shown(analyse(parse(BARRIER)))
    assert "pinned: no axis rule for aten.roll.default, in mixer" in text
    assert "5 channels, rank, prunable" in text


def test_what_may_be_selected() -> None:
    text = shown(library.analyse(models.tiny("Llama")), layer=0)
    freedom = "may select: any of its 2, others for each index of self_attn/kv_heads"
    assert freedom in text and "lm_head" not in text
    assert "may select: any of its 4 pairs" in shown(library.analyse(models.tiny("Llama")))
    fused = shown(library.analyse(models.tiny("Phi3")), role="ffn")
    assert "each in 2 places of a dimension" in fused and "pairs" not in fused


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--layer", 1, "--role", "ffn"), ["model.layers.1.mlp/ffn"]),
        (("--role", "qk"), ["model/rotary"]),
        (("--param", "norm.weight"), ["hidden"]),
        (("--param", "*.0.*k_proj*"), ["hidden", "model.layers.0.self_attn/kv_heads"] + [
            "model/rotary"
        ]),
    ],
)  # fmt: skip
def test_filters(llama: Path, options: tuple[object, ...], names: list[str]) -> None:
    found = json.loads(surgeon("inspect", llama, "--json", *options).out)
    assert [axis["name"] for axis in found["axes"]] == names
    assert set(found["params"]) >= {m["param"] for a in found["axes"] for m in a["members"]}
    printed = surgeon("inspect", llama, *options)
    assert printed.code == 0 and printed.err == ""


def test_json_adds_costs_and_freedom(llama: Path) -> None:
    found = json.loads(surgeon("inspect", llama, "--json").out)
    model = models.tiny("Llama")
    assert found["totals"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert list(found["layers"]) == ["model.layers.0", "model.layers.1"]
    by_name = {axis["name"]: axis for axis in found["axes"]}
    ffn, rotary = by_name["model.layers.0.mlp/ffn"], by_name["model/rotary"]
    assert ffn["channel"] == {
        "parameters": 3 * 48, "bytes": 4 * 3 * 48, "flops": 2 * 3 * 48, "flops_context": 0,
        "cache_bytes": 0,
    }  # fmt: skip
    assert (ffn["select"]["pairs"], rotary["select"]["pairs"]) == (False, True)
    inside = by_name["model.layers.0.self_attn/v"]["select"]["own_choice_inside"]
    assert inside == ["model.layers.0.self_attn/kv_heads"]
    assert not by_name["lm_head/vocab"]["select"]["any"]


def test_bytes_are_those_of_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    import torch

    half = checkpoint(tmp_path / "h", models.build("Llama").to(torch.bfloat16))
    found = json.loads(surgeon("inspect", half, "--json").out)["totals"]
    whole = json.loads(surgeon("inspect", llama, "--json").out)["totals"]
    assert (2 * found["bytes"], 2 * found["cache_bytes"]) == (whole["bytes"], whole["cache_bytes"])
    config = tmp_path / "config.json"
    config.write_text((half / "config.json").read_text())
    assert json.loads(surgeon("inspect", config, "--json").out)["totals"] == found


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "texts"),
    [
        (("--layer", 9), "no-such-axis", ("no layer 9", "0–1")),
        (("--role", "experts"), "no-such-role", ("ffn", "layers")),
        (("--param", "q_prj.weight"), "no-such-axis", ("q_proj",)),
        (("--layer", 0, "--role", "vocab"), "no-such-axis", ("leave one of them out",)),
    ],
)
def test_what_is_not_there(
    llama: Path, options: tuple[object, ...], code: str, texts: tuple[str, ...]
) -> None:
    refused(surgeon("inspect", llama, *options), code, *texts)


def test_a_model_without_layers(tmp_path: Path) -> None:
    config = models.config("Llama", num_hidden_layers=0)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    found = surgeon("inspect", file)
    assert found.code == 0 and "lm_head/vocab" in found.out and "each" not in found.out
    refused(surgeon("inspect", file, "--layer", 0), "no-such-axis", "there are no layers")
    refused(surgeon("inspect", file, "--role", "ffn"), "no-such-role", "vocab")
    refused(surgeon("explain", file, "ffn"), "no-such-axis", "there is no axis or parameter 'ffn'")
    assert surgeon("explain", file, "lm_head/vocab").code == 0


# --- folding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([0], "0"), ([0, 1, 2], "0–2"), ([0, 2, 4], "0–4 step 2"), ([1, 3], "1, 3"),
        ([0, 1, 4, 5, 9], "0–1, 4–5, 9"),
    ],
)  # fmt: skip
def test_spans(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


def test_names_that_differ_by_one_number_are_one() -> None:
    names = ["a.weight:0", "net.0.w:1", "net.0.v:0", "net.1.w:1", "net.1.v:0"]
    assert folded(names) == ["a.weight:0", "net.0–1.w:1", "net.0–1.v:0"]
