"""A pruned model is trained further, and pruning and training take turns, from Python."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgeon.conditions import check_tensors
from surgeon.effects import PassResult, of_tensors, options_of
from surgeon.errors import Code, SurgeonError
from surgeon.judging import Hooks
from surgeon.opening import open_model, opening_origin
from surgeon.pipeline import prune
from surgeon.plugin import CompensatePass, Context
from surgeon.pruned import Pruned, report_of
from surgeon.recovering import PASS, Ground
from surgeon.registry import build

if TYPE_CHECKING:
    from surgeon.calibrate.data import Recipe as CalibrationData


def recover(
    pruned: Pruned | str | Path,
    *,
    source: Any = None,
    calibration: CalibrationData | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    **options: Any,
) -> Pruned:
    """Returns a pruned model whose weights are trained further; what is removed stays removed.

    Args:
        pruned: what `prune` returned, or the folder that it wrote.
        source: the model that a folder was made from; by default the one that its plan names.
        calibration: the text to train on that no option can name, such as token ids. By default
            that of option `data`, or else what the prune was calibrated on.
        verify: compare with the masked reference now; `save` compares what it wrote in any case.
        trust_remote_code: run modelling code that comes with the source.
        options: those of pass `recover` (`surgeon passes recover`), such as `steps=300`.

    Raises:
        SurgeonError: `bad-option`, `missing-extra`, `plan-mismatch`, or why a file can't be read.
    """
    training = build("compensate", PASS, options)
    assert isinstance(training, CompensatePass)
    before = pruned if isinstance(pruned, Pruned) else _read(pruned, source, trust_remote_code)
    if before.plan.factors:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{before.plan.factors[0][0]} can't be trained",
            at=before.plan.factors[0][0],
            why="it is a product of two maps, whose plan holds both and not the map",
            try_="train first: compensate recover, then transform low_rank, in one recipe",
        )
    origin, report, start = before.origin, before.report, time.perf_counter()
    notes: list[str] = []
    train = Ground(origin).training(
        before.rewrites,
        calibration=calibration or _data_of(report.as_recipe),
        basis=_basis(before),
        notes=notes,
    )
    context = Context(origin.axes, before.full, notes=notes, training=train)
    plan = replace(before.plan, rewrites=())
    label = f"compensate/{PASS}"
    made = check_tensors(origin.axes, label, training.compensate(context, plan))
    seconds = time.perf_counter() - start
    effect = {**of_tensors(made, origin.axes, plan), **context.facts}
    result = PassResult("compensate", PASS, options_of(training), seconds, effect, tuple(notes))
    after = replace(
        before,
        rewrites={**before.rewrites, **made},
        report=report_of(
            origin,
            before.plan,
            [*report.recipe, result.to_json()],
            [*report.notes, *notes],
            report.ratio.get("asked"),
            {**report.seconds, "recover": seconds},
        ),
    )
    if calibration is None:
        recipe = _longer(report.as_recipe, options_of(training))
        after = replace(after, report=replace(after.report, as_recipe=recipe))
    if verify:
        found = after.verify().to_json()
        after = replace(after, report=replace(after.report, verification=found))
    return after


def prune_iteratively(
    source: Any,
    *,
    rounds: int,
    train_fn: Callable[[Any, int], Any] | None = None,
    eval_fn: Callable[[Any], float] | None = None,
    shape: Literal["linear", "cubic"] | None = None,
    stop_if_worse_than: float | None = None,
    stop_above: float | None = None,
    folder: str | Path | None = None,
    **options: Any,
) -> Pruned:
    """Returns what rounds of pruning, training and evaluating come to.

    The rounds end when all that was asked for is gone, or when a model is worse than allowed: the
    result is then the last one that will do.

    Args:
        source: what `prune` takes.
        rounds: prunes, each of what the one before it left.
        train_fn: gets the smaller model (of Transformers where its class can express it, fp32) and
            the number of the round, from 1, and trains the model in place. Its tensors are then
            read back. The recipe's own compensations have run before.
        eval_fn: gets the smaller model as it would be loaded; the less it returns the better.
        shape: how what is gone grows: `linear`, or `cubic`, much at first and little at last.
        stop_if_worse_than: the largest that `eval_fn` may return, relative to what it returns of
            the dense model; without `eval_fn`, the same of the perplexity on windows held out.
        stop_above: the largest that `eval_fn` may return.
        folder: where finished rounds are kept, from which a run after an interruption goes on.
        options: those of `prune`, such as `ratio=0.3` and `recipe="width"`.

    Raises:
        SurgeonError: `bad-option` where thresholds contradict each other; `bad-ratio` where the
            first round is already worse than allowed; what `prune` refuses.
    """

    def refused(what: str, at: str, why: str, try_: str) -> SurgeonError:
        return SurgeonError(Code.BAD_OPTION, what, at=at, why=why, try_=try_)

    if stop_above is not None and stop_if_worse_than is not None:
        raise refused(
            "there are two thresholds",
            "stop_above with stop_if_worse_than",
            "one is absolute, the other relative to the dense model",
            "leave one of them out",
        )
    if stop_above is not None and eval_fn is None:
        raise refused(
            "nothing is held against the threshold",
            "stop_above",
            "it is what eval_fn may return at most, and there is none",
            "eval_fn, or stop_if_worse_than, which watches perplexity",
        )
    if eval_fn is not None and stop_above is None and stop_if_worse_than is None:
        raise refused(
            "nothing says when an evaluation is too bad",
            "eval_fn",
            "there is no threshold",
            "stop_if_worse_than=1.2, relative to the dense model, or stop_above",
        )
    keys = {"rounds": rounds, "shape": shape, "stop_if_worse_than": stop_if_worse_than}
    hooks = Hooks(train_fn, eval_fn, stop_above)
    return prune(source, schedule=keys, rounds=folder, hooks=hooks, **options)


def _read(folder: str | Path, source: Any, trust_remote_code: bool) -> Pruned:
    """Returns what an earlier prune wrote, with its record."""
    from surgeon.saving import REPORT_FILE, read_plan, written

    path = Path(folder)
    plan, rewrites = read_plan(path)
    name = dict(plan.source).get("id", "")
    if source is None:
        with opening_origin(name, "the plan was made from", name or "the plan's source"):
            source = open_model(name, trust_remote_code=trust_remote_code)
    target = ",".join(written(path))
    found = prune(
        source,
        plan=plan,
        rewrites=rewrites,
        target=target,
        verify=False,
        trust_remote_code=trust_remote_code,
    )
    file = path / REPORT_FILE
    if not file.is_file():
        return found
    try:
        told = json.loads(file.read_text("utf-8"))
        report = replace(
            found.report,
            recipe=tuple(told["recipe"]),
            notes=tuple(told["notes"]),
            ratio=told["ratio"],
            as_recipe=told["as_recipe"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SurgeonError(
            Code.BAD_PLAN,
            "the report of the earlier run can't be read",
            at=str(file),
            why=f"{type(error).__name__}: {error}",
            try_="remove it: the plan beside it is enough",
        ) from error
    return replace(found, report=report)


def _basis(before: Pruned) -> str:
    """Returns why layers of the dense model may be told in another basis than what is left."""
    labels = [str(entry.get("pass", "")) for entry in before.report.recipe]
    if any(label.startswith("transform/") for label in labels):
        return "a transform of the earlier run may have changed the basis"
    if "replay" in labels and before.rewrites:
        return "nothing tells whether the replayed plan's tensors are in another basis"
    return ""


def _data_of(recipe: Mapping[str, Any]) -> CalibrationData | None:
    """Returns the text that an earlier run was calibrated on, where its recipe names one."""
    from surgeon.calibrate.data import Piece, Recipe

    sources = recipe.get("calibration", {}).get("sources", ())
    pieces = tuple(Piece(found["source"], float(found.get("weight", 1.0))) for found in sources)
    return Recipe(pieces) if pieces else None


def _longer(recipe: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a run's recipe with the training at its end; none where rounds can't say it."""
    if not recipe or recipe.get("schedule"):
        return {}
    kept = {name: value for name, value in options.items() if name != "checkpoints"}
    return {**recipe, "passes": [*recipe["passes"], {"compensate": PASS, **kept}]}
