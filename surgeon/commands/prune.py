"""`prune`, `run` and `recipe`: a smaller model, as options, a recipe or an earlier run say."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.commands import values
from surgeon.commands.arguments import (
    JsonOption,
    MeasureTextOption,
    MeasureWindowOption,
    MeasureWindowsOption,
    MemoryOption,
    ModelArg,
    QuantizeOption,
    QuantizeOptionOption,
    RemoteOption,
)
from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    from surgeon.memory import Memory
    from surgeon.packing import Measuring
    from surgeon.pruned import Pruned
    from surgeon.recipes.schema import Recipe

OutOption = Annotated[
    Path | None, typer.Option("-o", "--output", help="folder to write (new or empty)")
]
RatioOption = Annotated[
    str | None, typer.Option(help="share of decoder-layer parameters to remove, such as 0.2")
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(help="text, .jsonl, .npy of token ids or datasets:NAME; FILE=WEIGHT mixes"),
]
StatisticsOption = Annotated[
    Path | None, typer.Option(help="what 'surgeon calibrate' wrote, in place of calibration data")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace an earlier result")]
RoundsOption = Annotated[
    int | None, typer.Option(help="prune in so many rounds, each looking at the text anew")
]
WorseOption = Annotated[
    float | None,
    typer.Option(help="stop the rounds at a perplexity so many times the dense model's"),
]
DryOption = Annotated[bool, typer.Option("--dry-run", help="plan only, write nothing")]
NoVerifyOption = Annotated[
    bool, typer.Option("--no-verify", help="skip the comparison with the masked model")
]

ReplaysAlone = (
    *("recipe", "ratio", "role", "freeze", "only", "seed"),
    *("measure", "latency", "limit", "multiple_of", "tensor_parallel"),
    *("transform", "transform_option", "score", "score_option", "select", "select_option"),
    *(
        "compensate",
        "compensate_option",
        "then",
        "then_option",
        "calibration",
        "samples",
        "length",
        "statistics",
    ),
    *("trim_vocab", "vocab_keep", "vocab_coverage", "vocab_always"),
    *("rounds", "stop_if_worse_than"),
)
"""Options of `prune` that would make another plan than the one that is replayed."""


def _only_replays(context: typer.Context) -> None:
    """Refuses options that would make another plan than the one that is replayed."""
    for name in ReplaysAlone:
        source = context.get_parameter_source(name)
        if source is not None and not source.name.startswith("DEFAULT"):
            option = "--" + name.replace("_", "-")
            raise SurgeonError(
                Code.BAD_OPTION,
                "--plan replays a plan as it is",
                at=f"--plan with {option}",
                why=f"{option} would make another one",
                try_=f"leave {option} out",
            )


def _need_out(out: Path | None, dry_run: bool, overwrite: bool) -> None:
    """Refuses, before any work, an output that can't be written."""
    if dry_run:
        return
    if out is None:
        raise SurgeonError(
            Code.BAD_OUTPUT,
            "no output folder is given",
            at="-o",
            why="the smaller model has to go somewhere",
            try_="-o FOLDER, or --dry-run to see the plan",
        )
    from surgeon.calibrate.parallel import rank
    from surgeon.emit.files import check_output

    if rank() == 0:  # which may have written when the others come here
        check_output(out, overwrite=overwrite)


def _done(
    result: Pruned,
    out: Path | None,
    *,
    overwrite: bool,
    verify: bool,
    as_json: bool,
    scoring: Measuring | None,
) -> None:
    """Writes a result, or nothing where there is no place for it, and shows what it is."""
    from surgeon.calibrate.parallel import rank
    from surgeon.commands.printing import print_report

    if out is None:
        report = result.report
        if "transformers" in result.targets and not result.is_graph:
            report = replace(report, notes=(*report.notes, *result.emission.notes))
    else:
        report = result.save(out, overwrite=overwrite, verify=verify, measure=scoring)
    if rank() != 0:
        return  # of the processes that a launcher started, the first one has written, and tells
    if out is not None and result.report.as_recipe.get("schedule") and _rounds(out).is_dir():
        shutil.rmtree(_rounds(out))
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        print_report(report, out)


def _chosen(names: list[str] | None) -> tuple[str, ...] | None:
    """Returns the passes that options name; `none` takes away those of the recipe."""
    if names is None:
        return None
    return () if names == ["none"] else tuple(names)


