"""From a program to a torch module: what runs, is exported, and is compared with."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import fx, nn

from surgeon.errors import Code, SurgeonError
from surgeon.ir import Arg, DType, Op, ParamRef, Program, Ref, Sym

TORCH_DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
    "c64": torch.complex64,
}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    padding: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns attention by torch's own operations, `[B, Hq, S, Dv]`.

    A query that sees no key (padding before the first token) attends to all keys alike, so
    that nothing becomes NaN; such places are never read.
    """
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads != kv_heads:
        k = k.repeat_interleave(heads // kv_heads, dim=1)
        v = v.repeat_interleave(heads // kv_heads, dim=1)
    rows = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    columns = torch.arange(k.shape[2], device=q.device)[None, :]
    seen = columns <= rows if causal else columns >= 0
    if window is not None:
        seen = seen & (columns > rows - window)
    seen = seen[None, None]
    if padding is not None:
        seen = seen & padding.to(torch.bool)[:, None, None, :]
    bias = torch.where(seen, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
    if softcap is None and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + bias
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, sink], dim=-1).float(), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores.float(), dim=-1)
    return weights.to(q.dtype) @ v


def _target(name: str) -> Callable[..., Any]:
    if name == "surgeon.attention":
        return attention
    try:
        return reduce(getattr, name.split("."), torch.ops)
    except AttributeError as error:
        raise SurgeonError(
            Code.NO_OP_RULE,
            f"torch has no operation {name}",
            at=name,
            why="the program names an operation that this version of torch lacks",
            try_="capture the model again with the torch that is installed",
        ) from error


class _Builder:
    def __init__(self, program: Program, change: Mapping[int, Callable[..., Any]]) -> None:
        self.program, self.change = program, change
        self.graph = fx.Graph()
        self.env: dict[str, fx.Node] = {}
        self.sizes: dict[str, fx.Node] = {}
        self.params: dict[str, fx.Node] = {}
        self.attribute: dict[str, str] = {}

    def size(self, expression: str) -> Any:
        return self._evaluate(ast.parse(expression, mode="eval").body)

    def _evaluate(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            if node.id not in self.sizes:
                self.sizes[node.id] = self._symbol(node.id)
            return self.sizes[node.id]
        if isinstance(node, ast.BinOp):
            table: dict[type[ast.operator], Callable[..., Any]] = {
                ast.Add: operator.add,
                ast.Sub: operator.sub,
                ast.Mult: operator.mul,
                ast.FloorDiv: operator.floordiv,
            }
            left, right = self._evaluate(node.left), self._evaluate(node.right)
            call = table[type(node.op)]
            if isinstance(left, int) and isinstance(right, int):
                return call(left, right)
            return self.graph.call_function(call, (left, right))
        raise SurgeonError(
            Code.BAD_PROGRAM,
            "a symbolic size can't be computed",
            at=ast.unparse(node),
            why="only sums, products and quotients of sizes are known",
            try_="capture the model with plain batch and sequence sizes",
        )

    def _symbol(self, name: str) -> fx.Node:
        for given in self.program.inputs:
            for dim, size in enumerate(given.type.shape):
                if size == name:
                    return self.graph.call_function(
                        torch.ops.aten.sym_size.int, (self.env[given.name], dim)
                    )
        raise SurgeonError(
            Code.BAD_PROGRAM,
            f"the size {name} is no input's size",
            at=name,
            why="every symbol must be a whole dimension of an input",
            try_="capture the model with plain batch and sequence sizes",
        )

    def arg(self, arg: Arg) -> Any:
        match arg:
            case Ref(name):
                return self.env[name]
            case ParamRef(name):
                return self.params[name]
            case Sym(expr):
                return self.size(expr)
            case DType(name):
                return TORCH_DTYPES[name]
            case tuple():
                return [self.arg(item) for item in arg]
            case _:
                return arg

    def op(self, index: int, op: Op) -> None:
        call = self.change.get(index) or _target(op.target)
        target = op.target
        if target in ("aten.view.default", "aten._unsafe_view.default"):
            call = torch.ops.aten.reshape.default  # layouts are torch's own affair here
        node = self.graph.call_function(
            call, tuple(self.arg(a) for a in op.args), {k: self.arg(v) for k, v in op.kwargs}
        )
        if len(op.outputs) == 1:
            self.env[op.outputs[0]] = node
            return
        for i, name in enumerate(op.outputs):
            self.env[name] = self.graph.call_function(operator.getitem, (node, i))


class Lowered(fx.GraphModule):
    """A program as a torch module: the inputs in the program's order, the first output or all."""


def lower(
    program: Program,
    weights: Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor],
    *,
    change: Mapping[int, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """Returns a module that runs the program on some weights.

    Args:
        program: any valid program.
        weights: by parameter name; the tensors are used as they are, not copied.
        change: functions that take the place of operations, by index.
    """
    get = weights if callable(weights) else weights.__getitem__
    builder = _Builder(program, change or {})
    root = nn.Module()
    for given in program.inputs:
        builder.env[given.name] = builder.graph.placeholder(given.name)
    for p in program.params:
        tensor = get(p.name)
        path = p.name.split(".")
        owner = root
        for part in path[:-1]:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        if p.kind == "parameter" and tensor.is_floating_point():
            owner.register_parameter(path[-1], nn.Parameter(tensor, requires_grad=False))
        else:
            owner.register_buffer(path[-1], tensor)
        builder.params[p.name] = builder.graph.get_attr(p.name)
    for index, op in enumerate(program.ops):
        builder.op(index, op)
    results = tuple(builder.env[name] for name in program.outputs)
    builder.graph.output(results[0] if len(results) == 1 else results)
    builder.graph.eliminate_dead_code()
    module = fx.GraphModule(root, builder.graph)
    return module.eval()
