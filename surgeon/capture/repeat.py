"""Capture one layer of each kind, and repeat it in the program."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from surgeon.capture.attention import operations
from surgeon.ir import Arg, Op, Param, ParamRef, Program, Ref
from surgeon.ir.program import op_refs, substitute_op

IN, OUT, SKIP = (
    "surgeon.layer_in.default",
    "surgeon.layer_out.default",
    "surgeon.layer_skip.default",
)


class _Index:
    """A layer's own number, which tells whether anybody asked for it while tracing."""

    def __init__(self, value: int, log: set[int]) -> None:
        self.value, self.log = value, log

    def read(self) -> int:
        self.log.add(self.value)
        return self.value


def _forward(name: str) -> Any:
    def method(self: _Index, *args: Any) -> Any:
        return getattr(self.read(), name)(*args)

    return method


for _name in (
    *("__index__", "__int__", "__float__", "__bool__", "__hash__", "__str__", "__repr__"),
    *("__format__", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__neg__"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__mod__", "__rmod__"),
    *("__floordiv__", "__rfloordiv__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__"),
):
    setattr(_Index, _name, _forward(_name))


Numbers = frozenset[tuple[str, str]]
"""Attributes that hold a layer's own place: (module inside the layer, attribute)."""


def _own_numbers(layer: nn.Module, index: int) -> Numbers:
    return frozenset(
        (path, name)
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if type(value) is int and value == index
    )


def _state(value: Any, depth: int = 0) -> Any:
    """Returns an attribute in a form that compares by value."""
    if isinstance(value, torch.Tensor):
        return ("tensor", tuple(value.shape), value.dtype)
    if isinstance(value, bool | int | float | str | None | torch.dtype | torch.device):
        return value
    if isinstance(value, set | frozenset) and depth < 6:
        return ("set", tuple(sorted(repr(_state(v, depth + 1)) for v in value)))  # type: ignore[misc]
    if isinstance(value, list | tuple) and depth < 6:
        return (type(value).__name__, tuple(_state(v, depth + 1) for v in value))  # type: ignore[misc]
    if isinstance(value, dict) and depth < 6:
        return ("dict", tuple((repr(k), _state(v, depth + 1)) for k, v in value.items()))  # type: ignore[misc]
    if isinstance(value, partial):
        call: Any = value  # type: ignore[misc]
        return ("partial", id(call.func), _state((call.args, call.keywords), depth + 1))
    if depth < 3 and hasattr(value, "__dict__") and not isinstance(value, type | FunctionType):
        return (type(value), _state(vars(value), depth + 1))
    return ("object", id(value))


def _kind(layer: nn.Module, numbers: Numbers) -> Any:
    """Returns what makes two layers of one kind: classes, shapes and every other attribute."""
    out: list[Any] = []
    for path, module in layer.named_modules():
        own = [
            (name, ("index",) if (path, name) in numbers else _state(value))
            for name, value in sorted(vars(module).items())
            if name not in ("_parameters", "_buffers", "_modules", "training")
            and "hook" not in name
        ]
        params = [(n, _state(p)) for n, p in module.named_parameters(recurse=False)]
        buffers = [(n, _state(b)) for n, b in module.named_buffers(recurse=False)]
        out.append((path, type(module), tuple(params), tuple(buffers), tuple(own)))
    return tuple(out)


@dataclass
class Layers:
    """The layers of a model by kind: which is traced, and which repeats it."""

    paths: list[str]
    representative: dict[str, str] = field(default_factory=dict[str, str])
    numbers: dict[str, Numbers] = field(default_factory=dict[str, Numbers])
    log: set[int] = field(default_factory=set[int])
    rest: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    plain: bool = True

    @property
    def repeats(self) -> bool:
        """Whether any layer is a repetition of an earlier one."""
        return any(path != first for path, first in self.representative.items())


def find_layers(model: nn.Module) -> tuple[Layers, dict[str, nn.Module]]:
    """Returns the outermost lists of modules of a model as layers, sorted by kind.

    An attribute that in every layer equals the layer's place is taken for its index: it may
    differ, unless tracing shows that the layer's computation asks for it.
    """
    layers = Layers([])
    modules: dict[str, nn.Module] = {}
    taken: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) < 2:
            continue
        if any(path.startswith(outer + ".") for outer in taken):
            continue
        taken.append(path)
        numbers = frozenset[tuple[str, str]].intersection(
            *(_own_numbers(layer, index) for index, layer in enumerate(module))
        )
        kinds: dict[Any, str] = {}
        for index, layer in enumerate(module):
            name = f"{path}.{index}"
            layers.paths.append(name)
            layers.numbers[name] = numbers
            modules[name] = layer
            layers.representative[name] = kinds.setdefault(_kind(layer, numbers), name)
    return layers, modules


@contextmanager
def short_circuit(layers: Layers, modules: Mapping[str, nn.Module]) -> Generator[None, None, None]:
    """While active, a layer that repeats another only marks its place; others mark their ends."""
    operations()
    undo: list[Any] = []
    for path in layers.paths:
        module = modules[path]
        if layers.representative[path] == path:
            undo.append(_mark_ends(layers, module, path))
            undo.append(_watch_index(layers, module, path))
        else:
            module.__dict__["forward"] = _Skip(path, layers)
            undo.append(lambda module=module: module.__dict__.pop("forward"))
    try:
        yield
    finally:
        for action in undo:
            action()


