"""From `torch.export`'s graph to a program."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any, NoReturn

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import GraphModule, Node

from surgeon.capture.pieces import joined
from surgeon.errors import Code, SurgeonError
from surgeon.ir import (
    Arg,
    DType,
    Input,
    Op,
    Param,
    ParamRef,
    Program,
    Ref,
    Size,
    Sym,
    TensorType,
)

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

PLACEMENT = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy")
"""Arguments that say where a tensor lies, not what it holds."""

_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
}
_OURS = {f"surgeon.{name}.default": f"surgeon.{name}" for name in ("attention", "dispatch")}
_UNBACKED = re.compile(r"\b(?:u|zuf)\d+\b")
_NESTED = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Operations that only run a nested graph, and which argument that graph is."""
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')


class _Gone:
    """A result that the program can't hold: harmless unless something uses it."""


class _Reader:
    """Reads one exported graph, nested graphs inlined."""

    def __init__(self, symbols: dict[str, str], strip: str) -> None:
        self.symbols, self.strip = symbols, strip
        self.ops: list[Op] = []
        self.count: dict[str, int] = {}
        self.guards: list[str] = []
        self.now: Node | None = None

    def refuse(self, why: str, code: Code = Code.CAPTURE_FAILED) -> NoReturn:
        """Raises the refusal of the node that is being read."""
        node = self.now
        place = ""
        if node is not None:
            source = self.source(node)
            place = f"{self.module(node) or 'the model'}, {node.name}"
            place += f" ({source})" if source else ""
        raise SurgeonError(
            code,
            f"the graph has an operation that a program can't hold: {node.target if node else ''}",
            at=place,
            why=why,
            try_="rewrite that line with tensor operations, or capture the module around it",
        )

    def dtype(self, dtype: torch.dtype) -> str:
        if dtype not in DTYPES:
            self.refuse(f"{dtype} is no element type of the program")
        return DTYPES[dtype]

    def size(self, size: Any) -> Size:
        return size if isinstance(size, int) else self.expression(size)

    def expression(self, value: Any) -> str:
        text = str(value.node.expr).replace(" ", "")
        if _UNBACKED.search(text):
            self.refuse("a size or a number comes out of the data", Code.DATA_DEPENDENT)

        def name(match: re.Match[str]) -> str:
            symbol = match.group()
            return self.symbols.setdefault(symbol, f"n{len(self.symbols)}")

        return re.sub(r"\bs\d+\b", name, text)

    def type(self, value: torch.Tensor) -> TensorType:
        return TensorType(self.dtype(value.dtype), tuple(self.size(s) for s in value.shape))

    def path(self, name: str) -> str:
        return name.removeprefix(self.strip)

    def fresh(self, target: str) -> str:
        parts = target.split(".")
        base = parts[1] if len(parts) > 1 else parts[0]
        base = base.strip("_") or "value"
        n = self.count.get(base, 0)
        self.count[base] = n + 1
        return f"{base}_{n}" if n else base

    def arg(self, value: Any, env: Mapping[Node, Any]) -> Arg:
        match value:
            case Node():
                found = env[value]
                if isinstance(found, list):
                    self.refuse(f"{value} is several values")
                if isinstance(found, GraphModule):
                    self.refuse("it runs a nested graph under a condition")
                if isinstance(found, _Gone):
                    data = _UNBACKED.search(str(value.meta.get("val")))
                    self.refuse(
                        f"it uses {value}, which is no tensor and no size",
                        Code.DATA_DEPENDENT if data else Code.CAPTURE_FAILED,
                    )
                return found
            case torch.dtype():
                return DType(self.dtype(value))
            case torch.SymInt():
                return Sym(self.expression(value))
            case list() | tuple():
                return tuple(self.arg(item, env) for item in value)  # type: ignore[misc]
            case bool() | int() | float() | str() | None:
                return value
            case torch.device() | torch.layout() | torch.memory_format():
                return None
            case _:
                self.refuse(f"{value!r} can't be an argument of the program")

    def source(self, node: Node) -> str:
        frames = _FRAME.findall(node.meta.get("stack_trace") or "")
        for file, line in reversed(frames):
            parts = PurePath(file).parts
            if "torch" not in parts and "surgeon" not in parts and not file.startswith("<"):
                return f"{PurePath(file).name}:{line}"
        return ""

    def module(self, node: Node) -> str:
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        return self.path(path) if path != self.strip.rstrip(".") else ""

    def graph(self, gm: GraphModule, env: dict[Node, Any]) -> list[Any]:
        """Reads a graph whose placeholders `env` already binds; returns its outputs."""
        for node in gm.graph.nodes:
            self.now = node
            if node.op == "placeholder":
                continue
            if node.op == "output":
                return [env[n] if isinstance(n, Node) else n for n in node.args[0]]
            if node.op == "get_attr":
                env[node] = getattr(gm, str(node.target))
                continue
            self.call(node, env)
        raise AssertionError("a graph has an output")

    def call(self, node: Node, env: dict[Node, Any]) -> None:
        value = node.meta.get("val")
        target = str(node.target)
        if node.target is operator.getitem:
            values, index = node.args
            env[node] = env[values][index]  # type: ignore[index]
            return
        if isinstance(value, torch.SymInt):
            env[node] = Sym(self.expression(value))
            return
        if isinstance(value, int | float | bool):
            env[node] = value
            return
        if target in _NESTED:
            at = _NESTED[target]
            if target == "wrap_with_autocast" and node.args[2] is not False:
                self.refuse("it runs under autocast, whose casts the graph doesn't show")
            inner: GraphModule = env[node.args[at]]  # type: ignore[index]
            bound = dict(
                zip(
                    [n for n in inner.graph.nodes if n.op == "placeholder"],
                    [env[n] if isinstance(n, Node) else n for n in node.args[at + 1 :]],
                    strict=True,
                )
            )
            env[node] = self.graph(inner, bound)
            return
        if isinstance(value, torch.SymBool) or target.startswith(
            ("aten._assert", "aten.sym_constrain", "_operator", "<built-in")
        ):
            if isinstance(value, torch.SymBool):
                self.guards.append(str(value.node.expr))
            env[node] = _Gone()
            return
        tensors: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(t, torch.Tensor) for t in tensors):
            env[node] = _Gone()
            return
        op = self.operation(node, target, tensors, env)
        self.ops.append(op)
        results = [Ref(name) for name in op.outputs]
        env[node] = results if isinstance(value, list | tuple) else results[0]

    def operation(
        self, node: Node, target: str, tensors: list[torch.Tensor], env: Mapping[Node, Any]
    ) -> Op:
        target = _OURS.get(target, target)
        args = [self.arg(a, env) for a in node.args]
        kwargs = {k: self.arg(a, env) for k, a in node.kwargs.items() if k not in PLACEMENT}
        schema = getattr(node.target, "_schema", None)
        if schema is not None:
            names = [a.name for a in schema.arguments if not a.kwarg_only]
            drop = [i for i, n in enumerate(names[: len(args)]) if n in PLACEMENT]
            for argument in schema.arguments[len(args) :]:
                if argument.kwarg_only or not any(n in kwargs for n in names[len(args) :]):
                    break
                default = None if argument.name in PLACEMENT else argument.default_value
                args.append(kwargs.pop(argument.name, default))
            for i in drop:
                args[i] = None
        return Op(
            tuple(self.fresh(target) for _ in tensors),
            tuple(self.type(t) for t in tensors),
            target,
            tuple(args),
            tuple(sorted(kwargs.items(), key=lambda item: item[0])),
            self.module(node),
            self.source(node),
        )


