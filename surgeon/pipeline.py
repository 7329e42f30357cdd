"""Drives passes: from a source to a plan, from a plan to a smaller model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.asking import (
    budget_of,
    check_asked,
    check_expressible,
    check_memory,
    data_of,
    multiples_of,
    stored_of,
)
from surgeon.axes.budget import Measure
from surgeon.axes.factors import check_halves
from surgeon.axes.plan import Plan, Selection, check
from surgeon.emit.target import TRANSFORMERS, check_targets, names_of
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Program
from surgeon.ir.verify import verify as verify_program
from surgeon.memory import Memory
from surgeon.opening import Model, for_plan, open_model, opening_origin, with_heads_apart
from surgeon.planning import Passes, planned
from surgeon.pruned import Pruned, Report, report_of, versions
from surgeon.recipes import DEFAULT_RECIPE, load_recipe
from surgeon.trimming import ALONE, only_vocabulary, trimmed, trimming_of

if TYPE_CHECKING:
    from surgeon.calibrate.data import Recipe as CalibrationData
    from surgeon.emit.lowbit.scheme import Scheme
    from surgeon.judging import Hooks
    from surgeon.recipes.schema import Recipe
    from surgeon.report.verify import Verification

__all__ = [
    "Model",
    "Pruned",
    "Report",
    "capture",
    "open_model",
    "prune",
    "run",
    "verify",
    "versions",
]


def prune(
    source: Any,
    *,
    recipe: str | Path | Recipe | Mapping[str, Any] | None = None,
    ratio: float | None = None,
    roles: Mapping[str, float] | None = None,
    freeze: Iterable[str] | None = None,
    only: Iterable[str] | None = None,
    measure: Measure | None = None,
    latency: str | Path | None = None,
    limits: Mapping[str, float] | None = None,
    multiple_of: Mapping[str, int] | None = None,
    tensor_parallel: int | None = None,
    transform: Sequence[str] | None = None,
    score: str | None = None,
    select: str | None = None,
    compensate: Sequence[str] | None = None,
    then: Sequence[str] | None = None,
    transform_options: Mapping[str, Any] | None = None,
    score_options: Mapping[str, Any] | None = None,
    select_options: Mapping[str, Any] | None = None,
    compensate_options: Mapping[str, Any] | None = None,
    then_options: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
    calibration: CalibrationData | None = None,
    statistics: str | Path | None = None,
    plan: Plan | None = None,
    rewrites: Mapping[str, Any] | None = None,
    seed: int | None = None,
    verify: bool = True,
    example_inputs: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
    trust_remote_code: bool = False,
    target: str | None = None,
    schedule: Mapping[str, Any] | None = None,
    rounds: str | Path | None = None,
    hooks: Hooks | None = None,
    quantize: str | Mapping[str, Any] | Scheme | None = None,
    memory: str | int | Memory | None = None,
) -> Pruned:
    """Returns a smaller model; the source is not modified.

    What is named here holds in place of what the recipe says.

    Args:
        source: what `open_model` takes.
        recipe: one that ships, by name (`surgeon.recipes.shipped`), a YAML file, or what it holds;
            without it, `surgeon.recipes.DEFAULT_RECIPE`.
        ratio: share of the decoder-layer parameters to remove.
        roles: share of the indices to remove by role, such as `{"ffn": 0.25, "kv_heads": 1/3}`;
            `layers` drops whole layers. `ratio` then fills the remaining roles.
        freeze: globs over axes and module paths that stay whole.
        only: globs over axes and module paths; nothing else is pruned.
        measure: what the ratio is a share of, other than parameters: `flops`, `bytes`,
            `cache_bytes` or `latency`.
        latency: table of timings that `surgeon latency` wrote; the ratio is then a share of the
            time, whether or not `measure` says so.
        limits: by role, or glob over axis names, the largest share of an axis that may go.
        multiple_of: by role or axis name, what kept counts are multiples of.
        tensor_parallel: devices that heads and inner widths are dealt out to.
        transform: passes that change weights before anything is scored, in this order.
        score: a score pass.
        select: a selection pass.
        compensate: compensation passes, in this order; none of them if it is empty.
        then: transforms that change the weights after all that, in this order.
        transform_options: those of the transforms, the same for all.
        score_options: the score pass's options; beside the recipe's if no pass is named.
        select_options: the selection pass's options, likewise.
        compensate_options: those of the compensation passes, the same for all.
        then_options: those of the transforms that stand last, the same for all.
        vocabulary: which tokens stay, as a recipe says it: `corpus`, and if wanted `keep` or
            `coverage`, and `always`. With this alone, nothing else goes.
        calibration: the data for passes that look at what the model computes; without it the
            recipe's, or else a text that every machine has, with a warning.
        statistics: a file that `surgeon calibrate` wrote, in place of data.
        plan: replay this plan instead of making one.
        rewrites: full-size tensors that belong to a replayed plan.
        seed: for passes that draw at random.
        verify: compare with the masked reference now, where there are weights; `save` compares
            what it wrote in any case.
        example_inputs: for a module that is not of Transformers.
        dynamic_shapes: the same.
        trust_remote_code: run modelling code that comes with a checkpoint.
        target: `transformers`, `vllm` or `gguf`, or a graph target (`pt2`, `onnx`), which can
            express any plan; several with commas between them, whose rules then all hold.
        schedule: keys of a recipe's schedule: `rounds`, `shape`, `stop_if_worse_than`.
        rounds: folder where finished rounds of a recipe's schedule are kept, from which a run after
            an interruption goes on.
        hooks: training and evaluation of the caller's own in each round; see `prune_iteratively`.
        quantize: how `save` stores the weights: `int8`, `w8`, `int4`, or the keys of a recipe's
            section of that name.
        memory: the most that the process may hold, such as `2GB`; half of what is free beside what
            it holds, without it. Tensors are read, scored, sliced and written in blocks of rows.
            What can't be done in so little is refused with the number that is needed.

    Raises:
        SurgeonError: with the reason, before anything is written.
    """
    opening = {
        "example_inputs": example_inputs,
        "dynamic_shapes": dynamic_shapes,
        "trust_remote_code": trust_remote_code,
    }
    from surgeon.emit.lowbit.scheme import scheme_of

    scheme, allowed = scheme_of(quantize), Memory.of(memory)
    if plan is not None:
        to = target or "transformers"
        found = _replayed(source, opening, plan, rewrites, to, verify, scheme, allowed)
        return replace(found, quantize=scheme)
    from surgeon.recipes.changes import Changes, Named, calibration_of, two_sources

    if calibration is not None and statistics is not None:
        raise two_sources()

    def named(names: Sequence[str] | str | None, options: Mapping[str, Any] | None) -> Named:
        several = (names,) if isinstance(names, str) else names
        return Named(None if several is None else tuple(several), options or {})

    budget = {
        "ratio": ratio,
        "roles": roles,
        "freeze": freeze,
        "only": only,
        "measure": "latency" if latency is not None and measure is None else measure,
        "latency": None if latency is None else str(latency),
        "limits": limits,
        "multiple_of": multiple_of,
        "tensor_parallel": tensor_parallel,
    }
    changes = Changes(
        budget=budget,
        calibration={
            **calibration_of(calibration),
            **({} if statistics is None else {"statistics": str(statistics)}),
        },
        passes={
            "transform": named(transform, transform_options),
            "score": named(score, score_options),
            "select": named(select, select_options),
            "compensate": named(compensate, compensate_options),
            "then": named(then, then_options),
        },
        schedule=schedule or {},
        target=target,
        seed=seed,
        model=str(source) if isinstance(source, str | Path) else None,
        vocabulary=vocabulary or {},
        quantize={} if scheme is None else scheme.to_data(),
    )
    settled = changes.applied(load_recipe(DEFAULT_RECIPE if recipe is None else recipe))
    folder = None if rounds is None else Path(rounds)
    return run(
        source,
        settled,
        opening,
        calibration=calibration,
        rounds=folder,
        verify=verify,
        hooks=hooks,
        memory=allowed,
    )


def run(
    source: Any,
    recipe: Recipe,
    opening: Mapping[str, Any],
    *,
    calibration: CalibrationData | None = None,
    rounds: Path | None = None,
    verify: bool = True,
    hooks: Hooks | None = None,
    memory: Memory | None = None,
) -> Pruned:
    """Returns the smaller model that a recipe makes of a source; see `prune`.

    Args:
        source: what `open_model` takes.
        recipe: all that there is to say.
        opening: options of `open_model`.
        calibration: data that no recipe can name, such as token ids, in place of its sources.
        rounds: folder where finished rounds of a schedule are kept, and found by a run after.
        verify: compare with the masked reference now.
        hooks: what the caller does in each round of a schedule.
        memory: how much of it the process may take; by default a share of what is free.
    """
    from surgeon.emit.lowbit.scheme import scheme_of

    passes = Passes.of(recipe.passes)
    check_asked(recipe, passes)
    scheme = scheme_of(recipe.quantize.model_dump() if recipe.quantize else None)
    _check_scheme(scheme, recipe.target, source)
    stored = None if calibration is not None else stored_of(recipe)
    origin = _opened(source, opening)
    if passes.groups:
        origin = with_heads_apart(origin)
    check_expressible(origin, recipe, passes)
    allowed = memory or Memory.of(None)
    check_memory(origin, recipe, passes, allowed)
    start = time.perf_counter()
    budget = budget_of(origin, recipe)
    spelled = _spelled(recipe, passes).to_data()
    data = calibration or data_of(recipe)
    trimming = trimming_of(origin, recipe, budget)

    def result(plan: Plan, tensors: Mapping[str, Any], entries: Any, notes: Any) -> Pruned:
        seconds = {"capture": origin.seconds, "plan": time.perf_counter() - start}
        made = _result(origin, plan, tensors, recipe.target)
        report = report_of(origin, made.plan, entries, notes, recipe.budget.ratio, seconds)
        told = replace(report, as_recipe=spelled, sparsity=made.sparsity())
        return replace(made, report=told, quantize=scheme, memory=allowed)

    if recipe.schedule is not None:
        from surgeon.iterating import Keep, State, iterate

        def of_state(state: State) -> Pruned:
            return result(state.plan, state.rewrites, state.entries, state.notes)

        keep = None if rounds is None else Keep(rounds, of_state, spelled, origin.fingerprint())
        if hooks is not None:
            hooks = replace(hooks, model=lambda state: of_state(state).model)
        state = iterate(origin, recipe, passes, budget, calibration=data, keep=keep, hooks=hooks)
        return _finished(trimmed(of_state(state), trimming), verify)
    if only_vocabulary(recipe):
        return _finished(trimmed(result(Plan(), {}, [], (ALONE,)), trimming), verify)
    made = planned(
        origin, passes, budget, calibration=stored or data, seed=recipe.seed, memory=allowed
    )
    entries = [found.to_json() for found in made.results]
    return _finished(
        trimmed(result(made.plan, made.rewrites, entries, made.notes), trimming), verify
    )


def _replayed(
    source: Any,
    opening: Mapping[str, Any],
    plan: Plan,
    rewrites: Mapping[str, Any] | None,
    target: str,
    verify: bool,
    scheme: Scheme | None,
    memory: Memory,
) -> Pruned:
    """Returns what a plan makes of a source."""
    _check_scheme(scheme, target, source)
    origin = for_plan(_opened(source, opening), plan)
    multiples_of(origin, target)  # refuses a target that there isn't
    start = time.perf_counter()
    entries = [{"pass": "replay", "options": {"source": dict(plan.source)}}]
    result = _result(origin, plan, rewrites or {}, target)
    seconds = {"capture": origin.seconds, "plan": time.perf_counter() - start}
    report = report_of(origin, result.plan, entries, (), None, seconds)
    report = replace(report, sparsity=result.sparsity())
    return _finished(replace(result, report=report, memory=memory), verify)


def _check_scheme(scheme: Scheme | None, target: str, source: Any) -> None:
    """Refuses a quantisation that can't be written, before any work is done."""
    if scheme is not None:
        from surgeon.packing import check_scheme

        check_scheme(scheme, target, source if isinstance(source, str) else type(source).__name__)


