"""Capture of a user's own modules: traced as they are, without Transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from surgeon.axes import Axes, analyse
from surgeon.capture.exported import read
from surgeon.capture.model import capture_exported, capture_module
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program, parse, to_text
from surgeon.runtime.lower import lower


def program_of(module: nn.Module, *args: torch.Tensor, **options) -> Program:
    captured, _ = capture_module(module.eval(), args, **options)
    assert parse(to_text(captured.program)) == captured.program
    return captured.program


def targets(program: Program) -> list[str]:
    return [op.target for op in program.ops]


def partition(axes: Axes) -> dict[frozenset[str], int]:
    return {frozenset(f"{m.param}:{m.dim}" for m in a.members): a.size for a in axes.axes}


class Chain(nn.Module):
    """A chain of matrix products with plain tensors for weights."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(5, 7))
        self.b = nn.Parameter(torch.zeros(7, 6))
        self.c = nn.Parameter(torch.zeros(6, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.a @ self.b @ self.c


def test_a_chain_of_matrix_products():
    program = program_of(Chain(), torch.zeros(2, 5))
    assert targets(program) == ["aten.matmul.default"] * 3
    axes = analyse(program)
    assert partition(axes) == {
        frozenset(["a:0"]): 5,
        frozenset(["a:1", "b:0"]): 7,
        frozenset(["b:1", "c:0"]): 6,
        frozenset(["c:1"]): 3,
    }
    assert [a.prunable for a in axes.axes] == [False, True, True, False]
    assert all(a.gauge.text == "any invertible map" for a in axes.axes if a.prunable)


class Residual(nn.Module):
    def __init__(self, width: int = 8, inner: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.out = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        return self.out(x)


def test_a_residual_mlp():
    batch = torch.export.Dim("batch")
    program = program_of(Residual(), torch.zeros(2, 3), dynamic_shapes=({0: batch},))
    (symbol,) = program.symbols
    assert program.inputs[0].type.shape == (symbol, 3)
    axes = analyse(program)
    inner = frozenset(["up.weight:0", "up.bias:0", "down.weight:1"])
    hidden = frozenset(
        ["embed.weight:0", "embed.bias:0", "norm.weight:0", "norm.bias:0", "up.weight:1"]
        + ["down.weight:0", "down.bias:0", "out.weight:1"]
    )
    assert partition(axes) == {
        hidden: 8,
        inner: 12,
        frozenset(["embed.weight:1"]): 3,
        frozenset(["out.weight:0", "out.bias:0"]): 2,
    }
    roles = {a.role: a for a in axes.axes if a.prunable}
    assert set(roles) == {"hidden", "ffn"}
    assert roles["ffn"].exact and not roles["hidden"].exact  # LayerNorm
    assert [(b.kind, b.params) for b in axes.branches] == [
        ("mlp", ("norm.weight", "norm.bias", "up.weight", "up.bias", "down.weight", "down.bias"))
    ]


class Attention(nn.Module):
    """Grouped-query attention as a user writes it, with torch's own operation."""

    def __init__(self, kv: int = 2, rep: int = 3, head: int = 4, width: int = 20) -> None:
        super().__init__()
        self.kv, self.rep, self.head = kv, rep, head
        self.q = nn.Linear(width, kv * rep * head, bias=False)
        self.k = nn.Linear(width, kv * head, bias=False)
        self.v = nn.Linear(width, kv * head, bias=False)
        self.o = nn.Linear(kv * rep * head, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.kv * self.rep, self.head).transpose(1, 2)
        k = self.k(x).view(b, s, self.kv, self.head).transpose(1, 2)
        v = self.v(x).view(b, s, self.kv, self.head).transpose(1, 2)

        def repeated(t: torch.Tensor) -> torch.Tensor:
            t = t[:, :, None].expand(b, self.kv, self.rep, s, self.head)
            return t.reshape(b, self.kv * self.rep, s, self.head)

        y = functional.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(b, s, -1))


def test_grouped_query_attention_with_torchs_own_operation():
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s", min=2)},)
    program = program_of(Attention(), torch.zeros(2, 5, 20), dynamic_shapes=shapes)
    assert "aten.scaled_dot_product_attention.default" in targets(program)
    axes = analyse(program)
    assert partition(axes) == {
        frozenset(["q.weight:1", "k.weight:1", "v.weight:1", "o.weight:0"]): 20,
        frozenset(["q.weight:0", "k.weight:0", "v.weight:0", "o.weight:1"]): 2,  # kv heads
        frozenset(["q.weight:0", "o.weight:1"]): 3,  # queries per kv head
        frozenset(["q.weight:0", "k.weight:0"]): 4,
        frozenset(["v.weight:0", "o.weight:1"]): 4,
    }
    assert {(a.role, a.size) for a in axes.axes if a.prunable} == {
        ("kv_heads", 2),
        ("q_per_kv", 3),
        ("qk", 4),
        ("v", 4),
    }
    assert axes.text(axes.param_dims("q.weight")[0]) == "kv_heads:2 × q_per_kv:3 × qk:4"
    assert [b.kind for b in axes.branches] == ["attention"]


def test_an_exported_program_gives_what_its_module_gives():
    captured, exported = capture_module(Residual(), (torch.zeros(2, 3),))
    assert capture_exported(exported).program == captured.program


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(4))
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            a, b = torch.cos(x * self.w), torch.sin(x)
            with torch.enable_grad():
                b = b * 2
            with torch.no_grad():
                a = a + self.w
        return self.fc(a) + b


def test_nested_graphs_are_inlined():
    captured, exported = capture_module(NoGrad(), (torch.zeros(2, 4),))
    assert any("set_grad_enabled" in str(n.target) for n in exported.graph.nodes)
    program = captured.program
    kinds = [t.split(".")[1] for t in targets(program)]
    assert sorted(kinds) == ["add", "add", "cos", "linear", "mul", "mul", "sin"]
    assert len(program.readers["w"]) == 2
    axes = analyse(program)
    (axis,) = (a for a in axes.axes if ("w", 0) in axes.carriers(a))
    assert ("fc.weight", 1) in axes.carriers(axis)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(x)))