def _canonical(
    target: str, args: tuple[Arg, ...], type_: TensorType
) -> tuple[str, tuple[Arg, ...]]:
    """All spellings of a change of element type become one operation."""
    if target in (
        "aten.to.device",
        "aten.to.dtype_layout",
        "aten.to.other",
        "aten.type_as.default",
    ):
        return "aten.to.dtype", (args[0], DType(type_.dtype))
    if target in ("aten._to_copy.default", "aten.float.default"):
        return "aten.to.dtype", (args[0], DType(type_.dtype))
    if target == "aten.to.dtype":
        return target, args[:2]
    return target, args


_SAME = frozenset(
    ["aten.contiguous.default", "aten.alias.default", "aten.detach.default", "aten.clone.default"]
    + ["aten.lift_fresh_copy.default", "aten.detach_.default"]
)


def _identity(op: Op, before: TensorType) -> bool:
    if op.types[0] != before:
        return False
    if op.target in _SAME or op.target == "aten.to.dtype":
        return True
    if op.target == "aten.dropout.default":
        return op.arg(2) is False or op.arg(1) == 0
    if op.target == "aten.slice.Tensor":
        return op.arg(4, 1) == 1 and op.arg(2) in (None, 0)
    return op.target == "aten.expand.default"


def simplified(program: Program) -> Program:
    """Returns the program without identities and dead code, values numbered afresh."""
    same: dict[str, Arg] = {}
    ops: list[Op] = []

    def change(arg: Arg) -> Arg:
        return same.get(arg.name, arg) if isinstance(arg, Ref) else arg

    from surgeon.ir.program import substitute_op

    types = dict(program.types)
    for op in program.ops:
        target, args = _canonical(op.target, op.args, op.types[0])
        kwargs = () if target == "aten.to.dtype" else op.kwargs
        op = substitute_op(replace(op, target=target, args=args, kwargs=kwargs), change)
        x = op.arg(0)
        if isinstance(x, Ref | ParamRef):
            before = types[x.name] if isinstance(x, Ref) else program.param[x.name].type
            # A parameter itself can't be an output, so its identity stays an operation there.
            returned = isinstance(x, ParamRef) and op.outputs[0] in program.outputs
            if len(op.outputs) == 1 and not returned and _identity(op, before):
                same[op.outputs[0]] = x
                continue
        ops.append(op)
    outputs = tuple(
        found.name if isinstance(found := same.get(name), Ref) else name for name in program.outputs
    )
    return renumbered(replace(program, ops=tuple(ops), outputs=outputs).without_dead_code())


