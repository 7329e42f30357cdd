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
    bias = attention_bias(q, k, padding, causal, window)
    return attend(q, k, v, bias, scale=scale, softcap=softcap, sinks=sinks)


def attention_bias(
    q: torch.Tensor,
    k: torch.Tensor,
    padding: torch.Tensor | None,
    causal: bool,
    window: int | None,
) -> torch.Tensor | None:
    """Returns what is added to scores: 0 where a key is seen, the lowest number where not.

    Args:
        q: queries `[B, Hq, S, D]`, of which shape and element type are used.
        k: keys `[B, Hkv, T, D]`, likewise.
        padding: `[B, T]`, false or 0 where a key is no token.
        causal: whether query i of S sees keys up to i + T - S only.
        window: of those, only so many of the last.

    Returns:
        `[B or 1, 1, S, T]`, or None where every key is seen.
    """
    seen: torch.Tensor | None = None
    if causal or window is not None:
        rows = torch.arange(q.shape[2], device=q.device) + (k.shape[2] - q.shape[2])
        rows = rows.unsqueeze(-1)
        columns = torch.arange(k.shape[2], device=q.device).unsqueeze(0)
        if causal:
            seen = columns <= rows
        if window is not None:
            near = columns > rows - window
            seen = near if seen is None else torch.logical_and(seen, near)
    if padding is not None:
        tokens = padding if padding.dtype == torch.bool else padding != 0
        tokens = tokens.unsqueeze(1).unsqueeze(2)
        seen = tokens if seen is None else torch.logical_and(seen, tokens)
        seen = seen.expand(-1, -1, q.shape[2], -1)
    if seen is None:
        return None
    seen = seen if seen.dim() == 4 else seen.unsqueeze(0).unsqueeze(0)
    # Not -inf: a row of nothing else would become NaN.
    zero, lowest = q.new_zeros(()), q.new_full((), torch.finfo(q.dtype).min)
    return torch.where(seen, zero, lowest)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns attention `[B, Hq, S, Dv]` over scores to which `bias` is added."""
    times = q.shape[1] // k.shape[1]
    if softcap is None and sinks is None:
        lacks = q.shape[-1] - v.shape[-1]
        # Torch's kernels that don't hold all scores want one width; a program stays as it is.
        padded = v.is_cpu and lacks > 0 and not torch.compiler.is_exporting()
        found = torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            torch.nn.functional.pad(v, (0, lacks)) if padded else v,
            bias,
            scale=scale,
            enable_gqa=times > 1,
        )
        return found[..., : v.shape[-1]] if padded else found
    k, v = _repeated(k, times), _repeated(v, times)
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        sink = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
        scores = torch.cat([scores, sink], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32)
    if sinks is not None:
        shares = shares.narrow(-1, 0, k.shape[2])
    return (shares if shares.dtype == q.dtype else shares.to(q.dtype)) @ v


def _repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """Repeats each head of `[B, H, T, D]` so many times, in place of `repeat_interleave`.

    Exporters know `expand` and `reshape`; `repeat_interleave` they have to take apart.
    """
    if times == 1:
        return x
    b, h, t, d = x.shape
    return x.unsqueeze(2).expand(b, h, times, t, d).reshape(b, h * times, t, d)


def dispatch(index: torch.Tensor, weights: torch.Tensor, experts: int) -> torch.Tensor:
    """Returns each token's weight for each expert `[N, experts]`, 0 where it isn't sent.

    Args:
        index: the experts that each token is sent to, `[N, K]`.
        weights: their weights `[N, K]`.
        experts: how many there are.
    """
    return weights.new_zeros(weights.shape[0], experts).scatter(1, index, weights)


def _target(name: str) -> Callable[..., Any]:
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
        self.biases: dict[Any, fx.Node] = {}

    def size(self, expression: str) -> Any:
        def call(function: Callable[..., Any], *args: Any) -> Any:
            if all(isinstance(a, int) for a in args):
                return function(*args)
            return self.graph.call_function(function, args)

        return evaluate(expression, self._symbol, call)

    def _symbol(self, name: str) -> fx.Node:
        if name not in self.sizes:
            self.sizes[name] = self._input_size(name)
        return self.sizes[name]

    def _input_size(self, name: str) -> fx.Node:
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
        args: tuple[Any, ...] = tuple(self.arg(a) for a in op.args)
        kwargs: dict[str, Any] = {k: self.arg(v) for k, v in op.kwargs}
        target, type_of = op.target, self.program.type_of
        call: Callable[..., Any] | None = self.change.get(index)
        if call is not None:
            pass
        elif target in ("aten.view.default", "aten._unsafe_view.default"):
            call = torch.ops.aten.reshape.default  # layouts are torch's own affair here
        elif target == "surgeon.attention":
            q, k, v, *padding = args
            causal, window = kwargs.pop("causal"), kwargs.pop("window", None)
            bias = self.bias(op, q, k, padding[0] if padding else None, causal, window)
            call, args = attend, (q, k, v, bias)
        elif target == "surgeon.dispatch":
            call = dispatch
        elif target == "aten.to.dtype" and type_of(op.arg(0)).dtype != op.types[0].dtype:
            # What `to` comes to where the type differs; unlike `to`, every exporter knows it.
            call, args, kwargs = torch.ops.aten._to_copy.default, args[:1], {"dtype": args[1]}
        else:
            call = _target(target)
        # Named after the value, so that torch's own messages can be traced to the operation.
        name = op.outputs[0] if len(op.outputs) == 1 else None
        node = self.graph.create_node("call_function", call, args, kwargs, name=name)
        if name is not None:
            self.env[name] = node
            return
        for i, output in enumerate(op.outputs):
            self.env[output] = self.graph.call_function(operator.getitem, (node, i))

    def bias(self, op: Op, q: Any, k: Any, padding: Any, causal: Any, window: Any) -> fx.Node:
        """Returns the mask of an attention, made once for all that see the same keys."""
        q_type, k_type = self.program.type_of(op.arg(0)), self.program.type_of(op.arg(1))
        key = (q_type.dtype, q_type.shape[2], k_type.shape[2], padding, causal, window)
        if key not in self.biases:
            self.biases[key] = self.graph.call_function(
                attention_bias, (q, k, padding, causal, window)
            )
        return self.biases[key]


_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {"Max": torch.sym_max, "Min": torch.sym_min}
"""Such as a model's own `max(0, longest - seq)`, whose branch must not be decided by a trace."""


