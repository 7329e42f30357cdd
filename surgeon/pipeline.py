"""Drives passes: from a source to a plan, from a plan to a smaller model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.axes.budget import (
    Budget,
    Measure,
    allowed,
    allowed_params,
    check_ratio,
    decoder_params,
)
from surgeon.axes.plan import Plan, check
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Program
from surgeon.ir.verify import verify as verify_program
from surgeon.opening import Model, open_model, opening_origin
from surgeon.planning import Passes, planned
from surgeon.pruned import Pruned, Report, report_of, versions
from surgeon.recipes import DEFAULT_RECIPE, load_recipe

if TYPE_CHECKING:
    from surgeon.calibrate.data import Recipe as CalibrationData
    from surgeon.calibrate.stored import Stored
    from surgeon.emit.lowbit.scheme import Scheme
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
    rounds: str | Path | None = None,
    quantize: str | Mapping[str, Any] | Scheme | None = None,
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
        target: `transformers`, or a graph target (`pt2`, `onnx`), which can express any plan.
        rounds: folder where finished rounds of a recipe's schedule are kept, from which a run after
            an interruption goes on.
        quantize: how `save` stores the weights: `int8`, `w8`, `int4`, or the keys of a recipe's
            section of that name.

    Raises:
        SurgeonError: with the reason, before anything is written.
    """
    opening = {
        "example_inputs": example_inputs,
        "dynamic_shapes": dynamic_shapes,
        "trust_remote_code": trust_remote_code,
    }
    from surgeon.emit.lowbit.scheme import scheme_of

    scheme = scheme_of(quantize)
    if plan is not None:
        to = target or "transformers"
        found = _replayed(source, opening, plan, rewrites, to, verify, scheme)
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
        target=target,
        seed=seed,
        model=str(source) if isinstance(source, str | Path) else None,
        quantize={} if scheme is None else scheme.to_data(),
    )
    settled = changes.applied(load_recipe(DEFAULT_RECIPE if recipe is None else recipe))
    folder = None if rounds is None else Path(rounds)
    return run(source, settled, opening, calibration=calibration, rounds=folder, verify=verify)


def run(
    source: Any,
    recipe: Recipe,
    opening: Mapping[str, Any],
    *,
    calibration: CalibrationData | None = None,
    rounds: Path | None = None,
    verify: bool = True,
) -> Pruned:
    """Returns the smaller model that a recipe makes of a source; see `prune`.

    Args:
        source: what `open_model` takes.
        recipe: all that there is to say.
        opening: options of `open_model`.
        calibration: data that no recipe can name, such as token ids, in place of its sources.
        rounds: folder where finished rounds of a schedule are kept, and found by a run after.
        verify: compare with the masked reference now.
    """
    from surgeon.emit.lowbit.scheme import scheme_of

    passes = Passes.of(recipe.passes)
    _check_asked(recipe, passes)
    scheme = scheme_of(recipe.quantize.model_dump() if recipe.quantize else None)
    _check_scheme(scheme, recipe.target, source)
    stored = None if calibration is not None else _stored_of(recipe)
    origin = _opened(source, opening)
    start = time.perf_counter()
    budget = budget_of(origin, recipe)
    spelled = _spelled(recipe, passes).to_data()
    data = calibration or _data_of(recipe)

    def result(plan: Plan, tensors: Mapping[str, Any], entries: Any, notes: Any) -> Pruned:
        seconds = {"capture": origin.seconds, "plan": time.perf_counter() - start}
        made = _result(origin, plan, tensors, recipe.target)
        report = report_of(origin, made.plan, entries, notes, recipe.budget.ratio, seconds)
        return replace(made, report=replace(report, as_recipe=spelled), quantize=scheme)

    if recipe.schedule is not None:
        from surgeon.iterating import Keep, State, iterate

        def of_state(state: State) -> Pruned:
            return result(state.plan, state.rewrites, state.entries, state.notes)

        keep = None if rounds is None else Keep(rounds, of_state, spelled, origin.fingerprint())
        state = iterate(origin, recipe, passes, budget, calibration=data, keep=keep)
        return _finished(of_state(state), verify)
    made = planned(origin, passes, budget, calibration=stored or data, seed=recipe.seed)
    entries = [found.to_json() for found in made.results]
    return _finished(result(made.plan, made.rewrites, entries, made.notes), verify)