def test_a_tied_parameter_is_one_with_two_uses():
    program = program_of(Tied(), torch.zeros(2, 3, dtype=torch.long))
    assert [(p.name, p.aliases) for p in program.params] == [
        ("embed.weight", ("head.weight",)),
        ("middle.weight", ()),
    ]
    assert [program.ops[i].target for i in program.readers["embed.weight"]] == [
        "aten.embedding.default",
        "aten.linear.default",
    ]
    assert program.param_of["head.weight"] == "embed.weight"
    axes = analyse(program)
    (axis,) = (a for a in axes.axes if ("embed.weight", 1) in axes.carriers(a))
    assert set(axes.carriers(axis)) == {
        ("embed.weight", 1),
        ("middle.weight", 0),
        ("middle.weight", 1),
    }


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", torch.ones(4))
        self.register_buffer("made", torch.ones(4), persistent=False)
        self.fc = nn.Linear(4, 4)
        self.unused = nn.Linear(9, 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dead = self.unused(torch.zeros(9))
        del dead
        literal = torch.tensor([1.0, 2, 3, 4])
        return self.fc(x.float()).contiguous() * self.kept + self.made * literal


def test_buffers_constants_identities_and_dead_code():
    captured, _ = capture_module(Buffers(), (torch.zeros(2, 4),))
    program = captured.program
    kinds = {p.name: p.kind for p in program.params}
    constants = [name for name, kind in kinds.items() if kind == "constant"]
    assert kinds["kept"] == "buffer" and kinds["made"] == "computed"
    assert not any(name.startswith("unused") for name in kinds)
    assert len(constants) == 1 and captured.constants[constants[0]].tolist() == [1, 2, 3, 4]
    kinds_of_op = [t.split(".")[1] for t in targets(program)]
    assert sorted(kinds_of_op) == ["add", "linear", "mul", "mul"]


def test_every_operation_knows_its_module_and_line():
    program = program_of(Residual(), torch.zeros(2, 3))
    lines = Path(__file__).read_text().splitlines()
    said: dict[str, str] = {}
    for op in program.ops:
        file, line = op.source.split(":")
        assert file == "test_capture_module.py"
        said[op.target] = lines[int(line) - 1].strip()
    assert said["aten.gelu.default"] == "x = x + self.down(functional.gelu(self.up(self.norm(x))))"
    assert said["aten.linear.default"] == "return self.out(x)"
    found = {op.module for op in program.ops}
    assert {"embed", "norm", "up", "down", "out", ""} == found


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x - 1


class Breaks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("this model is broken")


class ReturnsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return x * 2, 3


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            return self.fc(x)


class Autocasts(Autocast):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.fc(x)


class Item(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.sum().item()


class Count(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nonzero(x)


class Cond(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: y * 2, lambda y: y - 1, (x,))


class Complex(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(torch.complex128) * 2).real


@pytest.mark.parametrize(
    "module, code, words",
    [
        (Branches(), Code.DATA_DEPENDENT, "Branches"),
        (Breaks(), Code.CAPTURE_FAILED, "this model is broken"),
        (ReturnsInput(), Code.CAPTURE_FAILED, "3 is returned as it is"),
        (Complex(), Code.CAPTURE_FAILED, "complex128"),
        (Autocasts(), Code.CAPTURE_FAILED, "runs under autocast"),
        (Item(), Code.DATA_DEPENDENT, "aten.mul.Tensor"),
        (Count(), Code.DATA_DEPENDENT, "aten.nonzero.default"),
        (Cond(), Code.CAPTURE_FAILED, "nested graph under a condition"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_captured_is_refused_in_four_parts(module, code, words):
    with pytest.raises(SurgeonError) as caught:
        capture_module(module, (torch.ones(2, 4),))
    error = caught.value
    assert error.code is code
    assert all([error.what, error.at, error.why, error.try_])
    assert words in str(error)


def test_autocast_regions_are_inlined():
    program = program_of(Autocast(), torch.zeros(2, 4))
    assert targets(program) == ["aten.linear.default"]


def test_a_module_is_left_as_it_was():
    module = Residual()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    attributes = {name: dict(vars(m)) for name, m in module.named_modules()}
    capture_module(module, (torch.zeros(2, 3),))
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert {name: dict(vars(m)) for name, m in module.named_modules()} == attributes


def test_read_names_the_dynamic_sizes():
    batch = torch.export.Dim("batch")
    exported = torch.export.export(
        Residual(), (torch.zeros(2, 3),), dynamic_shapes=({0: batch},), strict=False
    )
    program, _ = read(exported, dims={"x": ("rows",)})
    assert program.symbols == ("rows",) and program.inputs[0].type.shape == ("rows", 3)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = self.a(x)
        c[:, :2].mul_(2)
        return c + c.relu_()


class Counts(nn.Module):
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x * self.count


def test_writes_into_intermediate_tensors_become_functional() -> None:
    module, x = InPlace(), torch.randn(2, 8)
    program = program_of(module, x)
    found = targets(program)
    assert "aten.slice_scatter.default" in found and "aten.relu.default" in found
    assert not any(target.split(".")[1].endswith("_") for target in found)
    assert program.ops[-1].source.startswith("test_capture_module.py")
    torch.testing.assert_close(lower(program, module.state_dict())(x), module(x))


def test_a_write_into_a_modules_own_state_is_refused_by_name() -> None:
    with pytest.raises(SurgeonError) as caught:
        program_of(Counts(), torch.zeros(2, 8))
    assert caught.value.code is Code.CAPTURE_FAILED
    assert caught.value.what == "the module writes into count"
