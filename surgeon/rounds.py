"""What finished rounds of a schedule have come to, in terms of the original model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from surgeon.axes.plan import Plan, Selection
from surgeon.axes.settle import analyse
from surgeon.axes.surgery import operate
from surgeon.opening import Model
from surgeon.recovering import Ground

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class State:
    """What finished rounds have come to, in terms of the original model.

    Attributes:
        rounds: how many are finished.
        plan: what is gone.
        rewrites: full-size tensors that replace others.
        entries: the report's record of every pass of every round.
        notes: what passes had to say.
    """

    rounds: int = 0
    plan: Plan = field(default_factory=Plan)
    rewrites: Mapping[str, Any] = field(default_factory=dict[str, Any])
    entries: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


class Left(Mapping[str, "torch.Tensor"]):
    """The tensors of a model after a plan, each made when it is read."""

    def __init__(self, origin: Model, state: State, names: tuple[str, ...]) -> None:
        self.origin, self.state, self.names = origin, state, names
        self.selection = Selection(origin.axes, state.plan)

    def __getitem__(self, name: str) -> torch.Tensor:
        from surgeon.runtime.apply import removed

        if name not in self.names:
            raise KeyError(name)
        found = self.state.rewrites.get(name)
        return removed(self.selection, name, self.origin.read(name) if found is None else found)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def left_of(origin: Model, state: State) -> Model:
    """Returns the model that is left after some rounds."""
    program = operate(origin.axes, state.plan)
    names = tuple(p.name for p in program.params)
    return Model(None, program, analyse(program), Left(origin, state, names))


def ground_of(origin: Model, state: State) -> Ground:
    """Returns what a further round's passes stand on."""
    return Ground(origin, state.plan, state.rewrites, scheduled=True)


def joined(origin: Model, state: State, plan: Plan, rewrites: Mapping[str, Any]) -> State:
    """Returns the state after a further plan, told in indices of the original model.

    Args:
        origin: the original model.
        state: before.
        plan: of what is left.
        rewrites: tensors of what is left, in its sizes, that replace others before the plan.
    """
    ground = ground_of(origin, state).then(plan, rewrites)
    return replace(state, plan=ground.plan, rewrites=ground.rewrites)
