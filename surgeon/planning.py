"""From a model, passes and a budget to a plan and the tensors that belong to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from surgeon.axes.axes import Axes
from surgeon.axes.budget import Budget
from surgeon.axes.factors import Product
from surgeon.axes.grouped import grouping
from surgeon.axes.plan import Plan, Selection, check, merged
from surgeon.conditions import Watched, check_scores, check_selected, check_tensors
from surgeon.effects import PassResult, of_plan, of_scores, of_tensors, options_of
from surgeon.errors import Code, SurgeonError, no_weights
from surgeon.ir.verify import verify as verify_program
from surgeon.memory import Memory
from surgeon.opening import Model
from surgeon.plugin import Calibration, Context, GetScores
from surgeon.recovering import Ground
from surgeon.registry import build

if TYPE_CHECKING:
    from surgeon.calibrate.data import Recipe, Windows
    from surgeon.calibrate.stored import Stored

LOOKING = ("activations", "gradients", "loss")
"""What a need begins with that only calibration data can meet."""


class Step(Protocol):
    """A pass as a recipe names it."""

    @property
    def kind(self) -> str:
        """Of the pass."""
        ...

    @property
    def name(self) -> str:
        """Of the pass."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """That it is built with."""
        ...


class Driven(Calibration, Protocol):
    """Calibration data as the driver handles it between passes.

    Where it has a method `expect(needs, brief=…)`, that hears what will be asked for, so that one
    walk can gather all of it, and whether the model is about to be replaced.
    """

    def with_rewrites(self, rewrites: Mapping[str, Any], *, dense: bool) -> Driven:
        """Returns the same data on a model in which some tensors are replaced.

        Args:
            rewrites: full-size tensors by parameter.
            dense: replace them in the dense model too, not in the pruned one alone.
        """
        ...


@dataclass(frozen=True)
class Named:
    """A pass that is built, and what it is called."""

    kind: str
    name: str
    made: Any

    @property
    def label(self) -> str:
        """Kind and name."""
        return f"{self.kind}/{self.name}"

    @property
    def needs(self) -> frozenset[str]:
        """What the pass must be supplied with: the instance says, as its options may matter."""
        return self.made.needs

    @property
    def looks(self) -> bool:
        """Whether it needs calibration data."""
        return any(need.startswith(LOOKING) for need in self.needs)


@dataclass(frozen=True)
class Passes:
    """The passes of one prune, built, in the order in which they run."""

    transform: tuple[Named, ...] = ()
    score: Named | None = None
    select: Named | None = None
    compensate: tuple[Named, ...] = ()
    then: tuple[Named, ...] = ()

    @classmethod
    def of(cls, steps: Iterable[Step]) -> Passes:
        """Returns the passes that a recipe names: one score and one select or neither, and others.

        Where nothing is selected, transforms that are not exact, and what follows them, stand
        `then`: the dense model that others are compared with stays what it was.

        Raises:
            SurgeonError: `no-such-pass`, or `bad-option` for one that a pass hasn't, and for a pass
                that makes two maps of one before the selection.
        """
        made = [Named(s.kind, s.name, build(s.kind, s.name, s.options)) for s in steps]
        score = next((p for p in made if p.kind == "score"), None)
        select = next((p for p in made if p.kind == "select"), None)
        lossy = (i for i, p in enumerate(made) if p.kind == "transform" and not p.made.exact)
        first = next(lossy, len(made)) if score is None else made.index(score)
        for early in made[:first]:
            if getattr(early.made, "factors", False):
                raise SurgeonError(
                    Code.BAD_OPTION,
                    f"{early.label} can't stand before the selection",
                    at=early.label,
                    why="what follows would be selected from, and mended in, maps that are two",
                    try_=f"put it last: --then {early.name}",
                )
        return cls(
            tuple(made[:first]),
            score,
            select,
            tuple(p for p in made if p.kind == "compensate"),
            tuple(p for p in made[first:] if p.kind == "transform"),
        )

    @property
    def later(self) -> tuple[Named, ...]:
        """What runs after the first transforms."""
        chosen = tuple(p for p in (self.score, self.select) if p is not None)
        return (*chosen, *self.compensate, *self.then)

    @property
    def every(self) -> tuple[Named, ...]:
        """All of them, in order."""
        return (*self.transform, *self.later)

    @property
    def factors(self) -> tuple[Named, ...]:
        """Those that may make two maps of one."""
        return tuple(p for p in self.then if p.made.factors)

    @property
    def groups(self) -> tuple[Named, ...]:
        """Those that make key/value heads fewer."""
        every = (*self.transform, *self.then)
        return tuple(p for p in every if getattr(p.made, "groups", False))

    @property
    def look(self) -> bool:
        """Whether one of them needs calibration data."""
        return any(p.looks for p in self.every)


@dataclass(frozen=True)
class Planned:
    """What the passes made.

    Attributes:
        plan: what goes, and which maps become two.
        rewrites: full-size tensors that replace others before the plan is applied, and the factors
            of maps that become two, by their own names.
        results: what each pass did.
        notes: what passes had to say.
    """

    plan: Plan
    rewrites: Mapping[str, Any]
    results: tuple[PassResult, ...]
    notes: tuple[str, ...]


def planned(
    origin: Model,
    passes: Passes,
    budget: Budget,
    *,
    calibration: Recipe | Windows | Stored | None = None,
    seed: int = 0,
    ground: Ground | None = None,
    memory: Memory | None = None,
) -> Planned:
    """Returns the plan, the tensors that replace others before it is applied, and their record.

    Transforms run first, and what comes after sees their weights as the model's own. Then indices
    are scored and selected. Each compensation, and each transform after those, sees, in weights and
    in the pruned model, what those before it replaced; the dense model stays what it was. Passes
    that select nothing give the empty plan.

    Args:
        origin: the model.
        passes: what transforms, scores, selects, compensates and transforms again.
        budget: how much is to go, and from where.
        calibration: the data for passes that look at what the model computes, or statistics that
            were gathered before.
        seed: for passes that draw at random.
        ground: where `origin` is what rounds left of another model: that, and what they did.
        memory: how much of it the process may take; by default a share of what is free.

    Raises:
        SurgeonError: `bad-option` where a pass needs data and there is none; what passes refuse;
            `bad-plan` and others, with the pass's name, for what a pass gives that can't be used.
    """
    verify_program(origin.program)
    run = _Run(origin, budget, seed, memory or Memory.of(None))
    data = run.gathered(passes, calibration) if passes.look else None
    ground = ground or Ground(origin)
    heads = Plan()
    changed: dict[str, Any] = {}
    made_by: list[Mapping[str, Any]] = []
    for step in passes.transform:
        context = run.context(changed, data, (step,), heads, brief=step.made.exact)
        made = run.rewriting(step, lambda c=context, p=step: p.made.transform(c), context)
        changed.update(made)
        made_by.append(made)
        heads = merged([heads, run.grouping(step)])
        if data is not None and made:
            data = data.with_rewrites(made, dense=True)
    plan = heads
    if passes.score is not None and passes.select is not None:
        context = run.context(changed, data, passes.later)
        plan = merged([run.select(context, passes.score, passes.select), heads])
    mended: dict[str, Any] = {}
    products: dict[str, Product] = {}
    after = (*passes.compensate, *passes.then)
    for number, step in enumerate(after):
        seen = data.with_rewrites(mended, dense=False) if data is not None and mended else data
        context = run.context(
            {**changed, **mended}, seen, after[number:], plan, frozenset(products)
        )
        dense, basis = _teacher(passes, made_by, ground)
        train = ground.training(
            {**changed, **mended},
            calibration=calibration,
            dense=dense,
            basis=basis,
            notes=context.notes,
        )
        context = replace(context, training=train)
        found = run.rewriting(step, lambda c=context, p=step: _called(p, c), context)
        for name, made in found.items():
            if isinstance(made, Product):
                products[name], made = made, made.whole
            mended[name] = made
        plan = merged([plan, run.grouping(step)])
    plan = replace(plan, factors=tuple(sorted((n, p.rank) for n, p in products.items())))
    rewrites = {**changed, **mended}
    for name, split in Selection(origin.axes, plan).splits.items():
        del rewrites[name]
        left, right = products[name].left.float(), products[name].right.float()
        rewrites |= {split.rows.name: left, split.columns.name: right}
    return Planned(plan, rewrites, tuple(run.results), tuple(run.notes))


def _as_one(axes: Axes, plan: Plan, made: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a pass's tensors with heads alike of which one stands for the others by now."""
    from surgeon.runtime.apply import alike

    return {
        name: tensor if isinstance(tensor, Product) else alike(axes, plan, name, tensor)
        for name, tensor in made.items()
    }


