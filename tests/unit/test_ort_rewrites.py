"""What the rewrites before an ONNX graph find, whatever the model is called."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from surgeon.capture.model import capture_module
from surgeon.emit.ort.activations import activations
from surgeon.emit.ort.decoder import rewritten
from surgeon.emit.ort.graph import Graph, without_constants
from surgeon.emit.ort.norms import rms_norms, skip_norms
from surgeon.emit.ort.rotary import rotaries
from surgeon.emit.ort.tidy import tidy
from surgeon.opening import Model, open_model
from surgeon.runtime.lower import lower
from tests import models

pytestmark = pytest.mark.slow


@cache
def opened(name: str, head_dim: int = 16) -> Model:
    return open_model(models.tiny(name, head_dim=head_dim))


def targets(graph: Graph) -> list[str]:
    return [op.target for op in graph.program.ops]


def of(module: nn.Module, *inputs: torch.Tensor) -> tuple[Graph, Any]:
    captured, _ = capture_module(module.eval(), inputs)
    weights = {**module.state_dict(), **captured.constants}
    return Graph(captured.program), weights.__getitem__


def test_a_llama_layer_is_ten_operations() -> None:
    origin = opened("Llama")
    graph = rewritten(origin.program, origin.read, style="ort", positions=32)
    layer = [op.target for op in graph.program.ops if op.module.startswith("model.layers.1")]
    assert layer == [
        "surgeon.skip_rms_norm",
        "aten.linear.default",
        "surgeon.grouped_attention",
        "aten.linear.default",
        "surgeon.skip_rms_norm",
        "aten.linear.default",
        "surgeon.swish",
        "aten.linear.default",
        "aten.mul.Tensor",
        "aten.linear.default",
    ]


def test_tables_are_shared_by_all_layers_and_hold_every_position() -> None:
    origin = opened("Llama")
    graph = rewritten(origin.program, origin.read, style="ort", positions=32)
    names = [p.name for p in graph.program.params if p.name.startswith("rotary")]
    assert names == ["rotary.cos", "rotary.sin"]
    cos = graph.reader(origin.read)("rotary.cos")
    angles = torch.arange(32.0)[:, None] * origin.read("model.rotary_emb.inv_freq")
    assert torch.allclose(cos, angles.cos(), atol=1e-6)


def test_projections_are_packed_where_they_read_the_same() -> None:
    llama, qwen3 = opened("Llama"), opened("Qwen3")
    packed = rewritten(llama.program, llama.read, style="ort", positions=8)
    apart = rewritten(qwen3.program, qwen3.read, style="ort", positions=8)
    joined = [p.name for p in packed.program.params if "+" in p.name]
    assert len(joined) == 2
    read = packed.reader(llama.read)
    parts = [f"model.layers.0.self_attn.{n}_proj.weight" for n in "qkv"]
    assert torch.equal(read(joined[0]), torch.cat([llama.read(n) for n in parts]))
    # Norms stand between the projections and the attention: there is nothing to pack.
    assert not [p.name for p in apart.program.params if "+" in p.name]


class Norm(nn.Module):
    """RMSNorm with a mean that counts removed channels, as the surgery of `hidden` leaves it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.weight, self.share = nn.Parameter(torch.rand(8) + 0.5), share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.pow(2).mean(-1, keepdim=True) * self.share
        return self.weight * (x * torch.rsqrt(mean + 0.1))


@pytest.mark.parametrize("share", [1.0, 0.75])
def test_a_corrected_mean_moves_into_eps_and_weight(share: float) -> None:
    module, x = Norm(share), torch.randn(2, 3, 8)
    graph, get = of(module, x)
    found = rms_norms(tidy(graph))
    (op,) = found.program.ops
    assert op.target == "surgeon.rms_norm" and op.kwarg("eps") == pytest.approx(0.1 / share)
    weight = found.reader(get)(op.args[1].name)  # type: ignore[union-attr]
    again = weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1 / share)
    torch.testing.assert_close(again, module(x))