def _replayed(
    source: Any,
    opening: Mapping[str, Any],
    plan: Plan,
    rewrites: Mapping[str, Any] | None,
    target: str,
    verify: bool,
    scheme: Scheme | None,
) -> Pruned:
    """Returns what a plan makes of a source."""
    _check_scheme(scheme, target, source)
    origin = _opened(source, opening)
    multiples_of(origin, target)  # refuses a target that there isn't
    start = time.perf_counter()
    entries = [{"pass": "replay", "options": {"source": dict(plan.source)}}]
    result = _result(origin, plan, rewrites or {}, target)
    seconds = {"capture": origin.seconds, "plan": time.perf_counter() - start}
    report = report_of(origin, result.plan, entries, (), None, seconds)
    return _finished(replace(result, report=report), verify)


def _check_scheme(scheme: Scheme | None, target: str, source: Any) -> None:
    """Refuses a quantisation that can't be written, before any work is done."""
    if scheme is not None:
        from surgeon.packing import check_scheme

        check_scheme(scheme, target, source if isinstance(source, str) else type(source).__name__)


def _check_asked(recipe: Recipe, passes: Passes) -> None:
    """Refuses a recipe that doesn't say how much is to go, or says it of nothing."""
    budget = recipe.budget
    if passes.select is None:
        _check_whole(recipe, passes)
        return
    if budget.ratio is None and not budget.roles:
        raise SurgeonError(
            Code.BAD_RATIO,
            "nothing says how much to remove",
            at="--ratio, --role",
            why="neither a ratio nor a role was given",
            try_="--ratio 0.2, or --role ffn=0.25",
        )
    if budget.ratio is not None:
        check_ratio(budget.ratio, "--ratio")
    for role, share in budget.roles.items():
        check_ratio(share, f"--role {role}")


def _check_whole(recipe: Recipe, passes: Passes) -> None:
    """Refuses, where nothing is removed, what says how much is to be, and passes without effect."""
    budget = recipe.budget
    said = {
        "--ratio": budget.ratio is not None,
        "--role": bool(budget.roles),
        "--limit": bool(budget.limits),
        "--multiple-of": bool(budget.multiple_of),
        "--measure": budget.measure != "parameters",
        "--latency": budget.latency is not None,
        "--tensor-parallel": budget.tensor_parallel != 1,
        "schedule": recipe.schedule is not None,
    }
    names = ", ".join(p.label for p in passes.every)
    for option, given in said.items():
        if given:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{option} would not be looked at",
                at=option,
                why=f"no pass of this recipe removes anything: it has {names}",
                try_="a score and a selection; or the option of a pass: see 'surgeon passes'",
            )
    if not passes.then:
        raise SurgeonError(
            Code.BAD_OPTION,
            "this recipe leaves the model as it was",
            at=names,
            why="nothing is removed, and every pass is exact: the model computes what it did",
            try_="a score and a selection, or a transform after these",
        )


def _opened(source: Any, opening: Mapping[str, Any]) -> Model:
    origin = open_model(source, **opening)
    if origin.source is not None and origin.source.weights is not None:
        origin.source.weights.check(origin.program.params)
    return origin


def budget_of(origin: Model, recipe: Recipe) -> Budget:
    """Returns what a recipe's budget means for a model.

    Raises:
        SurgeonError: `no-such-axis` for a glob that matches nothing; for a table of timings that
            can't be read.
    """
    asked = recipe.budget
    multiples = multiples_of(origin, recipe.target)
    axes, branches = allowed(origin.axes, asked.freeze, asked.only)
    counted = decoder_params(origin.axes)
    clock = None
    if asked.latency is not None:
        from surgeon.axes.clock import Table

        if asked.measure != "latency":
            raise SurgeonError(
                Code.BAD_OPTION,
                "the table of timings would not be looked at",
                at=f"--latency {asked.latency}",
                why=f"the ratio is a share of the {asked.measure}",
                try_="--measure latency, or leave the table out",
            )
        clock = Table.read(asked.latency).clock
    wanted = dict(multiples())
    for name, multiple in asked.multiple_of.items():
        wanted[name] = lcm(multiple, wanted.get(name, 1))
    return Budget(
        ratio=asked.ratio,
        roles=dict(asked.roles),
        counted=counted,
        axes=axes,
        branches=branches,
        params=allowed_params(origin.program, asked.freeze, asked.only),
        multiple_of=wanted,
        measure=asked.measure,
        limits=dict(asked.limits),
        tensor_parallel=asked.tensor_parallel,
        clock=clock,
    )


