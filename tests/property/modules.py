"""Small torch modules as data: what each step of one computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

BATCH = 101
"""A prime that no other size reaches: a size it divides is a multiple of the batch."""
SIZES = (2, 3, 4, 6)
VOCAB = 9
LARGEST = 40_000

Shape = tuple[int, ...]

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sin": torch.sin,
    "neg": torch.neg,
    "abs": torch.abs,
    "square": lambda x: x.pow(2),
    "half": lambda x: x * 0.5,
    "sigmoid": torch.sigmoid,
    "cos": torch.cos,
    "exp": lambda x: torch.exp(torch.sin(x)),
    "plus_one": lambda x: x + 1.0,
    "one_less": lambda x: 1.0 - x,
    "reciprocal": lambda x: torch.reciprocal(x.abs() + 0.5),
    "log": lambda x: torch.log(x.abs() + 0.5),
    "rsqrt": lambda x: torch.rsqrt(x.pow(2) + 0.1),
    "invert": torch.reciprocal,
    "to_minus_one": lambda x: (x.abs() + 0.0).pow(-0.5),
    "fill": lambda x: x.masked_fill(x > 0.7, 0.0),
    "clamp": lambda x: x.clamp(-1.0, 1.0),
    "clamp_up": lambda x: x.clamp(min=0.3),
}
BINARY: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "maximum": torch.maximum,
    "bounded": lambda a, b: torch.clamp(a, max=b),
    "where": lambda a, b: torch.where(a > b, a, b),
}


@dataclass(frozen=True)
class Step:
    """One operation: its name, the values and parameters it reads, and its numbers."""

    op: str
    of: tuple[int, ...] = ()
    params: tuple[int, ...] = ()
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Graph:
    """A whole module: parameter shapes, steps, and the values that are contracted and returned."""

    inputs: str
    shape: Shape
    params: tuple[Shape, ...]
    steps: tuple[Step, ...]
    heads: tuple[Step, ...]
    dynamic: bool


def _sizes(shape: Sequence[int], batch: Any) -> list[Any]:
    return [size // BATCH * batch if size and size % BATCH == 0 else size for size in shape]


class Module(nn.Module):
    """A graph as a torch module in double precision."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        draw = torch.Generator().manual_seed(0)
        self.w = nn.ParameterList(
            torch.randn(s, generator=draw, dtype=torch.float64) * (0.8 if len(s) > 1 else 1.0)
            for s in graph.params
        )

    def forward(self, x: torch.Tensor) -> Any:
        batch = x.shape[0]
        values: list[torch.Tensor] = []
        for step in self.graph.steps:
            values.extend(self.run(step, values, x, batch))
        found = [out for step in self.graph.heads for out in self.run(step, values, x, batch)]
        return found[0] if len(found) == 1 else tuple(found)

    def run(self, step: Step, values: list[torch.Tensor], given: Any, batch: Any) -> Any:
        of = [values[i] for i in step.of]
        w = [self.w[i] for i in step.params]
        return _run(step, of, w, given, batch)


def _run(step: Step, of: list[Any], w: list[Any], given: Any, batch: Any) -> list[torch.Tensor]:
    args = step.args
    match step.op:
        case "param":
            return [w[0]]
        case "embed":
            return [F.embedding(given, w[0])]
        case "project":
            return [F.linear(given, *w)]
        case "flat":
            return [F.linear(of[0].reshape(_sizes(args, batch)), w[0])]
        case "linear":
            return [F.linear(of[0], *w)]
        case "matmul":
            left, right = (*of, *w) if args[0] else (*w, *of)
            return [torch.matmul(left, right.transpose(-1, -2) if args[1] else right)]
        case name if name in UNARY:
            return [UNARY[name](of[0])]
        case name if name in BINARY:
            left, right = (*of, *w)
            return [BINARY[name](left, right)]
        case "view":
            return [of[0].reshape(_sizes(args, batch))]
        case "permute":
            return [of[0].permute(args)]
        case "split":
            return list(of[0].split(list(args[1]), dim=args[0]))
        case "chunk":
            return list(of[0].chunk(args[1], dim=args[0]))
        case "slice":
            cut = [slice(None)] * of[0].dim()
            cut[args[0]] = slice(args[1], args[2])
            return [of[0][tuple(cut)]]
        case "select":
            return [of[0].select(args[0], args[1])]
        case "cat":
            return [torch.cat(of, dim=args[0])]
        case "unsqueeze":
            return [of[0].unsqueeze(args[0])]
        case "expand":
            return [of[0].expand(_sizes(args, batch))]
        case "sum":
            return [of[0].sum(args[0], keepdim=args[1])]
        case "mean":
            return [of[0].mean(args[0], keepdim=args[1])]
        case "rms_norm":
            square = of[0].pow(2).mean(-1, keepdim=True)
            return [of[0] * torch.rsqrt(square + 0.1) * w[0]]
        case "layer_norm":
            return [F.layer_norm(of[0], (of[0].shape[-1],), *w)]
        case "softmax":
            return [of[0].softmax(args[0])]
        case "cumsum":
            return [of[0].cumsum(args[0])]
        case "attention":
            kv, rep, width, value = args
            x = of[0]
            q = F.linear(x, w[0]).view(*x.shape[:2], kv * rep, width).transpose(1, 2)
            k = F.linear(x, w[1]).view(*x.shape[:2], kv, width).transpose(1, 2)
            v = F.linear(x, w[2]).view(*x.shape[:2], kv, value).transpose(1, 2)
            k = k[:, :, None].expand(-1, -1, rep, -1, -1).reshape(batch, kv * rep, -1, width)
            v = v[:, :, None].expand(-1, -1, rep, -1, -1).reshape(batch, kv * rep, -1, value)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            return [y.transpose(1, 2).reshape(*x.shape[:2], kv * rep * value)]
        case _:
            raise ValueError(step.op)


def alive(graph: Graph, results: Sequence[int]) -> Graph:
    """Returns the graph without the steps that no head needs; `results` counts a step's values."""
    maker = [step for step, n in enumerate(results) for _ in range(n)]
    used: set[int] = set()
    wanted = [i for head in graph.heads for i in head.of]
    while wanted:
        step = maker[wanted.pop()]
        if step not in used:
            used.add(step)
            wanted += graph.steps[step].of
    kept = [value for value, step in enumerate(maker) if step in used]
    number = {value: new for new, value in enumerate(kept)}
    steps = tuple(step for i, step in enumerate(graph.steps) if i in used)
    params = sorted({p for step in (*steps, *graph.heads) for p in step.params})

    def moved(step: Step) -> Step:
        of = tuple(number[i] for i in step.of)
        return replace(step, of=of, params=tuple(params.index(p) for p in step.params))

    return replace(
        graph,
        params=tuple(graph.params[p] for p in params),
        steps=tuple(map(moved, steps)),
        heads=tuple(map(moved, graph.heads)),
    )


def example(graph: Graph) -> torch.Tensor:
    """Returns the module's input."""
    draw = torch.Generator().manual_seed(1)
    if graph.inputs == "tokens":
        return torch.randint(0, VOCAB, graph.shape, generator=draw)
    return torch.randn(graph.shape, generator=draw, dtype=torch.float64)
