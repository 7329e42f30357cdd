"""What a plug-in is written against. A plug-in imports this module and nothing else of Surgeon.

A plug-in is a package named by an entry point in group `surgeon.plugins`. Its folders `score`,
`select`, `compensate` and `transform` hold one pass per file; the file's name is the pass's name.
Each such file defines one frozen dataclass that derives from the base class of its kind. The fields
of the dataclass, with their types, defaults and docstrings, are the pass's recipe keys and
command-line options. Its folder `ops` holds rules of operations that Surgeon doesn't know:
functions decorated with `rule`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from surgeon.axes.axes import Axes, Axis
from surgeon.axes.branches import Branch
from surgeon.axes.budget import Budget, count
from surgeon.axes.channels import marginals, occurrences, within
from surgeon.axes.consumers import Consumer, consumers
from surgeon.axes.contractions import Contraction, contractions
from surgeon.axes.factors import Product, factorable
from surgeon.axes.grouped import grouping, places, query_heads
from surgeon.axes.grouped import obstacles as grouping_obstacles
from surgeon.axes.meter import Meter, Part
from surgeon.axes.plan import Cut, Plan, Selection, counts, cut, dropped, merged
from surgeon.axes.producers import Producer, ending, producers
from surgeon.axes.scales import Scale, limit, scales
from surgeon.axes.surgery import operate
from surgeon.emit.lowbit.grid import group_for, levels_of, step_of
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Arg, Op, ParamRef, Program, Ref, Size
from surgeon.ops.rule import (
    Atoms,
    Flow,
    Gauge,
    OpRule,
    Rebuild,
    axis_of,
    rule,
    vanishing,
    wherever,
)
from surgeon.ops.rule import Context as RuleContext

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Scores = Mapping[str, NDArray[np.float64]]

__all__ = [
    "KINDS",
    "Arg",
    "Atoms",
    "Axes",
    "Axis",
    "Branch",
    "Budget",
    "Calibration",
    "Code",
    "CompensatePass",
    "Consumer",
    "Context",
    "Contraction",
    "Cut",
    "Flow",
    "Gauge",
    "GetScores",
    "Meter",
    "Op",
    "OpRule",
    "ParamRef",
    "Part",
    "Pass",
    "Plan",
    "Producer",
    "Product",
    "Program",
    "Rebuild",
    "Ref",
    "RuleContext",
    "Scale",
    "ScorePass",
    "SelectPass",
    "Selection",
    "Size",
    "SurgeonError",
    "TransformPass",
    "axis_of",
    "consumers",
    "contractions",
    "count",
    "counts",
    "cut",
    "dropped",
    "ending",
    "factorable",
    "group_for",
    "grouping",
    "grouping_obstacles",
    "levels_of",
    "limit",
    "marginals",
    "merged",
    "occurrences",
    "operate",
    "places",
    "producers",
    "query_heads",
    "rule",
    "scales",
    "step_of",
    "vanishing",
    "wherever",
    "within",
]


class Calibration(Protocol):
    """What a model computes on calibration data; the driver makes one for passes that need it."""

    def moments(self, params: Sequence[str], *, full: bool = True) -> Mapping[str, Any]:
        """Returns the moments of these parameters' inputs; with `full`, the second moment whole."""
        ...

    def gradients(self, params: Sequence[str]) -> Mapping[str, Any]:
        """Returns the loss's gradients with respect to these parameters."""
        ...

    def fisher(self, params: Sequence[str]) -> Mapping[str, Any]:
        """Returns the second moments of the loss's gradients at these maps' outputs."""
        ...

    def similarity(self, branches: Sequence[str]) -> Mapping[str, float]:
        """Returns by branch how alike the residual stream is before and after it."""
        ...

    def routing(self) -> Mapping[str, Any]:
        """Returns how experts were used, by the value that tells where tokens are sent."""
        ...

    def loss(self, plan: Plan, rewrites: Mapping[str, Any] | None = None) -> float:
        """Returns the mean negative log-likelihood of the data's tokens under a plan."""
        ...

    def divergences(self, trials: Iterable[tuple[Plan, Callable[[str], Any]]]) -> tuple[Any, ...]:
        """Returns how far the dense model's predictions move under each of several plans."""
        ...

    def distilled(
        self, plan: Plan, *, rate: float, epochs: float, windows: int, folds: int
    ) -> tuple[Mapping[str, Any], tuple[float, ...]]:
        """Returns maps with learnt gains in their rows and columns, and the divergence by step."""
        ...

    def sequential(
        self,
        plan: Plan,
        params: Sequence[str],
        solve: Callable[[str, Any], Any],
        *,
        cross: bool = True,
        folds: int = 1,
    ) -> Mapping[str, Any]:
        """Returns the parameters solved for, in the program's order."""
        ...

    def with_rewrites(self, rewrites: Mapping[str, Any], *, dense: bool) -> Calibration:
        """Returns the same data on a model in which some tensors are replaced."""
        ...


