"""Rotary embeddings, found by their arithmetic; their tables computed once for all positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from surgeon.emit.ort.graph import Edit, Get, Graph, slice_of
from surgeon.emit.ort.match import END, Look, either, kind
from surgeon.ir import Arg, Op, Program, Ref
from surgeon.ir.program import op_refs
from surgeon.runtime.lower import lower

ROTARY = "surgeon.rotary"
"""`rotary(x, positions, cos, sin; dim)`: pairs (i, i + dim/2) of the last dimension turned.

x is [B, H, S, D], cos and sin are [positions, dim/2]; what is past `dim` stays as it is.
"""

POSITIONS = "position_ids"


def of_positions(program: Program) -> frozenset[str]:
    """Returns the values that depend on positions (and parameters) alone."""
    found = {POSITIONS}
    for op in program.ops:
        values = [r.name for r in op_refs(op) if isinstance(r, Ref)]
        if values and all(name in found for name in values):
            found.update(op.outputs)
    return frozenset(found)


def _turned(look: Look, op: Op, fixed: frozenset[str]) -> tuple[Arg, Ref, Ref] | None:
    """Returns x, cos and sin of `x·cos + cat(−x₂, x₁)·sin`."""
    if kind(op) != "add":
        return None
    for straight, crossed in either(op):
        left, right = look.op(straight, "mul"), look.op(crossed, "mul")
        if left is None or right is None:
            continue
        for x, cos in either(left):
            for swapped, sin in either(right):
                if not isinstance(cos, Ref) or not isinstance(sin, Ref):
                    continue
                if {cos.name, sin.name} <= fixed and _half_turn(look, swapped, x):
                    return x, cos, sin
    return None


def _half_turn(look: Look, arg: Arg, x: Arg) -> bool:
    joined = look.op(arg, "cat")
    pieces = joined.arg(0) if joined else None
    if joined is None or not isinstance(pieces, tuple) or len(pieces) != 2:
        return False
    rank, width = len(look.shape(x)), look.shape(x)[-1]
    if rank != 4 or joined.arg(1, 0) not in (-1, rank - 1) or not isinstance(width, int):
        return False
    negated = look.op(pieces[0], "neg")
    return (
        negated is not None
        and look.slice(negated.arg(0), x, width // 2, width)
        and look.slice(pieces[1], x, 0, width // 2)
    )


class _Tables:
    """The cos and sin tables of a program, one pair for each pair of values."""

    def __init__(self, graph: Graph, edit: Edit, get: Get, positions: int) -> None:
        self.graph, self.edit, self.get, self.positions = graph, edit, get, positions
        self.known: dict[tuple[str, str], tuple[Arg, Arg] | None] = {}

    def of(self, cos: Ref, sin: Ref) -> tuple[Arg, Arg] | None:
        """Returns the tables as parameters, None where the two halves of them differ."""
        key = (cos.name, sin.name)
        if key not in self.known:
            self.known[key] = self._make(*key)
        return self.known[key]

    def _make(self, cos: str, sin: str) -> tuple[Arg, Arg] | None:
        part = slice_of(self.graph.program, (cos, sin), (POSITIONS,))
        read = self.graph.reader(self.get)
        few = torch.tensor([[0, 1, 2, 5]])
        one, other = lower(part, read)(few), lower(part, read)(few.flip(1))
        for values, reverse in zip(one, other, strict=True):
            half = values.shape[-1] // 2
            same_halves = torch.equal(values[..., :half], values[..., half:])
            # A table can't hold what depends on more than the position itself.
            if not same_halves or not torch.equal(values, reverse.flip(-2)):
                return None
        half = one[0].shape[-1] // 2
        number = sum(found is not None for found in self.known.values())
        label = f"rotary.{number}" if number else "rotary"

        def table(index: int) -> Callable[[Get], torch.Tensor]:
            def compute(get: Get) -> torch.Tensor:
                every = torch.arange(self.positions)[None]
                found = lower(part, get)(every)[index]
                return found.reshape(self.positions, 2 * half)[:, :half].contiguous()

            return compute

        shape = (self.positions, half)
        return (
            self.edit.tensor(f"{label}.cos", shape, table(0)),
            self.edit.tensor(f"{label}.sin", shape, table(1)),
        )


def rotaries(graph: Graph, get: Get, positions: int) -> Graph:
    """Returns the graph with every rotation of halves as one operation on tables.

    Args:
        graph: the graph.
        get: reader of the weights, to see what the tables hold.
        positions: how many rows the tables have.
    """
    program = graph.program
    look, edit, fixed = Look(program), Edit(graph), of_positions(program)
    tables = _Tables(graph, edit, get, positions)
    for index, op in enumerate(program.ops):
        found = _turned(look, op, fixed)
        pair = tables.of(found[1], found[2]) if found else None
        if found is None or pair is None:
            continue
        args = (found[0], Ref(POSITIONS), *pair)
        width = op.types[0].shape[-1]
        edit.ops[index] = (replace(op, target=ROTARY, args=args, kwargs=(("dim", width),)),)
    return _partial(edit.done())


def _partial(graph: Graph) -> Graph:
    """Rotations of the first channels, with the others put beside, become one operation."""
    look, edit = Look(graph.program), Edit(graph)
    for index, op in enumerate(graph.program.ops):
        pieces = op.arg(0)
        if kind(op) != "cat" or not isinstance(pieces, tuple) or len(pieces) != 2:
            continue
        turned, rest = look.op(pieces[0], ROTARY), look.op(pieces[1], "slice")
        if turned is None or rest is None or op.arg(1, 0) not in (-1, 3):
            continue
        x, width = rest.arg(0), turned.kwarg("dim")
        size = look.shape(x)[-1]
        assert isinstance(width, int) and isinstance(size, int)
        whole = look.slice(pieces[1], x, width, size) and look.slice(turned.arg(0), x, 0, width)
        if whole and size < END:
            args = (x, *turned.args[1:])
            edit.ops[index] = (replace(op, target=ROTARY, args=args, kwargs=turned.kwargs),)
    return edit.done()