def _opened(source: Any, opening: Mapping[str, Any]) -> Model:
    origin = open_model(source, **opening)
    if origin.source is not None and origin.source.weights is not None:
        origin.source.weights.check(origin.program.params)
    return origin


def _spelled(recipe: Recipe, passes: Passes) -> Recipe:
    """Returns a recipe with every option of its passes, whatever their defaults will be."""
    from surgeon.effects import options_of
    from surgeon.recipes.changes import step

    steps = tuple(step(p.kind, p.name, options_of(p.made)) for p in passes.every)
    return recipe.model_copy(
        update={"passes": steps, "seed": recipe.seed, "target": recipe.target, "about": ""}
    )


def _result(origin: Model, plan: Plan, rewrites: Mapping[str, Any], target: str) -> Pruned:
    """Returns a plan with its model, still without a report."""
    check(origin.axes, plan)
    _same_source(origin, plan)
    check_halves(Selection(origin.axes, plan), rewrites)
    check_targets(names_of(target), origin.axes, plan, origin)
    if origin.tensors is not None:
        plan = replace(plan, source=(("fingerprint", origin.fingerprint()), ("id", origin.id)))
    return Pruned(origin, plan, _NO_REPORT, dict(rewrites), target)


_NO_REPORT = Report({}, (), {}, {}, (), (), {}, {})