class NearlyNorm(nn.Module):
    """Divides by the root of the mean absolute value: no RMSNorm."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 0.1)


class Rows(nn.Module):
    """A norm over the rows, not the channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 0.1)


@pytest.mark.parametrize("module", [NearlyNorm(), Rows()])
def test_what_only_looks_like_a_norm_is_left_alone(module: nn.Module) -> None:
    graph, _ = of(module, torch.randn(4, 8))
    assert "surgeon.rms_norm" not in targets(rms_norms(tidy(graph)))


class Turn(nn.Module):
    """Rotation of halves, by angles that positions make."""

    freq: torch.Tensor

    def __init__(self, swapped: bool = False, uneven: bool = False) -> None:
        super().__init__()
        self.swapped, self.uneven = swapped, uneven
        self.register_buffer("freq", torch.rand(4))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        angle = position_ids[:, None, :, None].float() * self.freq
        half = angle * 2 if self.uneven else angle
        angle = torch.cat([angle, half], -1)
        a, b = x[..., :4], x[..., 4:]
        turned = torch.cat([a, -b] if self.swapped else [-b, a], -1)
        return x * angle.cos() + turned * angle.sin()


@pytest.mark.parametrize(
    ("options", "found"), [({}, True), ({"swapped": True}, False), ({"uneven": True}, False)]
)
def test_a_rotation_of_halves_and_its_likes(options: dict[str, bool], found: bool) -> None:
    module = Turn(**options)
    x, positions = torch.randn(1, 2, 5, 8), torch.arange(5)[None]
    graph, get = of(module, x, positions)
    graph = tidy(without_constants(graph))
    graph = tidy(rotaries(graph, get, 16))
    assert ("surgeon.rotary" in targets(graph)) is found


class Gates(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cubic = 0.7978845608028654 * (x + 0.044715 * x.pow(3.0))
        almost = 0.7978845608028654 * (x + 0.05 * x.pow(3.0))
        return (
            0.5 * x * (1.0 + torch.tanh(cubic)),
            0.5 * x * (1.0 + torch.tanh(almost)),
            x * torch.sigmoid(1.702 * x),
            x * torch.sigmoid(x),
            nn.functional.silu(x),
        )


def test_activations_that_are_spelled_out() -> None:
    graph, _ = of(Gates(), torch.randn(2, 8))
    found = activations(tidy(graph))
    makes = {name: op for op in found.program.ops for name in op.outputs}
    outputs = [makes[name] for name in found.program.outputs]
    assert [op.target for op in outputs] == [
        "aten.gelu.default",
        "aten.mul.Tensor",
        "surgeon.swish",
        "surgeon.swish",
        "surgeon.swish",
    ]
    assert [op.kwarg("alpha") for op in outputs[2:]] == [1.702, 1.0, 1.0]


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Linear(8, 8), nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.cat([self.up(x), x[..., 8:]], -1) * 1.0
        return y * (self.scale + 1.0) + (y * 1.0).view(2, 3, 8)


def test_identities_go_and_constants_become_parameters() -> None:
    module, x = Tail(), torch.randn(2, 3, 8)
    graph, get = of(module, x)
    found = tidy(without_constants(graph))
    assert targets(found) == ["aten.linear.default", "aten.mul.Tensor", "aten.add.Tensor"]
    (folded,) = [p.name for p in found.program.params if p.kind == "constant"]
    torch.testing.assert_close(found.reader(get)(folded), module.scale.detach() + 1)
    same = lower(found.program, found.reader(get))(x)
    torch.testing.assert_close(same, module(x))


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        total = x + y
        return self.one(total) + self.two(total) + total


def test_a_sum_is_fused_with_one_of_its_norms() -> None:
    graph, _ = of(Sums(), torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    found = targets(skip_norms(graph))
    assert found[:2] == ["surgeon.skip_layer_norm", "aten.layer_norm.default"]