def renumbered(program: Program) -> Program:
    """Returns the program with values named after their operations, counted from the start."""
    from surgeon.ir.program import substitute_op

    count: dict[str, int] = {}
    taken = {i.name for i in program.inputs}
    names: dict[str, str] = {}

    def change(arg: Arg) -> Arg:
        return Ref(names.get(arg.name, arg.name)) if isinstance(arg, Ref) else arg

    ops: list[Op] = []
    for op in program.ops:
        op = substitute_op(op, change)
        parts = op.target.split(".")
        base = (parts[1] if len(parts) > 1 else parts[0]).strip("_") or "value"
        for name in op.outputs:
            while True:
                n = count.get(base, 0)
                count[base] = n + 1
                new = f"{base}_{n}" if n else base
                if new not in taken:
                    break
            names[name] = new
        ops.append(replace(op, outputs=tuple(names[name] for name in op.outputs)))
    outputs = tuple(names.get(name, name) for name in program.outputs)
    return replace(program, ops=tuple(ops), outputs=outputs)


def _returned(program: Program, outputs: Iterable[Any]) -> tuple[str, ...]:
    names: list[str] = []
    for out in outputs:
        if isinstance(out, ParamRef) or out is None or not isinstance(out, Ref):
            raise SurgeonError(
                Code.CAPTURE_FAILED,
                "the model returns something that is no computed tensor",
                at=f"output {len(names)}",
                why=f"{out!r} is returned as it is",
                try_="capture a module whose outputs are tensors it computes",
            )
        names.append(out.name)
    return tuple(names)


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Returns the program with in-place operations made functional, itself where it has none.

    Raises:
        SurgeonError: `capture-failed` where the module writes into its own state or its inputs.
    """
    for module in exported.graph_module.modules():
        if isinstance(module, GraphModule) and any(map(_in_place, module.graph.nodes)):
            # An empty table decomposes nothing: what is left of it is the functionalisation.
            exported = exported.run_decompositions({})
            break
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise SurgeonError(
                Code.CAPTURE_FAILED,
                f"the module writes into {spec.target}",
                at=f"{spec.arg.name}, {spec.kind.name.lower().replace('_', ' ')}",
                why="a program has no state: the value would be lost after every call",
                try_="capture the module without that buffer's update, e.g. in eval mode",
            )
    return exported


def _in_place(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable and str(node.target) not in _SAME


def read(
    exported: ExportedProgram,
    *,
    dims: Mapping[str, tuple[str, ...]] | None = None,
    strip: str = "",
    persistent: frozenset[str] | None = None,
) -> tuple[Program, dict[str, torch.Tensor]]:
    """Returns the program of an exported graph, and the tensors of its constants.

    Args:
        exported: what `torch.export` returned.
        dims: names for the dynamic sizes of inputs, in order, by input name.
        strip: a prefix to take off parameter and module names.
        persistent: names of buffers that checkpoints store; None asks the graph's signature.

    Raises:
        SurgeonError: `capture-failed` where the graph returns no tensor, or keeps state.
    """
    exported = _functional(exported)
    signature = exported.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    symbols: dict[str, str] = {}
    reader = _Reader(symbols, strip)
    env: dict[Node, Any] = {}
    inputs: list[Input] = []
    params: dict[str, Param] = {}
    constants: dict[str, torch.Tensor] = {}
    tied: dict[int, str] = {}
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            continue
        reader.now = node
        spec = specs[node.name]
        value = node.meta["val"]
        if spec.kind is InputKind.USER_INPUT:
            if not isinstance(value, torch.Tensor):
                env[node] = value
                continue
            for name, size in zip((dims or {}).get(node.name, ()), value.shape, strict=False):
                if isinstance(size, torch.SymInt) and name:
                    symbols.setdefault(str(size.node.expr), name)
            inputs.append(Input(node.name, reader.type(value)))
            env[node] = Ref(node.name)
            continue
        target = str(spec.target)
        name = reader.path(target)
        tensor = exported.state_dict.get(target, exported.constants.get(target))
        if spec.kind not in _KINDS:
            reader.refuse(f"{spec.kind.name.lower()} inputs are no tensors")
        kind = _KINDS[spec.kind]
        if kind == "buffer":
            stored = spec.persistent if persistent is None else name in persistent
            kind = "buffer" if stored else "computed"
        if kind == "constant" and isinstance(tensor, torch.Tensor):
            constants[name] = tensor
        first = tied.setdefault(id(tensor), name) if tensor is not None else name
        if first != name and first in params:
            params[first] = replace(params[first], aliases=(*params[first].aliases, name))
        else:
            params[name] = Param(name, reader.type(value), kind)
        env[node] = ParamRef(first)
    outputs = reader.graph(exported.graph_module, env)
    program = Program(
        (),
        tuple(inputs),
        tuple(params.values()),
        tuple(reader.ops),
        _returned(Program(), outputs),
        tuple(reader.guards),
    )
    program = simplified(joined(program))
    return replace(program, symbols=tuple(symbols.values())), constants