def _called(step: Named, context: Context) -> Any:
    """Returns what a pass that stands after the selection makes."""
    if step.kind == "compensate":
        return step.made.compensate(context, context.plan)
    return step.made.transform(context)


def _teacher(
    passes: Passes, made: Sequence[Mapping[str, Any]], ground: Ground
) -> tuple[dict[str, Any], str]:
    """Returns the dense model's tensors in the basis that passes see, and why that can't be told.

    Exact changes at the beginning are the teacher's as well. What else transforms do, such as a
    mask, is what is to be made up for.
    """
    exact = [step.made.exact for step in passes.transform]
    first = exact.index(False) if False in exact else len(exact)
    if ground.scheduled:
        why = "transforms of earlier rounds may have changed the basis" if any(exact) else ""
        return {}, why
    dense: dict[str, Any] = {}
    for found in made[:first]:
        dense.update(found)
    late = any(exact[first:])
    return dense, "a transform changes the basis after another changed values" if late else ""


class _Run:
    """One run of passes: makes their contexts and keeps the record."""

    def __init__(self, origin: Model, budget: Budget, seed: int, memory: Memory) -> None:
        self.origin, self.budget, self.seed, self.memory = origin, budget, seed, memory
        self.lent = Watched(origin.tensors)
        self.results: list[PassResult] = []
        self.notes: list[str] = []

    def context(
        self,
        rewrites: Mapping[str, Any],
        data: Driven | None,
        passes: Sequence[Named],
        plan: Plan | None = None,
        factored: frozenset[str] = frozenset(),
        *,
        brief: bool = False,
    ) -> Context:
        """Returns what a pass is handed where these tensors are replaced.

        Args:
            rewrites: by parameter; taken as it is now.
            data: calibration data of that model.
            passes: those that are going to look at it.
            plan: what goes, once that is decided.
            factored: the parameters that are products by now.
            brief: the pass looks at a model that it puts into another basis.
        """
        now = dict(rewrites)

        def weights(name: str) -> Any:
            # A pass computes with numbers; a module's parameters would keep a record of it.
            found = (now[name] if name in now else self.origin.read(name)).detach()
            return found.float() if found.is_floating_point() else found

        expect = getattr(data, "expect", None)
        if expect is not None:
            expect(sorted({need for p in passes for need in p.needs}), brief=brief)
        return Context(
            self.origin.axes,
            weights,
            seed=self.seed,
            notes=[],
            calibration=data,
            budget=self.budget,
            plan=plan or Plan(),
            factored=factored,
            reader=lambda params: self.origin.stream(params, self.memory.block(), now),
        )

    def note(
        self, step: Named, context: Context, seconds: float, effect: Mapping[str, Any]
    ) -> None:
        """Adds a pass to the record."""
        self.lent.check(step.label)
        said = tuple(context.notes)
        self.notes.extend(said)
        self.results.append(
            PassResult(step.kind, step.name, options_of(step.made), seconds, effect, said)
        )

    def rewriting(self, step: Named, call: Callable[[], Any], context: Context) -> dict[str, Any]:
        """Returns the tensors and products that a pass gives, checked and put on record."""
        start = time.perf_counter()
        axes, plan = self.origin.axes, context.plan
        two = bool(getattr(step.made, "factors", False))
        made = check_tensors(axes, step.label, call(), products=two, whole=context.factored)
        made = _as_one(axes, plan, made)
        effect = {**of_tensors(made, axes, plan), **context.facts}
        self.note(step, context, time.perf_counter() - start, effect)
        return made

    def grouping(self, step: Named) -> Plan:
        """Returns which key/value heads stay after a pass that groups them, checked."""
        if not getattr(step.made, "groups", False):
            return Plan()
        axes = self.origin.axes
        counts = step.made.grouped(axes)
        cuts = tuple(grouping(axes.by_name[name], count) for name, count in counts.items())
        return check(axes, Plan(cuts, grouped=tuple(counts)))

    def select(self, context: Context, score: Named, select: Named) -> Plan:
        """Returns the selection's plan, checked; scores are made when it asks for them."""
        axes, scorer = self.origin.axes, score.made
        spent, seen = [0.0], dict[str, Any]()
        own = replace(context, notes=[])

        def scores(names: Iterable[str]) -> Mapping[str, Any]:
            begin = time.perf_counter()
            wanted = tuple(names)
            found = scorer.score(replace(own, targets=wanted))
            check_scores(axes, score.label, wanted, found)
            seen.update({name: found[name] for name in wanted})
            spent[0] += time.perf_counter() - begin
            return found

        start = time.perf_counter()
        given = GetScores(scores, scorer.unit, scorer.cumulative)
        made = select.made.select(context, given, self.budget)
        whole = time.perf_counter() - start
        plan = check_selected(axes, select.label, made, self.budget)
        self.note(score, own, spent[0], of_scores(seen, axes))
        effect = of_plan(
            axes,
            plan,
            self.budget.counted,
            seen,
            unit=scorer.unit,
            cumulative=scorer.cumulative,
        )
        self.note(select, context, whole - spent[0], effect)
        return plan

    def gathered(self, passes: Passes, calibration: Recipe | Windows | Stored | None) -> Driven:
        """Returns the calibration data that passes need.

        Raises:
            SurgeonError: `bad-option` where there is none, `missing-file` without weights,
                `plan-mismatch` for statistics of another model.
        """
        from surgeon.calibrate.data import Recipe, Windows
        from surgeon.calibrate.gathered import Gathered
        from surgeon.calibrate.stored import Stored

        needy = next(p for p in passes.every if p.looks)
        if self.origin.tensors is None:
            raise no_weights(self.origin.id)
        if isinstance(calibration, Stored):
            options = {"statistics": str(calibration.path)}
            effect = {"data": calibration.about.get("data", {})}
            self.results.append(PassResult("calibration", "", options, 0.0, effect))
            return calibration.check(self.origin.fingerprint())
        start = time.perf_counter()
        if isinstance(calibration, Windows):
            windows, seed = calibration, None
        else:
            recipe = calibration or Recipe(())
            windows = windows_of(self.origin, recipe, needy.label, self.notes)
            seed = recipe.seed
        samples, length = windows.ids.shape
        options = {"samples": samples, "length": length, "seed": seed}
        effect = {"data": {name: list(found) for name, found in windows.origin.items()}}
        seconds = time.perf_counter() - start
        said = tuple(self.notes)
        self.results.append(PassResult("calibration", "", options, seconds, effect, said))
        return Gathered(self.origin.axes, self.origin.read, windows, notes=self.notes)


def windows_of(origin: Model, recipe: Recipe, by: str, notes: list[str]) -> Windows:
    """Returns the windows of a model's calibration data.

    Args:
        origin: the model.
        recipe: which windows; without a source, those of the text of last resort.
        by: what needs them.
        notes: gets a warning about the text of last resort.

    Raises:
        SurgeonError: `bad-option` where nothing was given and there is no tokenizer to read the
            text of last resort with; why a source can't be read.
    """
    from surgeon.calibrate.data import draw

    source = origin.source
    tokenizer = source.load_tokenizer() if source else None
    if not recipe.pieces and tokenizer is None:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{by} needs calibration data",
            at="--calibration",
            why="it looks at what the model computes on a text; none was given, and there is no "
            "tokenizer for the text of last resort",
            try_="--calibration FILE: token ids in a .npy file, or a text for a model with a "
            "tokenizer",
        )
    vocab = int(source.config.vocab_size) if source else None
    return draw(recipe, tokenizer, vocab=vocab, notes=notes)