def _finished(result: Pruned, verify: bool) -> Pruned:
    verify_program(result.program)
    if verify and result.origin.tensors is not None and result.changed:
        if not result.fits:
            return replace(
                result, report=replace(result.report, notes=(*result.report.notes, LATER))
            )
        found = result.verify()
        result = replace(result, report=replace(result.report, verification=found.to_json()))
    return result


LATER = (
    "the model is not compared as a whole, which takes more memory than is allowed: each layer is, "
    "when it is saved"
)
"""What is said where the comparison waits for the files."""


def _same_source(origin: Model, plan: Plan) -> None:
    """Refuses a plan whose scores come from other weights, although its sizes may fit."""
    made_for = dict(plan.source).get("fingerprint")
    if made_for and origin.fingerprint() != made_for:
        raise SurgeonError(
            Code.PLAN_MISMATCH,
            "this is not the model that the plan was made for",
            at=origin.id,
            why="the tensors have another fingerprint than the plan records for "
            + dict(plan.source).get("id", "its model"),
            try_="name the right model; or empty the plan's `source` to cut another one the same",
            data={"expected": made_for, "found": origin.fingerprint()},
        )


def capture(source: Any, **options: Any) -> Program:
    """Returns the program of a source; `options` are those of `open_model`."""
    return open_model(source, **options).program


