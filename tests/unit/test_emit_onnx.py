from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from surgeon.capture.model import capture_module
from surgeon.emit import onnx_graph
from surgeon.emit.onnx_graph import check_onnx, write_onnx
from surgeon.emit.pt2 import samples
from surgeon.errors import Code, SurgeonError
from surgeon.runtime.lower import lower
from surgeon.runtime.session import OrtSession
from tests.unit.test_emit_pt2 import Captured, captured, forward, pruned, two

pytestmark = pytest.mark.slow


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path, load_external_data=False).graph.node]


@pytest.fixture(scope="module")
def tied_llama(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    model = tiny("Llama", tie_word_embeddings=True)
    program, weights = captured(model)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(program, weights, path, metadata={"source": "Ünïcode"}, check=False)
    return model, program, path


def test_onnx_runtime_gives_the_models_own_logits(tied_llama: Any) -> None:
    model, program, path = tied_llama
    assert check_onnx(path, forward(model), samples(program)) < 1e-5


def test_what_the_graph_says(tied_llama: Any) -> None:
    _, _program, path = tied_llama
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)

    def shape(value: Any) -> list[Any]:
        return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]

    inputs = {value.name: shape(value) for value in model.graph.input}
    names = ("input_ids", "attention_mask", "position_ids")
    assert inputs == {name: ["batch", "seq"] for name in names}
    assert [(o.name, shape(o)) for o in model.graph.output] == [("logits", ["batch", "seq", 101])]
    assert {p.key: p.value for p in model.metadata_props}["source"] == "Ünïcode"
    vocab = [i.name for i in model.graph.initializer if list(i.dims) == [101, 48]]
    assert len(vocab) == 1  # the tied head
    assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    assert not any(node.metadata_props for node in model.graph.node)
    assert kinds(path).count("Attention") == 2
    assert "Constant" not in kinds(path)


def test_surgeons_own_session_opens_it(tied_llama: Any) -> None:
    model, _, path = tied_llama
    ids = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = OrtSession(path, providers=["CPUExecutionProvider"]).run(ids.numpy(), mask.numpy())
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = forward(model)(ids, mask, positions)
    apart = (torch.from_numpy(found) - wanted)[mask.bool()].abs().max()
    assert apart < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_pruned_program(name: str, tiny: Any, tmp_path: Path) -> None:
    program, weights = pruned(tiny(name))
    written = write_onnx(program, weights, tmp_path / "model.onnx")
    assert written.largest is not None and written.largest < 1e-5


def test_an_older_opset_spells_attention_out(tiny: Any, tmp_path: Path) -> None:
    program, weights = captured(tiny("Llama"))
    path = tmp_path / "model.onnx"
    written = write_onnx(program, weights, path, opset=18)
    assert written.largest is not None and written.largest < 1e-5
    assert {i.domain: i.version for i in onnx.load(path).opset_import}[""] == 18
    assert "Attention" not in kinds(path) and "Softmax" in kinds(path)


def test_a_model_is_traced_once_and_not_taken_apart(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, weights = captured(tiny("Llama"))

    def slow(*_: Any, **__: Any) -> None:
        raise AssertionError("decomposed")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", slow)
    write_onnx(program, weights, tmp_path / "model.onnx", check=False)


class Composite(nn.Module):
    """`repeat_interleave` has to be taken apart, `relu_` to be made functional."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.up, self.inplace = nn.Linear(8, 8), inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(x)
        return y + y.relu_() if self.inplace else y.repeat_interleave(2, 1)


def of(module: nn.Module) -> Captured:
    found, _ = capture_module(module.eval(), (torch.randn(3, 8),))
    return found.program, {**module.state_dict(), **found.constants}


@pytest.mark.parametrize("inplace", [False, True])
def test_an_operation_that_has_to_be_taken_apart_is(inplace: bool, tmp_path: Path) -> None:
    program, weights = of(Composite(inplace))
    written = write_onnx(program, weights, tmp_path / "model.onnx")
    assert written.largest is not None and written.largest < 1e-6


def test_any_module_with_its_own_inputs(tmp_path: Path) -> None:
    program, weights = two()
    path = tmp_path / "two.onnx"
    others = tmp_path / "two.onnx.data"
    others.write_text("not ours")
    written = write_onnx(program, weights, path)
    assert written.largest is not None and written.largest < 1e-6
    assert others.read_text() == "not ours"
    graph = onnx.load(path).graph
    assert [v.name for v in graph.input] == ["x", "y"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == program.symbols[0]
    assert [v.name for v in graph.output] == list(program.outputs)


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.i0e(x) * 2


def test_an_operation_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    program, weights = of(Strange())
    with pytest.raises(SurgeonError) as caught:
        write_onnx(program, weights, tmp_path / "model.onnx")
    assert caught.value.code is Code.TARGET_REFUSED
    assert caught.value.at.startswith("aten.special_i0e.default in ")
    assert "test_emit_onnx.py" in caught.value.at
    assert not list(tmp_path.iterdir())


def test_large_weights_lie_beside_and_are_replaced_together(tmp_path: Path) -> None:
    program, weights = two()
    path, beside = tmp_path / "two.onnx", tmp_path / "two.onnx.data"
    inline = 64  # no tensor of this model is larger than what stays in the graph by default

    def write(weights: Any, above: int) -> tuple[Path, ...]:
        written = write_onnx(program, weights, path, overwrite=True, external_above=above)
        assert written.largest is not None
        assert check_onnx(path, lower(program, weights), samples(program)) < 1e-6
        return written.files

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_graph, "INLINE", inline)
        assert write(weights, 10) == (path, beside)
        assert beside.stat().st_size >= 2 * 12 * 8 * 4
        halved = {name: tensor / 2 for name, tensor in weights.items()}
        assert write(halved, 10) == (path, beside)
        assert sorted(tmp_path.iterdir()) == [path, beside]
        # Moved together they still belong together: no name of a temporary file is left inside.
        moved = tmp_path / "moved"
        moved.mkdir()
        for file in (path, beside):
            file.rename(moved / file.name)
        assert check_onnx(moved / path.name, lower(program, halved), samples(program)) < 1e-6
        for file in (path, beside):
            (moved / file.name).rename(file)
        moved.rmdir()
        assert write(weights, 1 << 20) == (path,)
        assert list(tmp_path.iterdir()) == [path]


def test_wrong_outputs_are_refused_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, weights = two()
    path = tmp_path / "two.onnx"
    original = onnx_graph.lower
    monkeypatch.setattr(
        onnx_graph,
        "lower",
        lambda program, get: original(program, lambda name: get(name) * 1.01),
    )
    with pytest.raises(SurgeonError) as caught:
        write_onnx(program, weights, path)
    assert caught.value.code is Code.VERIFY_FAILED
    assert not list(tmp_path.iterdir())


def test_what_onnx_runtime_cannot_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(SurgeonError) as caught:
        check_onnx(path, lambda *_: None, samples(two()[0]))
    assert caught.value.code is Code.RUNTIME_FAILED