def _stored_of(recipe: Recipe) -> Stored | None:
    """Returns the statistics that a recipe names in place of data, or None."""
    if recipe.calibration.statistics is None:
        return None
    if recipe.schedule is not None:
        raise SurgeonError(
            Code.BAD_OPTION,
            "a schedule can't be run on saved statistics",
            at="calibration.statistics",
            why="every round looks at what the one before it left, and they are of the whole model",
            try_="--calibration FILE with a text, or leave the schedule out",
        )
    from surgeon.calibrate.stored import load

    return load(recipe.calibration.statistics)


def _data_of(recipe: Recipe) -> CalibrationData:
    """Returns the data that a recipe names; without a source, the text of last resort."""
    asked = recipe.calibration
    from surgeon.calibrate.data import Piece
    from surgeon.calibrate.data import Recipe as Data

    pieces = tuple(Piece(piece.source, piece.weight) for piece in asked.sources)
    seed = recipe.seed if asked.seed is None else asked.seed
    return Data(pieces, asked.samples, asked.length, seed)


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
    if origin.tensors is not None:
        plan = replace(plan, source=(("fingerprint", origin.fingerprint()), ("id", origin.id)))
    return Pruned(origin, plan, _NO_REPORT, dict(rewrites), target)


_NO_REPORT = Report({}, (), {}, {}, (), (), {}, {})


def _finished(result: Pruned, verify: bool) -> Pruned:
    verify_program(result.program)
    if verify and result.origin.tensors is not None and result.changed:
        found = result.verify()
        result = replace(result, report=replace(result.report, verification=found.to_json()))
    return result


def multiples_of(origin: Model, target: str) -> Callable[[], Mapping[str, int]]:
    """Returns what tells, when asked, which multiples a target wants; refuses an unknown one."""
    if target != "transformers":
        from surgeon.emit.target import get_target

        found = get_target(target)
        return lambda: found.multiple_of(origin.axes)
    source = origin.source
    if source is None:
        return dict[str, int]
    from surgeon.emit.huggingface import multiple_of

    return lambda: multiple_of(origin.axes, source.config, source.model_class)


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
    folder: str | Path, *, source: Any = None, trust_remote_code: bool = False
) -> Verification:
    """Returns how a written checkpoint compares with the masked reference of its plan.

    Args:
        folder: what `Pruned.save` wrote.
        source: the model it was made from; by default the one that the plan names.
        trust_remote_code: run modelling code that comes with the source.

    Raises:
        SurgeonError: `verify-failed`, `plan-mismatch`, or why one of both can't be read.
    """
    from surgeon.saving import read_plan, verify_folder, written_graph

    folder = Path(folder)
    plan, rewrites = read_plan(folder)
    origin = (
        _origin_of(plan, trust_remote_code)
        if source is None
        else open_model(source, trust_remote_code=trust_remote_code)
    )
    graph = written_graph(folder)
    target = graph.name if graph else "transformers"
    again = prune(origin, plan=plan, rewrites=rewrites, verify=False, target=target)
    if graph:
        return graph.verify(again)
    tokenizer = origin.source.load_tokenizer() if origin.source else None
    return verify_folder(again, folder, tokenizer, trust_remote_code=trust_remote_code)


def _origin_of(plan: Plan, trust_remote_code: bool) -> Model:
    """Returns the model that a plan names, which may have been written from another folder."""
    name = dict(plan.source).get("id", "")
    with opening_origin(name, "the plan was made from", name or "the plan's source"):
        return open_model(name, trust_remote_code=trust_remote_code)