class _Skip:
    def __init__(self, path: str, layers: Layers) -> None:
        self.path, self.layers = path, layers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        out = torch.ops.surgeon.layer_skip(x, self.path)
        rest = self.layers.rest.get(self.layers.representative[self.path])
        return out if rest is None else (out, *rest)


def _mark_ends(layers: Layers, module: nn.Module, path: str) -> Any:
    def before(_: nn.Module, args: Any, kwargs: Any) -> Any:
        if args and isinstance(args[0], torch.Tensor):
            return (torch.ops.surgeon.layer_in(args[0], path), *args[1:]), kwargs
        for name, value in kwargs.items():
            if isinstance(value, torch.Tensor):
                return args, {**kwargs, name: torch.ops.surgeon.layer_in(value, path)}
        layers.plain = False
        return args, kwargs

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, torch.Tensor):
            return torch.ops.surgeon.layer_out(output, path)
        if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
            # What comes beside the states, such as attention weights, nobody may need.
            layers.rest[path] = tuple(None for _ in output[1:])
            return torch.ops.surgeon.layer_out(output[0], path), *output[1:]
        layers.plain = False
        return output

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    return lambda: [handle.remove() for handle in handles]


def _watch_index(layers: Layers, module: nn.Module, path: str) -> Any:
    """Replaces the layer's own number by one that tells when it is read."""
    index = int(path.rsplit(".", 1)[1])
    inner = dict(module.named_modules())
    for name, attribute in layers.numbers[path]:
        vars(inner[name])[attribute] = _Index(index, layers.log)

    def undo() -> None:
        for name, attribute in layers.numbers[path]:
            vars(inner[name])[attribute] = index

    return undo


def _swap(name: str, old: str, new: str) -> str:
    if name == old or name.startswith(old + "."):
        return new + name[len(old) :]
    return name


@dataclass
class _Body:
    ops: list[Op]
    start: str
    end: str


def _bodies(program: Program, layers: Layers) -> dict[str, _Body] | None:
    """Returns the operations of each traced layer, or None where they are not self-contained."""
    bodies: dict[str, _Body] = {}
    inside: str | None = None
    for op in program.ops:
        name = str(op.arg(1)) if op.target in (IN, OUT) else ""
        if op.target == IN:
            if inside is not None:
                return None
            inside = name
            bodies[name] = _Body([], op.outputs[0], "")
        elif op.target == OUT:
            x = op.arg(0)
            if inside != name or not isinstance(x, Ref):
                return None
            bodies[name].end = x.name
            inside = None
        elif inside is not None:
            if op.target == SKIP:
                return None
            bodies[inside].ops.append(op)
    for path, body in bodies.items():
        made = {n for op in body.ops for n in op.outputs}
        for op in program.ops:
            if op in body.ops or (op.target == OUT and op.arg(1) == path):
                continue
            if any(isinstance(r, Ref) and r.name in made for r in op_refs(op)):
                return None
        if made & set(program.outputs):
            return None
        for op in body.ops:
            own = (r.name for r in op_refs(op) if isinstance(r, ParamRef))
            others = set(layers.paths) - {path}
            if any(_swap(n, other, "") != n for n in own for other in others):
                return None
    return bodies


def expand(program: Program, layers: Layers, full: Mapping[str, Param]) -> Program | None:
    """Returns the program with every mark replaced by its layer, or None where that is not sound.

    Args:
        program: as captured under `short_circuit`.
        layers: the layers by kind.
        full: every parameter and buffer of the whole model by name.
    """
    bodies = _bodies(program, layers)
    if bodies is None or not layers.plain:
        return None
    alias_of = {alias: p.name for p in full.values() for alias in p.aliases}
    out: list[Op] = []
    same: dict[str, str] = {}

    def now(arg: Arg) -> Arg:
        return Ref(same[arg.name]) if isinstance(arg, Ref) and arg.name in same else arg

    for op in program.ops:
        if op.target in (IN, OUT):
            x = now(op.arg(0))
            assert isinstance(x, Ref)
            same[op.outputs[0]] = x.name
        elif op.target == SKIP:
            x, path = now(op.arg(0)), str(op.arg(1))
            assert isinstance(x, Ref)
            first = layers.representative[path]
            body = bodies.get(first)
            if body is None:
                return None
            rename = {body.start: x.name}
            for inner in body.ops:
                rename.update({n: f"{path}/{n}" for n in inner.outputs})

            def copied(
                arg: Arg, rename: dict[str, str] = rename, first: str = first, path: str = path
            ) -> Arg:
                if isinstance(arg, Ref):
                    return now(Ref(rename.get(arg.name, arg.name)))
                if isinstance(arg, ParamRef):
                    name = _swap(arg.name, first, path)
                    # A literal that the layer's source makes is named after the traced layer.
                    known = name in alias_of or name in full
                    return ParamRef(alias_of.get(name, name) if known else arg.name)
                return arg

            for inner in body.ops:
                clone = substitute_op(inner, copied)
                out.append(
                    replace(
                        clone,
                        outputs=tuple(rename[n] for n in inner.outputs),
                        module=_swap(inner.module, first, path),
                    )
                )
            same[op.outputs[0]] = rename.get(body.end, now(Ref(body.end)).name)  # type: ignore[union-attr]
        else:
            out.append(substitute_op(op, now))
    outputs = tuple(same.get(name, name) for name in program.outputs)
    return replace(program, ops=tuple(out), outputs=outputs, params=tuple(full.values()))
