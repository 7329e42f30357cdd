"""What is written is compared layer by layer: any wrong row of any tensor is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from surgeon.capture.model import capture_model
from surgeon.capture.source import resolve
from surgeon.errors import Code, SurgeonError
from surgeon.memory import Memory
from surgeon.opening import open_model
from surgeon.pipeline import prune
from surgeon.pruned import Pruned
from surgeon.report.spots import Side, check_layers, masked_program, parts
from surgeon.report.verify import Verification
from surgeon.runtime.apply import masked
from surgeon.spotting import verify_layers
from tests.models import build

pytestmark = pytest.mark.slow

LAYERS = [
    f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    build("Llama").to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pruned(source: Path) -> Pruned:
    """A plan with everything that is awkward: folded averages, groups of their own, rounding."""
    roles = {"ffn": 0.3, "kv_heads": 1 / 3, "hidden": 0.25}
    return prune(open_model(source), roles=roles, verify=False)


@pytest.fixture(scope="module")
def out(pruned: Pruned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("out") / "model"
    pruned.save(path, verify=False)
    return path


Compare = Callable[[dict[str, torch.Tensor]], Verification]


@pytest.fixture(scope="module")
def compare(pruned: Pruned, out: Path) -> Compare:
    """Compares with other tensors in the places of some, the models captured once."""
    found = resolve(out)
    captured = capture_model(found.meta_model())
    plan, axes, emission = pruned.plan, pruned.axes, pruned.emission
    fixed = {**captured.constants, **found.computed()}
    from surgeon.emit.hf_writing import final

    right = {
        new: final(emission, pruned.selection, pruned.full, old, torch.float32)
        for old, new in emission.names.items()
    }

    def run(instead: dict[str, torch.Tensor]) -> Verification:
        every = {**fixed, **right, **instead}
        return check_layers(
            Side(
                masked_program(axes, plan),
                lambda name: masked(pruned.selection, name, pruned.full(name)),
            ),
            Side(captured.program, every.__getitem__),
            axes,
            plan,
            memory=Memory.of(None),
            positions=64,
        )

    run.right = right  # type: ignore[attr-defined]
    return run


def test_positions_belong_to_the_embedding_which_is_asked_for_all_of_them() -> None:
    program = capture_model(build("GPT2")).program
    first, *branches, last = parts(program)
    tables = {name for piece in first.pieces for name in piece.params}
    assert {"transformer.wte.weight", "transformer.wpe.weight"} <= tables
    assert len(branches) == 4 and all(part.branch for part in branches)
    assert not first.branch and not last.branch


def test_every_layer_is_compared_and_named(compare: Compare) -> None:
    found = compare({})
    assert found.largest < 1e-5
    assert list(found.layers) == LAYERS
    assert [p.probe for p in found.probes] == ["model.embed_tokens", *LAYERS, "lm_head"]
    assert found.tokens == 16


def test_a_single_wrong_row_is_found_in_every_tensor(compare: Compare) -> None:
    right: dict[str, torch.Tensor] = compare.right  # type: ignore[attr-defined]
    missed: list[str] = []
    for name, tensor in right.items():
        wrong = tensor.clone()
        wrong[-1] = wrong[-1] * 1.5 + 0.01
        try:
            compare({name: wrong})
        except SurgeonError as error:
            assert error.code is Code.VERIFY_FAILED
        else:
            missed.append(name)
    assert not missed


def test_a_value_that_is_no_number_is_found(compare: Compare) -> None:
    right: dict[str, torch.Tensor] = compare.right  # type: ignore[attr-defined]
    wrong = right["lm_head.weight"].clone()
    wrong[3, 3] = float("nan")
    with pytest.raises(SurgeonError, match="lm_head"):
        compare({"lm_head.weight": wrong})


def test_a_written_checkpoint_is_compared_from_its_files(pruned: Pruned, out: Path) -> None:
    found = verify_layers(pruned, out)
    assert found.largest < 1e-5 and found.rounded and found.exact


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_wrong_row_in_a_file_is_found(
    pruned: Pruned, out: Path, tmp_path: Path, name: str
) -> None:
    edited = tmp_path / "edited"
    edited.mkdir()
    for file in out.iterdir():
        (edited / file.name).write_bytes(file.read_bytes())
    with safe_open(out / "model.safetensors", "pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    tensors[name][-1] *= 1.25
    save_file(tensors, edited / "model.safetensors", {"format": "pt"})
    with pytest.raises(SurgeonError) as caught:
        verify_layers(pruned, edited)
    assert caught.value.code is Code.VERIFY_FAILED


def test_layers_are_compared_where_the_whole_model_does_not_fit(
    pruned: Pruned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pruned.fits
    monkeypatch.setattr(Memory, "fits", lambda self, need: False)
    report = replace(pruned, memory=Memory(2**40)).save(tmp_path / "out")
    assert report.verification is not None
    assert report.verification["layers"] == tuple(LAYERS)
    told = json.loads((tmp_path / "out" / "surgeon.json").read_text())
    assert told["verification"]["tokens"] == 16


def test_a_layer_that_does_not_fit_is_refused_with_the_number_needed(pruned: Pruned) -> None:
    with pytest.raises(SurgeonError, match="compared in fp32") as caught:
        check_layers(
            Side(masked_program(pruned.axes, pruned.plan), pruned.full),
            Side(pruned.program, pruned.tensor),
            pruned.axes,
            pruned.plan,
            memory=Memory(1, asked=True),
        )
    assert caught.value.data["need_bytes"] > 2**20
