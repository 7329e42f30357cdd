"""The intermediate representation as frozen data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

Size = int | str
"""A dimension's size: a number, or a symbolic expression over the program's symbols."""


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of an input or of an operation's result."""

    name: str


@dataclass(frozen=True, slots=True)
class ParamRef:
    """A use of a parameter, buffer or constant."""

    name: str


@dataclass(frozen=True, slots=True)
class Sym:
    """A symbolic integer, written over the program's symbols, such as `batch*seq`."""

    expr: str


@dataclass(frozen=True, slots=True)
class DType:
    """An element type used as an argument, by its short name (`f32`, `i64`, …)."""

    name: str


Arg = Ref | ParamRef | Sym | DType | bool | int | float | str | None | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape of a tensor."""

    dtype: str
    shape: tuple[Size, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """A graph input."""

    name: str
    type: TensorType


@dataclass(frozen=True, slots=True)
class Param:
    """A tensor the program reads but does not compute: metadata only.

    `kind` is `parameter`, `buffer` (stored in checkpoints), `computed` (a buffer that no
    checkpoint stores, derived from the configuration) or `constant` (a literal of the source).
    `aliases` are further names of the same tensor: a tied parameter is one parameter.
    """

    name: str
    type: TensorType
    kind: str = "parameter"
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Op:
    """One operation: its target, its arguments, its results, and where it came from.

    Arguments are positional in the order of the operation's schema; keyword-only ones follow
    in `kwargs`. `module` is the module path, `source` the file and line in the model's code.
    """

    outputs: tuple[str, ...]
    types: tuple[TensorType, ...]
    target: str
    args: tuple[Arg, ...] = ()
    kwargs: tuple[tuple[str, Arg], ...] = ()
    module: str = ""
    source: str = ""

    def arg(self, index: int, default: Arg = None) -> Arg:
        """Returns argument `index`, or `default` where the call leaves it out."""
        return self.args[index] if index < len(self.args) else default

    def kwarg(self, name: str, default: Arg = None) -> Arg:
        """Returns keyword argument `name`, or `default` where the call leaves it out."""
        return next((value for key, value in self.kwargs if key == name), default)

    @property
    def where(self) -> str:
        """The place of this operation for a message: module, value and source line."""
        value = ", ".join("%" + name for name in self.outputs)
        source = f" ({self.source})" if self.source else ""
        return f"{self.module or 'the model'}, value {value}{source}"


@dataclass(frozen=True)
class Program:
    """A captured model: inputs, parameters, operations in order, outputs.

    `symbols` are the dynamic sizes, named; `guards` are conditions that capture assumed.
    """

    symbols: tuple[str, ...] = ()
    inputs: tuple[Input, ...] = ()
    params: tuple[Param, ...] = ()
    ops: tuple[Op, ...] = ()
    outputs: tuple[str, ...] = ()
    guards: tuple[str, ...] = ()
    meta: tuple[tuple[str, str], ...] = field(default=())

    @cached_property
    def param(self) -> Mapping[str, Param]:
        """Parameters by name."""
        return {p.name: p for p in self.params}

    @cached_property
    def param_of(self) -> Mapping[str, str]:
        """Every name of every parameter, aliases included, to the parameter's own name."""
        return {name: p.name for p in self.params for name in (p.name, *p.aliases)}

    @cached_property
    def types(self) -> Mapping[str, TensorType]:
        """Types of inputs and operation results by name."""
        out = {i.name: i.type for i in self.inputs}
        for op in self.ops:
            out.update(zip(op.outputs, op.types, strict=True))
        return out

    @cached_property
    def producer(self) -> Mapping[str, int]:
        """Index of the operation that makes each value (inputs are absent)."""
        return {name: i for i, op in enumerate(self.ops) for name in op.outputs}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[int, ...]]:
        """Indices of the operations that read each value, in order, without repeats."""
        out: dict[str, list[int]] = {}
        for i, op in enumerate(self.ops):
            for name in dict.fromkeys(r.name for r in op_refs(op) if isinstance(r, Ref)):
                out.setdefault(name, []).append(i)
        return {name: tuple(found) for name, found in out.items()}

    @cached_property
    def readers(self) -> Mapping[str, tuple[int, ...]]:
        """Indices of the operations that read each parameter, one entry a use."""
        out: dict[str, list[int]] = {}
        for i, op in enumerate(self.ops):
            for ref in op_refs(op):
                if isinstance(ref, ParamRef):
                    out.setdefault(ref.name, []).append(i)
        return {name: tuple(found) for name, found in out.items()}

    def type_of(self, ref: Arg) -> TensorType:
        """Returns the type of the value or parameter that `ref` names."""
        if isinstance(ref, ParamRef):
            return self.param[ref.name].type
        if isinstance(ref, Ref):
            return self.types[ref.name]
        raise TypeError(f"{ref!r} is no tensor")

    def without_dead_code(self) -> Program:
        """Returns this program less the operations and parameters that no output needs."""
        live = set(self.outputs)
        ops: list[Op] = []
        used: set[str] = set()
        for op in reversed(self.ops):
            if live.isdisjoint(op.outputs):
                continue
            ops.append(op)
            for ref in op_refs(op):
                (live if isinstance(ref, Ref) else used).add(ref.name)
        params = tuple(p for p in self.params if p.name in used)
        return replace(self, ops=tuple(reversed(ops)), params=params)


def refs(arg: Arg) -> Iterator[Ref | ParamRef]:
    """Yields every value and parameter that `arg` uses, in order."""
    if isinstance(arg, Ref | ParamRef):
        yield arg
    elif isinstance(arg, tuple):
        for item in arg:
            yield from refs(item)


def op_refs(op: Op) -> Iterator[Ref | ParamRef]:
    """Yields every value and parameter that `op` uses, in order."""
    for arg in op.args:
        yield from refs(arg)
    for _, arg in op.kwargs:
        yield from refs(arg)


def substitute(arg: Arg, change: Callable[[Arg], Arg]) -> Arg:
    """Returns `arg` with `change` applied to every leaf."""
    if isinstance(arg, tuple):
        return tuple(substitute(item, change) for item in arg)
    return change(arg)


def substitute_op(op: Op, change: Callable[[Arg], Arg]) -> Op:
    """Returns `op` with `change` applied to every leaf of its arguments."""
    return replace(
        op,
        args=tuple(substitute(arg, change) for arg in op.args),
        kwargs=tuple((key, substitute(arg, change)) for key, arg in op.kwargs),
    )
