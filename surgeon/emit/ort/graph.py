"""A program under rewriting, with the tensors that rewrites derive from its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from surgeon.ir import Arg, Op, Param, ParamRef, Program, Ref, TensorType
from surgeon.ir.program import op_refs, substitute_op
from surgeon.runtime.lower import lower

Get = Callable[[str], torch.Tensor]
"""From a parameter's name to its tensor."""

Derived = Callable[[Get], torch.Tensor]
"""A tensor as a function of the weights, computed when it is written and not before."""


@dataclass(frozen=True)
class Graph:
    """A program and what its derived parameters hold."""

    program: Program
    derived: Mapping[str, Derived] = field(default_factory=dict[str, Derived])

    def reader(self, get: Get) -> Get:
        """Returns a reader of weights that computes derived ones from the others."""

        def read(name: str) -> torch.Tensor:
            made = self.derived.get(name)
            return get(name) if made is None else made(read)

        return read


@dataclass
class Edit:
    """Changes to a graph, applied all at once: operations replaced, values renamed, tensors added.

    Operations that nothing needs afterwards go by themselves.
    """

    graph: Graph
    ops: dict[int, tuple[Op, ...]] = field(default_factory=dict[int, tuple[Op, ...]])
    same: dict[str, Arg] = field(default_factory=dict[str, Arg])
    params: dict[str, Param] = field(default_factory=dict[str, Param])
    derived: dict[str, Derived] = field(default_factory=dict[str, Derived])

    def tensor(
        self, name: str, shape: Sequence[int], make: Derived, dtype: str = "f32"
    ) -> ParamRef:
        """Returns a new parameter, or the one that already has this name."""
        type_ = TensorType(dtype, tuple(shape))
        self.params.setdefault(name, Param(name, type_, "constant"))
        self.derived.setdefault(name, make)
        return ParamRef(name)

    def done(self) -> Graph:
        """Returns the changed graph without dead code."""
        program = self.graph.program

        def now(arg: Arg) -> Arg:
            while isinstance(arg, Ref) and arg.name in self.same:
                arg = self.same[arg.name]
            return arg

        ops: list[Op] = []
        for index, op in enumerate(program.ops):
            for new in self.ops.get(index, (op,)):
                ops.append(substitute_op(new, now))
        known = {p.name for p in program.params}
        added = tuple(p for name, p in self.params.items() if name not in known)
        outputs = tuple(
            found.name if isinstance(found := now(Ref(name)), Ref) else name
            for name in program.outputs
        )
        changed = replace(
            program, ops=tuple(ops), params=(*program.params, *added), outputs=outputs
        )
        return Graph(changed.without_dead_code(), {**self.graph.derived, **self.derived})


def fresh(program: Program, name: str, taken: set[str]) -> str:
    """Returns a value name that is neither the program's nor taken, and takes it."""
    found, number = name, 1
    while found in program.types or found in taken:
        found, number = f"{name}_{number}", number + 1
    taken.add(found)
    return found


def slice_of(program: Program, names: Sequence[str], inputs: Sequence[str] = ()) -> Program:
    """Returns the part of a program that computes these values from these inputs."""
    part = replace(
        program,
        inputs=tuple(i for i in program.inputs if i.name in inputs),
        outputs=tuple(names),
    )
    return part.without_dead_code()


def without_constants(graph: Graph) -> Graph:
    """Returns the graph with what depends on parameters alone turned into a parameter."""
    program, edit = graph.program, Edit(graph)
    constant: dict[str, int] = {}
    for index, op in enumerate(program.ops):
        found = list(op_refs(op))
        inner = all(isinstance(r, ParamRef) or r.name in constant for r in found)
        fixed = all(isinstance(size, int) for type_ in op.types for size in type_.shape)
        if inner and fixed and len(op.outputs) == 1 and not op.target.startswith("surgeon."):
            constant[op.outputs[0]] = index
    for name, index in constant.items():
        type_ = program.ops[index].types[0]
        shape = [size for size in type_.shape if isinstance(size, int)]
        part = slice_of(program, (name,))

        def compute(get: Get, part: Program = part) -> torch.Tensor:
            return lower(part, get)()

        label = next((p.name for p in part.params), "constant")
        edit.same[name] = edit.tensor(f"{label}.{name}", shape, compute, type_.dtype)
    return edit.done()
