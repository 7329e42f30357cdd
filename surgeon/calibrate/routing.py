"""Which experts tokens are sent to, and how much each adds."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from surgeon.axes.branches import DISPATCH
from surgeon.calibrate.parallel import World
from surgeon.ir import Program, Ref

SUM = "aten.sum.dim_IntList"


@dataclass(frozen=True)
class Route:
    """A mixture of experts in a program.

    Attributes:
        sent: the value with each token's weight for each expert, [tokens, experts].
        added: the value with what each expert adds to each token, [experts, tokens, width].
    """

    sent: str
    added: str


@dataclass(frozen=True)
class Routing:
    """How a mixture of E experts was used.

    Attributes:
        count: tokens.
        sent: [E], the share of the tokens that were sent to an expert, fp32.
        norm: [E], the mean norm of what an expert added to all tokens, its weight included, fp32.
    """

    count: int
    sent: torch.Tensor
    norm: torch.Tensor


def routes(program: Program) -> dict[str, Route]:
    """Returns the mixtures of a program, by the value that tells where tokens are sent."""
    out: dict[str, Route] = {}
    for op in program.ops:
        if op.target == DISPATCH:
            sent = op.outputs[0]
            added = _added(program, sent, op.types[0].shape[-1])
            if added is not None:
                out[sent] = Route(sent, added)
    return out


def _added(program: Program, sent: str, experts: object) -> str | None:
    """Returns the value whose first dimension, over experts, is summed after `sent` entered it."""
    queue, seen = [sent], {sent}
    for name in queue:
        for index in program.consumers.get(name, ()):
            op = program.ops[index]
            x = op.arg(0)
            if op.target == SUM and op.arg(1) == (0,) and isinstance(x, Ref):
                shape = program.types[x.name].shape
                if len(shape) == 3 and shape[0] == experts:
                    return x.name
            fresh = [o for o in op.outputs if o not in seen]
            seen.update(fresh)
            queue += fresh
    return None


class Uses:
    """A mixture's uses in the making. Sums are fp64."""

    def __init__(self, experts: int) -> None:
        self.count = 0
        self.sent = torch.zeros(experts, dtype=torch.float64)
        self.norm = torch.zeros(experts, dtype=torch.float64)

    def add(self, sent: torch.Tensor, added: torch.Tensor) -> None:
        """Takes more tokens: [tokens, experts] and [experts, tokens, width]."""
        self.count += len(sent)
        self.sent += (sent != 0).sum(0).double().cpu()
        self.norm += added.detach().float().norm(dim=-1).double().sum(-1).cpu()

    def done(self, world: World) -> Routing:
        """Returns the uses over the tokens of all processes."""
        count = world.count(self.count)
        world.add(self.sent, self.norm)
        over = max(1, count)
        return Routing(count, (self.sent / over).float(), (self.norm / over).float())
