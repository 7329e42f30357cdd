"""How alike the residual stream is before and after a branch or a layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from surgeon.axes.branches import ADD, Branch
from surgeon.calibrate.parallel import World
from surgeon.ir import Program, Ref


@dataclass(frozen=True)
class Span:
    """A stretch of the residual stream, from one value to another.

    Attributes:
        before: the value where it begins; None where that is `after` less `part`.
        after: the value where it ends.
        part: what was added in between, where no single value lies before it.
    """

    before: str | None
    after: str
    part: str | None = None


def spans(program: Program, branches: Iterable[Branch]) -> dict[str, Span]:
    """Returns the stretch of every branch and of every layer (by its module path).

    In a sum of several branches (attention and MLP side by side) what lies before one of them is
    the whole sum without it.
    """
    found: dict[str, Span] = {}
    layers: dict[str, list[Branch]] = {}
    for branch in branches:
        layers.setdefault(branch.layer, []).append(branch)
        top = _top(program, branch.add)
        after, part = program.ops[top].outputs[0], _operand(program, branch.add, branch.operand)
        if top == branch.add:
            found[branch.name] = Span(_operand(program, top, 1 - branch.operand), after)
        else:
            found[branch.name] = Span(None, after, part)
    for layer, own in layers.items():
        if not layer or layer in found:
            continue
        added = {_operand(program, b.add, b.operand) for b in own}
        rest = [v for v in _leaves(program, _top(program, own[0].add)) if v not in added]
        after = program.ops[max(_top(program, b.add) for b in own)].outputs[0]
        if len(rest) == 1:
            found[layer] = Span(rest[0], after)
    return found


def _operand(program: Program, add: int, operand: int) -> str:
    ref = program.ops[add].arg(operand)
    assert isinstance(ref, Ref)
    return ref.name


def _sums(program: Program, index: int) -> bool:
    """Whether an operation adds two values of one shape."""
    op = program.ops[index]
    a, b = op.arg(0), op.arg(1)
    if op.target != ADD or not isinstance(a, Ref) or not isinstance(b, Ref):
        return False
    return program.types[a.name].shape == program.types[b.name].shape == op.types[0].shape


def _top(program: Program, add: int) -> int:
    """Returns the last addition of the sum that an addition is part of."""
    users = program.consumers.get(program.ops[add].outputs[0], ())
    inner = len(users) == 1 and _sums(program, users[0])
    return _top(program, users[0]) if inner else add


def _leaves(program: Program, add: int) -> list[str]:
    """Returns the values that a sum of several adds up."""
    out: list[str] = []
    for operand in (0, 1):
        name = _operand(program, add, operand)
        source = program.producer.get(name)
        single = program.consumers.get(name, ()) == (add,)
        if source is not None and single and _sums(program, source):
            out += _leaves(program, source)
        else:
            out.append(name)
    return out


class Cosine:
    """The mean over tokens of a cosine, in the making."""

    def __init__(self) -> None:
        self.total = torch.zeros(2, dtype=torch.float64)

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Takes more tokens; a value that is zero in either place is like nothing."""
        width = before.shape[-1]
        a, b = before.reshape(-1, width).double(), after.reshape(-1, width).double()
        size = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
        cosine = (a * b).sum(-1) / size.clamp(min=torch.finfo(torch.float64).tiny)
        self.total += torch.stack([cosine.sum().cpu(), torch.tensor(float(len(a)))])

    def done(self, world: World) -> float:
        """Returns the mean over the tokens of all processes."""
        world.add(self.total)
        return float(self.total[0] / self.total[1].clamp(min=1))
