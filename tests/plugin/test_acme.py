"""A whole package of a third party: a score, a selection and an operation, Surgeon untouched."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import surgeon
from surgeon import registry
from surgeon.errors import Code, SurgeonError
from surgeon.ops.rule import rules
from surgeon.plugin import Context
from tests import models
from tests.plugin.conftest import Install

pytestmark = pytest.mark.slow

PACKAGE = Path(__file__).parent / "acme"
ROLL = "aten.roll.default"
IMPORT = re.compile(r"^\s*(?:from|import) (surgeon[\w.]*)", re.MULTILINE)


class Shifted(nn.Module):
    """An MLP that mixes each token with the one before it, as a token shift does."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.up(x))
        return x + self.down(h + 0.5 * torch.roll(h, shifts=1, dims=1))


class Turned(Shifted):
    """The same, but what turns are the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.up(x))
        return x + self.down(torch.roll(h, shifts=1, dims=-1))


class Flat(Shifted):
    """Without a dimension everything turns as one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.roll(torch.relu(self.up(x)), shifts=1))


@pytest.fixture
def forget() -> Iterator[None]:
    """Rules are read anew within the test, and forgotten after it."""
    known, before = dict(rules()), set(sys.modules)
    rules.cache_clear()
    yield
    for target in rules_left() - known.keys():
        del TABLE[target]
    rules.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith(("acme_", "other_")):
            del sys.modules[name]


TABLE = rules()


def rules_left() -> set[str]:
    return set(TABLE)


@pytest.fixture
def acme(forget: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package on the path, with the metadata that installing it would leave there."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    info = tmp_path / "acme_surgery-1.0.dist-info"
    info.mkdir()
    name, version = project["name"], project["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    entries = project["entry-points"]["surgeon.plugins"].items()
    lines = [f"{key} = {value}" for key, value in entries]
    (info / "entry_points.txt").write_text("\n".join(["[surgeon.plugins]", *lines, ""]))
    monkeypatch.syspath_prepend(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def shifted(cls: type[nn.Module] = Shifted) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


def carried(axes: surgeon.Axes, param: str, dim: int) -> surgeon.Axis:
    """The one axis of a parameter's dimension."""
    (found,) = (a for a in axes.axes if (param, dim) in axes.carriers(a))
    return found


# --- the operation -------------------------------------------------------------------------------


def test_without_the_package_the_operation_is_a_barrier(forget: None) -> None:
    axes = surgeon.analyse(shifted(), example_inputs=(inputs(),))
    inner = carried(axes, "up.weight", 0)
    assert ROLL in inner.pins[0].why
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(shifted(), roles={inner.role: 0.25}, example_inputs=(inputs(),))
    assert caught.value.code is Code.PINNED


def test_with_the_package_it_is_not_and_removing_is_masking(acme: None) -> None:
    net, x = shifted(), inputs()
    role = carried(surgeon.analyse(net, example_inputs=(x,)), "up.weight", 0).role
    pruned = surgeon.prune(net, roles={role: 0.5}, score="contrast", example_inputs=(x,))
    (found,) = pruned.plan.cuts
    assert (found.size, found.count) == (12, 6)
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-4
    gone = [i for i in range(12) if i not in found.kept]
    with torch.no_grad():
        for tensor in (net.up.weight, net.up.bias):  # masked by hand
            tensor[gone] = 0
        net.down.weight[:, gone] = 0
        torch.testing.assert_close(pruned.model(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cls", [Turned, Flat])
def test_what_turns_stays_whole(acme: None, cls: type[nn.Module]) -> None:
    axes = surgeon.analyse(shifted(cls), example_inputs=(inputs(),))
    assert "change places" in carried(axes, "up.weight", 0).pins[0].why
    assert "change places" in carried(axes, "down.weight", 1).pins[0].why


# --- the passes ----------------------------------------------------------------------------------


def test_its_passes_are_there_with_options_and_documentation(acme: None) -> None:
    found = registry.available()
    assert {found["score"]["contrast"].plugin, found["select"]["ends"].plugin} == {"acme"}
    names = [option.name for option in registry.options(registry.load("select", "ends"))]
    assert names == ["role", "first", "last"]


def test_its_passes_prune_a_model(acme: None) -> None:
    recipe = {
        "version": 1,
        "budget": {"ratio": 0.2},
        "passes": [{"score": "contrast", "measure": "range"}, {"select": "ends", "first": 1}],
    }
    pruned = surgeon.prune(models.tiny("Llama"), recipe=recipe)
    (found,) = pruned.plan.cuts
    assert found.axis == "model.layers.1.mlp/ffn"
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-4
    assert abs(pruned.report.ratio["removed"] - 0.2) < 0.004


def test_its_score_is_what_it_says(acme: None) -> None:
    made = registry.build("score", "contrast", {})
    llama = surgeon.open_model(models.tiny("Llama"))
    heads = "model.layers.0.self_attn/kv_heads"
    found = made.score(Context(llama.axes, llama.read, targets=(heads,)))[heads]
    weight = llama.read("model.layers.0.self_attn.o_proj.weight").double().numpy()
    size = weight.shape[1] // 3
    expected = [weight[:, i * size : (i + 1) * size].std() for i in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


# --- the rules of the house ----------------------------------------------------------------------


def test_it_imports_one_module_of_surgeon() -> None:
    files = sorted((PACKAGE / "acme_surgery").rglob("*.py"))
    found = {name for file in files for name in IMPORT.findall(file.read_text())}
    assert len(files) >= 4 and found == {"surgeon.plugin"}


def test_it_is_not_installed_here() -> None:
    assert "acme" not in {point.name for point in entry_points(group="surgeon.plugins")}


BROKEN = {
    "twice": '@rule("aten.relu.default", vanish=None)\ndef f(c): ...',
    "syntax": "def f(:",
    "absent": "import acme_absent",
}


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("twice", Code.BAD_PASS, "aten.relu.default has two rules"),
        ("syntax", Code.BAD_PASS, "invalid syntax"),
        ("absent", Code.MISSING_EXTRA, "'acme_absent'"),
    ],
)
def test_rules_that_cannot_be_read_are_refused_by_name(
    forget: None, install: Install, name: str, code: Code, says: str
) -> None:
    good = 'from surgeon.plugin import rule\n@rule("acme.own", vanish=None)\ndef g(c): ...\n'
    files = {f"ops/{name}.py": good + BROKEN[name], "ops/_helper.py": "boom("}
    install("other", files if name != "syntax" else {f"ops/{name}.py": BROKEN[name]})
    for _ in range(2):  # and the same the second time
        with pytest.raises(SurgeonError) as caught:
            rules()
        assert caught.value.code is code and says in caught.value.why
        assert "'other'" in caught.value.what and f"{name}.py" in caught.value.at
    assert "acme.own" not in TABLE