def prune(
    context: typer.Context,
    model: ModelArg,
    out: OutOption = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="a recipe by name (see 'surgeon recipe') or a YAML file"),
    ] = None,
    ratio: RatioOption = None,
    role: Annotated[
        list[str] | None,
        typer.Option(help="share of a role's channels, such as ffn=0.25, kv_heads=1/3, layers=0.1"),
    ] = None,
    freeze: Annotated[
        list[str] | None, typer.Option(help="glob over axes and module paths that stay whole")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="glob over axes and module paths; nothing else goes")
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            help="what the ratio is a share of: parameters, flops, bytes, cache_bytes or latency"
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(metavar="TABLE", help="timings that surgeon latency wrote; the measure"),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="largest share that may go of a role or axis, such as ffn=0.5"),
    ] = None,
    multiple_of: Annotated[
        list[str] | None,
        typer.Option(help="what kept counts of a role or axis are multiples of, such as ffn=64"),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="devices that heads and inner widths are dealt out to")
    ] = None,
    transform: Annotated[
        list[str] | None, typer.Option(help="pass that changes weights first; several in order")
    ] = None,
    score: Annotated[str | None, typer.Option(help="score pass")] = None,
    select: Annotated[str | None, typer.Option(help="selection pass")] = None,
    compensate: Annotated[
        list[str] | None, typer.Option(help="compensation pass; several in order; none for none")
    ] = None,
    then: Annotated[
        list[str] | None, typer.Option(help="pass that changes weights last; several in order")
    ] = None,
    transform_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the transforms")
    ] = None,
    score_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the score pass")
    ] = None,
    select_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the selection pass")
    ] = None,
    compensate_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the compensation passes")
    ] = None,
    then_option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for the transforms that stand last")
    ] = None,
    trim_vocab: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="text whose tokens stay: the vocabulary loses the others"
        ),
    ] = None,
    vocab_keep: Annotated[
        int | None, typer.Option(help="the most tokens that may stay, the most frequent first")
    ] = None,
    vocab_coverage: Annotated[
        str | None, typer.Option(help="share of those texts whose tokens stay, such as 0.99")
    ] = None,
    vocab_always: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="text whose tokens stay in any case")
    ] = None,
    calibration: CalibrationOption = None,
    samples: Annotated[int | None, typer.Option(help="windows of calibration data")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in such a window")] = None,
    statistics: StatisticsOption = None,
    plan: Annotated[
        Path | None, typer.Option(help="replay a plan (plan.json or a pruned folder)")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            "--target",
            help="transformers, vllm, gguf, or pt2 or onnx, which can express any plan; "
            "several with commas",
        ),
    ] = None,
    rounds: RoundsOption = None,
    stop_if_worse_than: WorseOption = None,
    seed: Annotated[
        int | None, typer.Option(help="for passes that draw, and for calibration windows")
    ] = None,
    quantize: QuantizeOption = None,
    quantize_option: QuantizeOptionOption = None,
    measure_text: MeasureTextOption = None,
    measure_windows: MeasureWindowsOption = 8,
    measure_window: MeasureWindowOption = 1024,
    memory: MemoryOption = None,
    dry_run: DryOption = False,
    overwrite: OverwriteOption = False,
    no_verify: NoVerifyOption = False,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Write a smaller checkpoint that Transformers loads.

    Options hold in place of what the recipe says.
    """
    from surgeon import pipeline
    from surgeon.memory import Memory

    allowed = Memory.of(memory)
    opening = {"trust_remote_code": trust_remote_code}
    asked = values.quantize_keys(quantize, quantize_option)
    scoring = values.measuring(measure_text, measure_windows, measure_window)
    if plan is not None:
        _only_replays(context)
        from surgeon.saving import read_plan

        replayed, rewrites = read_plan(plan)
        _need_out(out, dry_run, overwrite)
        result = pipeline.prune(
            model,
            plan=replayed,
            rewrites=rewrites,
            target=to,
            verify=False,
            trust_remote_code=trust_remote_code,
            quantize=asked or None,
            memory=allowed,
        )
    else:
        from surgeon.axes.budget import MEASURES
        from surgeon.recipes import DEFAULT_RECIPE, load_recipe
        from surgeon.recipes.changes import Changes, Named

        changes = Changes(
            budget={
                "ratio": None if ratio is None else values.number(ratio, "--ratio"),
                "roles": values.numbers(role, "--role"),
                "freeze": freeze,
                "only": only,
                "measure": values.one_of(
                    "latency" if latency and measure is None else measure, MEASURES, "--measure"
                ),
                "latency": latency,
                "limits": values.numbers(limit, "--limit"),
                "multiple_of": values.whole_numbers(multiple_of, "--multiple-of"),
                "tensor_parallel": tensor_parallel,
            },
            calibration=values.calibration_keys(calibration, samples, length, statistics),
            passes={
                kind: Named(names, values.options(given or [], f"--{kind}-option"))
                for kind, names, given in (
                    ("transform", _chosen(transform), transform_option),
                    ("score", None if score is None else (score,), score_option),
                    ("select", None if select is None else (select,), select_option),
                    ("compensate", _chosen(compensate), compensate_option),
                    ("then", _chosen(then), then_option),
                )
            },
            schedule={"rounds": rounds, "stop_if_worse_than": stop_if_worse_than},
            target=to,
            seed=seed,
            model=model,
            vocabulary={
                "corpus": trim_vocab,
                "keep": vocab_keep,
                "coverage": None
                if vocab_coverage is None
                else values.number(vocab_coverage, "--vocab-coverage"),
                "always": vocab_always,
            },
            quantize=asked,
        )
        settled = changes.applied(load_recipe(recipe or DEFAULT_RECIPE))
        _check_scoring(settled, scoring, dry_run)
        result = _made(settled, model, out, opening, dry_run, overwrite, allowed)
    to_write = None if dry_run else out
    _done(
        result,
        to_write,
        overwrite=overwrite,
        verify=not no_verify,
        as_json=as_json,
        scoring=scoring,
    )


def _check_scoring(recipe: Recipe, scoring: Measuring | None, dry_run: bool) -> None:
    """Refuses, before any work, a text that nothing would be scored on."""
    if scoring is not None and (dry_run or recipe.quantize is None):
        from surgeon.packing import no_steps

        raise no_steps(scoring, "nothing is written" if dry_run else "nothing is quantised")


def _made(
    recipe: Recipe,
    model: str,
    out: Path | None,
    opening: dict[str, Any],
    dry_run: bool,
    overwrite: bool,
    memory: Memory,
) -> Pruned:
    """Returns what a recipe makes of a model, once it is known that it can be written."""
    from surgeon import pipeline

    _need_out(out, dry_run, overwrite)
    # Saving compares what was written.
    rounds = None if dry_run or out is None else _rounds(out)
    return pipeline.run(model, recipe, opening, rounds=rounds, verify=False, memory=memory)


def _rounds(out: Path) -> Path:
    """Returns the folder where finished rounds lie until the result is written."""
    return out.with_name(out.name + ".rounds")


def run(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="a YAML file, or the name of one that ships")
    ],
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="as for prune; by default the recipe's"),
    ] = None,
    out: OutOption = None,
    ratio: RatioOption = None,
    calibration: CalibrationOption = None,
    statistics: StatisticsOption = None,
    quantize: QuantizeOption = None,
    quantize_option: QuantizeOptionOption = None,
    measure_text: MeasureTextOption = None,
    measure_windows: MeasureWindowsOption = 8,
    measure_window: MeasureWindowOption = 1024,
    memory: MemoryOption = None,
    dry_run: DryOption = False,
    overwrite: OverwriteOption = False,
    no_verify: NoVerifyOption = False,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Write the smaller checkpoint that a recipe makes."""
    from surgeon.memory import Memory
    from surgeon.recipes import load_recipe
    from surgeon.recipes.changes import Changes

    changes = Changes(
        budget={"ratio": None if ratio is None else values.number(ratio, "--ratio")},
        calibration=values.calibration_keys(calibration, None, None, statistics),
        model=model,
        quantize=values.quantize_keys(quantize, quantize_option),
    )
    settled = changes.applied(load_recipe(recipe))
    if settled.model is None:
        raise SurgeonError(
            Code.NOT_A_MODEL,
            "no model is given",
            at=recipe,
            why="the recipe has no key 'model', and none stands behind it",
            try_=f"surgeon run {recipe} MODEL -o OUT",
        )
    opening = {"trust_remote_code": trust_remote_code}
    scoring = values.measuring(measure_text, measure_windows, measure_window)
    _check_scoring(settled, scoring, dry_run)
    allowed = Memory.of(memory)
    result = _made(settled, settled.model, out, opening, dry_run, overwrite, allowed)
    to_write = None if dry_run else out
    _done(
        result,
        to_write,
        overwrite=overwrite,
        verify=not no_verify,
        as_json=as_json,
        scoring=scoring,
    )


def recipe(
    of: Annotated[
        str | None,
        typer.Argument(metavar="[NAME|OUT]", help="one that ships, or a folder that prune wrote"),
    ] = None,
) -> None:
    """Print a recipe as YAML: one that ships, or that of any run. Without a name, list them."""
    from surgeon.recipes import about, load_recipe, shipped, to_yaml

    if of is None:
        for name in shipped():
            typer.echo(f"{name:17} {about(name)}")
        return
    folder = Path(of)
    if of in shipped() and not (folder / "surgeon.json").is_file():
        typer.echo(shipped()[of].read_text("utf-8"), nl=False)
    elif folder.exists():
        from surgeon.recipes.runs import of_run

        typer.echo(to_yaml(of_run(folder)), nl=False)
    else:
        typer.echo(to_yaml(load_recipe(of)), nl=False)


def add(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    for command in (prune, run, recipe):
        app.command()(command)
