from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.export import Dim

from surgeon.axes import analyse
from surgeon.axes.plan import Cut, Plan, Selection, cut
from surgeon.axes.surgery import operate
from surgeon.capture.model import capture_model, capture_module
from surgeon.emit import pt2
from surgeon.emit.pt2 import Sample, check_pt2, export, samples, write_pt2
from surgeon.emit.target import find_targets, get_target
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program
from surgeon.runtime.apply import removed
from surgeon.runtime.lower import lower

pytestmark = pytest.mark.slow

Captured = tuple[Program, dict[str, torch.Tensor]]


def captured(model: Any) -> Captured:
    found = capture_model(model)
    named = [*model.named_parameters(remove_duplicate=False)]
    named += [*model.named_buffers(remove_duplicate=False)]
    return found.program, {**{n: t.detach() for n, t in named}, **found.constants}


def pruned(model: Any) -> Captured:
    """About half of every axis that may go."""
    program, weights = captured(model)
    axes = analyse(program)
    cuts: list[Cut] = []
    for axis in axes.axes:
        if axis.prunable and axis.size > 1:
            cuts.append(cut(axis, np.arange(axis.size)[: (axis.size + 1) // 2]))
    plan = Plan(tuple(cuts), (axes.branches[0].name,))
    selection = Selection(axes, plan)
    small = operate(axes, plan)
    return small, {p.name: removed(selection, p.name, weights[p.name]) for p in small.params}


def forward(model: Any) -> Any:
    return lambda ids, mask, positions: (
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    )


class Two(nn.Module):
    """Two inputs, two outputs, a size that stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.down(torch.relu(self.up(x))) + y, x * 2


def two() -> Captured:
    rows = Dim("rows")
    module = Two().eval()
    args = (torch.randn(3, 8), torch.randn(3, 8))
    found, _ = capture_module(module, args, dynamic_shapes=({0: rows}, {0: rows}))
    return found.program, dict(module.state_dict())


@pytest.fixture(scope="module")
def tied_llama(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Program, Path]:
    model = tiny("Llama", tie_word_embeddings=True)
    program, weights = captured(model)
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    written = write_pt2(program, weights, path, metadata={"source": "Ünïcode"}, check=False)
    assert written.files == (path,)
    return model, program, path


def test_it_gives_the_models_own_logits_where_only_torch_is(tied_llama: Any) -> None:
    model, program, path = tied_llama
    given = samples(program)
    # Left padding, a single token, and sizes that were not traced.
    assert [tuple(s.inputs[0].shape) for s in given] == [(2, 11), (1, 1), (3, 17)]
    assert int((given[0].inputs[1] == 0).sum()) == 4
    assert check_pt2(path, forward(model), given) < 1e-5


def test_values_narrower_than_keys_stay_so(tiny: Any, tmp_path: Path) -> None:
    """A kernel of this machine may want them as wide; a program that is written is for any."""
    program, weights = captured(tiny("Llama"))
    axes = analyse(program)
    plan = Plan(tuple(cut(a, range(a.size // 2)) for a in axes.of_role("v")))
    selection, small = Selection(axes, plan), operate(axes, plan)
    kept = {p.name: removed(selection, p.name, weights[p.name]) for p in small.params}
    write_pt2(small, kept, tmp_path / "model.pt2", check=False)
    loaded = torch.export.load(tmp_path / "model.pt2")
    targets = {str(n.target) for n in loaded.graph.nodes}
    assert "aten.scaled_dot_product_attention.default" in targets
    assert not any("pad" in target for target in targets)


def test_what_the_file_holds(tied_llama: Any) -> None:
    _model, program, path = tied_llama
    extra = {pt2.METADATA: ""}
    loaded = torch.export.load(path, extra_files=extra)
    assert json.loads(extra[pt2.METADATA]) == {"source": "Ünïcode"}
    assert loaded.graph_signature.user_inputs == ("input_ids", "attention_mask", "position_ids")
    assert set(loaded.state_dict) == {p.name for p in program.params}  # the tied head is not there
    assert {t.dtype for t in loaded.state_dict.values()} == {torch.float32}
    targets = [str(n.target) for n in loaded.graph.nodes if n.op == "call_function"]
    assert all(t.startswith("aten.") for t in targets)
    assert targets.count("aten.scaled_dot_product_attention.default") == 2
    here = [str(Path(p).resolve()).encode() for p in (pt2.__file__, torch.__file__)]
    with zipfile.ZipFile(path) as file:
        for name in file.namelist():
            assert not any(str(Path(h.decode()).parent).encode() in file.read(name) for h in here)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_pruned_program(name: str, tiny: Any, tmp_path: Path) -> None:
    program, weights = pruned(tiny(name))
    assert program.param["model.layers.1.mlp.up_proj.weight"].type.shape == (40, 24)
    written = write_pt2(program, weights, tmp_path / "model.pt2")
    assert written.largest is not None and written.largest < 1e-6


def test_any_module_with_its_own_inputs(tmp_path: Path) -> None:
    program, weights = two()
    path = tmp_path / "two.pt2"
    assert write_pt2(program, weights, path).largest == 0.0
    run = torch.export.load(path).module()
    for rows in (1, 2, 40):
        x, y = torch.randn(rows, 8), torch.randn(rows, 8)
        for found, wanted in zip(run(x, y), lower(program, weights)(x, y), strict=True):
            assert torch.equal(found, wanted)


def test_wrong_outputs_are_refused(tied_llama: Any) -> None:
    _, program, path = tied_llama
    _, weights = captured(tied_llama[0])
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.001
    with pytest.raises(SurgeonError) as caught:
        check_pt2(path, lower(program, weights), samples(program))
    assert caught.value.code is Code.VERIFY_FAILED
    assert 5e-4 < caught.value.data["largest"] < 2e-3


def test_what_is_no_number_is_a_difference_even_under_padding() -> None:
    given = samples(two()[0])[:1]
    sample = Sample("one", given[0].inputs, torch.zeros(2, dtype=torch.bool))
    broken = [(torch.full((2, 8), torch.nan),)]
    with pytest.raises(SurgeonError) as caught:
        pt2.compare("here", broken, lambda *_: torch.zeros(2, 8), [sample], 1e-4)
    assert caught.value.code is Code.VERIFY_FAILED


def test_a_file_that_does_not_load_says_what_torch_said(tmp_path: Path) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"no archive")
    with pytest.raises(SurgeonError) as caught:
        check_pt2(path, lambda *_: None, samples(two()[0]))
    assert caught.value.code is Code.RUNTIME_FAILED
    assert "BadZipFile" in caught.value.why


def test_the_check_runs_without_surgeon(tmp_path: Path) -> None:
    for name in ("surgeon", "transformers"):
        code = pt2._ALONE.replace("import torch\n", f"import {name}\n", 1)
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, "", "", ""], capture_output=True, text=True
        )
        assert f"import of {name} halted" in done.stderr


def test_a_failed_check_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, weights = two()
    path = tmp_path / "two.pt2"
    write_pt2(program, weights, path, check=False)
    old = path.read_bytes()

    def fail(*_: Any) -> float:
        raise SurgeonError(Code.VERIFY_FAILED, "no", at="", why="", try_="")

    monkeypatch.setattr(pt2, "check_pt2", fail)
    with pytest.raises(SurgeonError):
        write_pt2(program, weights, path, overwrite=True)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(SurgeonError) as caught:
        write_pt2(program, weights, path)
    assert caught.value.code is Code.BAD_OUTPUT


def test_a_weight_that_is_a_view_is_saved_alone(tmp_path: Path) -> None:
    program, weights = two()
    big = torch.randn(100_000, 8)
    weights["up.weight"] = big[:12]
    path = tmp_path / "two.pt2"
    write_pt2(program, weights, path, check=False)
    assert path.stat().st_size < 100_000


def test_half_precision_weights_become_the_programs_type() -> None:
    program, weights = two()
    exported = export(program, {name: t.to(torch.bfloat16) for name, t in weights.items()})
    assert {t.dtype for t in exported.state_dict.values()} == {torch.float32}


def test_weights_of_another_plan_are_refused() -> None:
    program, weights = two()
    with pytest.raises(SurgeonError) as caught:
        export(program, {**weights, "up.weight": torch.zeros(11, 8)})
    assert caught.value.code is Code.PLAN_MISMATCH
    assert caught.value.at == "up.weight"


def test_what_the_exporter_refuses_is_named() -> None:
    program, weights = two()
    relu = next(op for op in program.ops if op.target == "aten.relu.default")
    broken = replace(relu, args=(*relu.args, *relu.args))
    ops = tuple(broken if op is relu else op for op in program.ops)
    with pytest.raises(SurgeonError) as caught:
        export(replace(program, ops=ops), weights)
    assert caught.value.code is Code.TARGET_REFUSED
    assert caught.value.at.startswith("aten.relu.default in ")
    assert "test_emit_pt2.py" in caught.value.at


# --- targets -------------------------------------------------------------------------------------


def test_targets_are_found_by_their_files_and_listed_without_torch() -> None:
    code = (
        "import sys; from surgeon.emit.target import find_targets;"
        "print(*find_targets()); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, torch_came = done.stdout.splitlines()
    assert {"pt2", "onnx"} <= set(names.split())
    assert torch_came == "False"


def test_a_listed_target_is_the_files_own() -> None:
    for name, info in find_targets().items():
        target = get_target(name)
        assert (target.name, target.description, target.suffix) == (
            info.name,
            info.description,
            info.suffix,
        )
    assert get_target("pt2").write is write_pt2


def test_these_targets_take_any_shape(tiny: Any) -> None:
    axes = analyse(captured(tiny("Llama"))[0])
    axis = next(a for a in axes.axes if a.role == "ffn")
    plan = Plan((cut(axis, [0, 3, 5]),))  # one layer of another width than its neighbours
    assert get_target("pt2").refuse(axes, plan) == []
    assert get_target("onnx").refuse(axes, plan) == []


def test_an_unknown_target_is_told_the_nearest() -> None:
    with pytest.raises(SurgeonError) as caught:
        get_target("onx")
    assert caught.value.code is Code.BAD_OPTION
    assert "onnx" in caught.value.try_