def evaluate(
    expression: str,
    symbol: Callable[[str], Any],
    call: Callable[..., Any] = lambda function, *args: function(*args),
) -> Any:
    """Returns a symbolic size, such as `batch*seq + 1`, computed.

    Args:
        expression: of sums, differences, products, whole quotients, the least and the largest of
            symbols and numbers.
        symbol: the value of a symbol.
        call: applies a function of `operator`, `torch.sym_max` or `torch.sym_min` to values.

    Raises:
        SurgeonError: `bad-program` where the expression is none of these.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(int(number)):
                return number
            case ast.Name(name):
                return symbol(name)
            case ast.UnaryOp(ast.USub(), operand):
                return call(operator.neg, value(operand))
            case ast.BinOp(left, op, right) if type(op) in _ARITHMETIC:
                return call(_ARITHMETIC[type(op)], value(left), value(right))
            case ast.Call(ast.Name(name), [first, *rest], []) if name in _FUNCTIONS:
                found = value(first)
                for other in rest:
                    found = call(_FUNCTIONS[name], found, value(other))
                return found
            case _:
                raise SurgeonError(
                    Code.BAD_PROGRAM,
                    "a symbolic size can't be computed",
                    at=expression,
                    why=f"{ast.unparse(node)} is no sum, product or whole quotient of sizes",
                    try_="capture the model with plain batch and sequence sizes",
                )

    return value(ast.parse(expression, mode="eval").body)


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