def verify(
    folder: str | Path,
    *,
    source: Any = None,
    trust_remote_code: bool = False,
    by_layer: bool = False,
    memory: str | int | Memory | None = None,
) -> Verification:
    """Returns how a written checkpoint compares with the masked reference of its plan.

    Args:
        folder: what `Pruned.save` wrote.
        source: the model it was made from; by default the one that the plan names.
        trust_remote_code: run modelling code that comes with the source.
        by_layer: run no model as a whole: compare each layer by itself, on random activations. So
            it is done without being asked where both models don't fit in `memory`.
        memory: the most that the process may hold, as for `prune`.

    Raises:
        SurgeonError: `verify-failed`, `plan-mismatch`, or why one of both can't be read.
    """
    from surgeon.report.verify import together
    from surgeon.saving import read_plan, verify_written, written

    folder = Path(folder)
    plan, rewrites = read_plan(folder)
    origin = (
        _origin_of(plan, trust_remote_code)
        if source is None
        else open_model(source, trust_remote_code=trust_remote_code)
    )
    places = written(folder)
    target = ",".join(places)
    again = prune(origin, plan=plan, rewrites=rewrites, verify=False, target=target, memory=memory)

    def compared(name: str, place: Path) -> Verification:
        if name == TRANSFORMERS and (by_layer or not again.fits):
            from surgeon.spotting import verify_layers

            return verify_layers(again, place, trust_remote_code=trust_remote_code)
        return verify_written(again, name, place, trust_remote_code=trust_remote_code)

    return together(compared(name, place) for name, place in places.items())


def _origin_of(plan: Plan, trust_remote_code: bool) -> Model:
    """Returns the model that a plan names, which may have been written from another folder."""
    name = dict(plan.source).get("id", "")
    with opening_origin(name, "the plan was made from", name or "the plan's source"):
        return open_model(name, trust_remote_code=trust_remote_code)