@dataclass(frozen=True)
class Context:
    """What the driver hands to a pass.

    Attributes:
        axes: the axes found in the program, with members, uses, gauges and pins.
        weights: reads a parameter's tensor by name, when asked for.
        targets: names of the axes and branches that a score is asked for.
        seed: for anything that draws at random.
        notes: gets what the pass has to say to the user.
        calibration: what the model computes on data, for passes that need it.
        budget: what is to go in all; its `axes` and `branches` are all that may.
        plan: what goes, for passes that stand after the selection; before it, and where nothing
            is selected, the empty plan, or the heads that a transform before them grouped.
        facts: gets figures that the report keeps with what the driver records of the pass.
        training: trains what a plan leaves, for passes that need it.
        factored: the parameters that are products of two already; none of them can be replaced.
        reader: reads tensors in blocks of rows, for `blocks`.
    """

    axes: Axes
    weights: Callable[[str], Any]
    targets: tuple[str, ...] = ()
    seed: int = 0
    notes: list[str] = field(default_factory=list[str])
    calibration: Calibration | None = None
    budget: Budget = field(default_factory=Budget)
    plan: Plan = field(default_factory=Plan)
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    training: Callable[[Plan, Any], tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None
    factored: frozenset[str] = frozenset()
    reader: Callable[[Iterable[str]], Iterator[tuple[str, int, Any]]] | None = None

    def blocks(self, params: Iterable[str]) -> Iterator[tuple[str, int, Any]]:
        """Yields tensors in blocks of rows: a name, the first row's number, and the rows.

        For passes that look at every weight once: no tensor is held as a whole, and the next block
        is read meanwhile. Tensors come in the order in which they are stored, all blocks of one
        after another, in the element type that they are stored in. A block must not be written to,
        and is good until the next is asked for.
        """
        if self.reader is not None:
            return self.reader(params)
        return ((name, 0, self.weights(name).detach()) for name in params)

    @property
    def program(self) -> Program:
        """The captured program: operations and parameters as metadata, no tensors."""
        return self.axes.program

    @property
    def data(self) -> Calibration:
        """The calibration data, for passes whose `needs` name activations, gradients or loss."""
        assert self.calibration is not None, "the driver supplies what a pass says it needs"
        return self.calibration

    def moments(self, params: Iterable[str]) -> Mapping[str, Any]:
        """Returns by parameter the `Moments` of its input in the dense model.

        For passes that need `activations: second moment`.
        """
        return self.data.moments(tuple(params))

    def norms(self, params: Iterable[str]) -> Mapping[str, Any]:
        """Returns by parameter the `Moments` of its input without the products between channels.

        For passes that need `activations: norms`, which are cheaper than the second moment.
        """
        return self.data.moments(tuple(params), full=False)

    def gradients(self, params: Iterable[str]) -> Mapping[str, Any]:
        """Returns by parameter the `Gradients` of the dense model's loss.

        For passes that need `gradients: weights`.
        """
        return self.data.gradients(tuple(params))

    def fisher(self, params: Iterable[str]) -> Mapping[str, Any]:
        """Returns by parameter the `Fisher` of its output: Kronecker's factor on that side.

        For passes that need `gradients: outputs`.
        """
        return self.data.fisher(tuple(params))

    def similarity(self, branches: Iterable[str]) -> Mapping[str, float]:
        """Returns by branch the mean cosine of the residual stream before and after it.

        For passes that need `activations: similarity`.
        """
        return self.data.similarity(tuple(branches))

    def routing(self) -> Mapping[str, Any]:
        """Returns the `Routing` of each mixture of experts: how often each is used, what it adds.

        For passes that need `activations: routing`. Keys are the values of the program that tell
        where tokens are sent, [tokens, experts].
        """
        return self.data.routing()

    def loss(self, plan: Plan, rewrites: Mapping[str, Any] | None = None) -> float:
        """Returns the masked model's mean negative log-likelihood on the calibration data.

        For passes that need `loss`.
        """
        return self.data.loss(plan, rewrites)

    def divergences(self, trials: Iterable[tuple[Plan, Callable[[str], Any]]]) -> tuple[Any, ...]:
        """Returns for each of several plans the `Divergence` of predictions from the dense model's.

        For passes that need `loss: divergence`. With each plan comes what gives, by name, the
        full-size tensor that replaces a parameter before the plan takes its part of it, or None;
        parameters that lose nothing are not asked for.
        """
        return self.data.divergences(trials)

    def sequential(
        self,
        plan: Plan,
        params: Iterable[str],
        solve: Callable[[str, Any], Any],
        *,
        cross: bool = True,
        folds: int = 1,
    ) -> Mapping[str, Any]:
        """Returns what `solve` makes of each parameter and its `Pair` of inputs, in program order.

        For passes that need `activations: sequential`. A `Pair` holds what the parameter's input
        is in the dense model and in the pruned one, whose earlier parameters are replaced already.
        Without `cross` it lacks the products of both where `wanted` says what is to be made. All
        is solved for on each of the `folds` of the windows by itself; what is returned is the mean.
        """
        return self.data.sequential(plan, tuple(params), solve, cross=cross, folds=folds)

    def distilled(
        self, plan: Plan, *, rate: float, epochs: float, windows: int, folds: int = 1
    ) -> tuple[Mapping[str, Any], tuple[float, ...]]:
        """Returns maps with learnt gains in their rows and columns, and the divergence by step.

        For passes that need `activations: distillation`. A gain multiplies a channel of what a map
        reads or makes; gains are learnt so that the smaller model predicts what the dense one does,
        on each of the `folds` of the windows in a model that `sequential` did not solve for on it.
        """
        return self.data.distilled(plan, rate=rate, epochs=epochs, windows=windows, folds=folds)

    def after(self, rewrites: Mapping[str, Any]) -> Context:
        """Returns what a pass sees once these tensors stand in the smaller model.

        For passes that go over the model several times; the dense model stays what it was.
        """

        def weights(name: str) -> Any:
            return rewrites[name] if name in rewrites else self.weights(name)

        data = self.calibration
        data = None if data is None else data.with_rewrites(rewrites, dense=False)
        return replace(self, weights=weights, calibration=data, reader=None)

    def recovered(self, plan: Plan, settings: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """Returns the full-size tensors that training what a plan leaves comes to, and figures.

        For compensations that need `training`.

        Args:
            plan: what is removed.
            settings: the options of pass `recover`, under their names.
        """
        assert self.training is not None, "the driver supplies what a pass says it needs"
        return self.training(plan, settings)

    def unable(self, target: str, why: str) -> SurgeonError:
        """Returns the refusal of a pass that can't treat an axis or a branch."""
        return SurgeonError(
            Code.BAD_OPTION,
            f"the pass can't treat {target}",
            at=target,
            why=why,
            try_="another pass for its role, or --freeze it",
        )


class Pass(ABC):  # noqa: B024  (each kind adds the method that it is called by)
    """Any pass. Its options are its dataclass fields; `needs` says what the driver must supply."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """Such as `weights`, `gradients` or `activations: second moment`."""


class ScorePass(Pass):
    """Gives every index of every axis a number; the lowest are removed first.

    Scores are comparable within a role. Two facts about them let a selection compare more.
    """

    unit: ClassVar[Literal["role", "loss"]] = "role"
    """`loss` where a score predicts by how much the mean negative log-likelihood of a token grows;
    such scores are comparable across roles and layers."""

    cumulative: ClassVar[bool] = False
    """Whether a score is the cost of its index with all that score less; else costs are summed."""

    @abstractmethod
    def score(self, context: Context) -> Scores:
        """Returns for each target a float64 array: `[*outer sizes, size]`, a branch's is `[]`."""


@dataclass(frozen=True)
class GetScores:
    """What a selection gets scores from: called with names of axes and branches, it scores them.

    Attributes:
        call: the score pass on some targets, its result checked.
        unit: the score pass's.
        cumulative: the score pass's.
    """

    call: Callable[[Iterable[str]], Scores]
    unit: Literal["role", "loss"] = "role"
    cumulative: bool = False

    def __call__(self, names: Iterable[str]) -> Scores:
        """Returns the scores of these axes and branches."""
        return self.call(names)


class SelectPass(Pass):
    """Turns scores and a budget into a plan."""

    @abstractmethod
    def select(self, context: Context, scores: GetScores, budget: Budget) -> Plan:
        """Returns the cuts and dropped branches; `scores` gives the scores of what it names."""


class CompensatePass(Pass):
    """Makes up for what is removed by changing what is kept."""

    @abstractmethod
    def compensate(self, context: Context, plan: Plan) -> Mapping[str, Any]:
        """Returns by parameter name the full-size tensor that replaces it before slicing."""


class TransformPass(Pass):
    """Changes the weights without removing an index by itself.

    Before the selection it makes the model that others score. After it, it is handed the plan and
    the weights as compensated, and what it gives is, like theirs, of full size.
    """

    exact: ClassVar[bool] = False
    """Whether the model computes what it did, as after a change of basis."""

    factors: ClassVar[bool] = False
    """Whether it may make two maps of one; such a pass stands last, and some targets refuse it."""

    groups: ClassVar[bool] = False
    """Whether it makes key/value heads alike, of which one of a group then stays; the axes that it
    sees have query heads told from key/value heads."""

    def grouped(self, axes: Axes) -> Mapping[str, int]:
        """Returns by axis of key/value heads how many of them stay, where it `groups`."""
        return {}

    @abstractmethod
    def transform(self, context: Context) -> Mapping[str, Any]:
        """Returns by parameter name the full-size tensor that replaces it, or a `Product`."""


KINDS: Mapping[str, type[Pass]] = {
    "score": ScorePass,
    "select": SelectPass,
    "compensate": CompensatePass,
    "transform": TransformPass,
}
"""The base class of each kind of pass; the names are those of a plug-in's folders."""
