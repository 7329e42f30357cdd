"""`eval` and `compare`: what models are, how well and fast they predict, what they write."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.commands.arguments import DeviceOption, JsonOption, RemoteOption, RunnableArg

if TYPE_CHECKING:
    from collections.abc import Callable

    from surgeon.report.comparison import Evaluation

TextOption = Annotated[
    list[Path] | None,
    typer.Option("--text", help="UTF-8 text to score; several are scored one by one"),
]
TokenizerOption = Annotated[
    str | None, typer.Option(help="folder with a tokenizer, for a model that has none beside it")
]
WindowOption = Annotated[int, typer.Option(help="tokens in a window")]
WindowsOption = Annotated[int, typer.Option(help="windows of each text scored at most")]
PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", help="let it go on from this; may be repeated")
]
NewTokensOption = Annotated[int, typer.Option(help="tokens written after a prompt at most")]
RepeatOption = Annotated[int, typer.Option(help="turns that are timed, after one that warms up")]
ThreadsOption = Annotated[int | None, typer.Option(help="threads of each model while timed")]
TasksOption = Annotated[
    str | None, typer.Option(help="tasks of lm-eval, with commas between (pip extra lm-eval)")
]
TasksPathOption = Annotated[
    Path | None, typer.Option(help="folder with further tasks as YAML files")
]
LimitOption = Annotated[int | None, typer.Option(help="examples of each task at most")]
MarkdownOption = Annotated[
    Path | None, typer.Option("--markdown", metavar="FILE", help="write the tables as Markdown")
]
HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="write them as one page")
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        help="auto, balanced, balanced_low_0 or sequential: deal a checkpoint's layers out to all "
        "GPUs, then memory and disk"
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace earlier files")]


def evaluate(
    model: RunnableArg,
    text: TextOption = None,
    tokenizer: TokenizerOption = None,
    window: WindowOption = 1024,
    windows: WindowsOption = 48,
    prompt: PromptOption = None,
    new_tokens: NewTokensOption = 64,
    speed: Annotated[bool, typer.Option("--speed", help="time prefill and decoding too")] = False,
    repeat: RepeatOption = 5,
    threads: ThreadsOption = None,
    tasks: TasksOption = None,
    tasks_path: TasksPathOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    as_json: JsonOption = False,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Measure perplexity and size; on demand speed, tasks, and what a model writes.

    Under torchrun or accelerate launch every process scores its share of the windows.
    """
    from surgeon.comparing import evaluate as measure

    _check_outputs(markdown, html, overwrite)
    with _progress() as say:
        found = measure(
            model,
            texts=text or (),
            tokenizer=tokenizer,
            window=window,
            windows=windows,
            prompts=prompt or (),
            new_tokens=new_tokens,
            speed=speed,
            repeat=repeat,
            threads=threads,
            tasks=_names(tasks),
            tasks_path=tasks_path,
            limit=limit,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=say,
        )
    _show(found, device, as_json, markdown, html, overwrite)


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="as for eval; the first is what it was before"),
    ],
    against: Annotated[
        str | None,
        typer.Option(help="which of them the others are compared with, if not the first"),
    ] = None,
    text: TextOption = None,
    tokenizer: TokenizerOption = None,
    window: WindowOption = 1024,
    windows: WindowsOption = 48,
    agreement_windows: Annotated[
        int,
        typer.Option(
            help="windows of each text on which predictions are compared; the logits of these "
            "wait on disk (200 MB for 1,024 tokens of 49,152)"
        ),
    ] = 8,
    prompt: PromptOption = None,
    new_tokens: NewTokensOption = 64,
    no_writing: Annotated[
        bool, typer.Option("--no-writing", help="let them write nothing after the built-in prompts")
    ] = False,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="time nothing")] = False,
    repeat: RepeatOption = 5,
    threads: ThreadsOption = None,
    tasks: TasksOption = None,
    tasks_path: TasksPathOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    device_map: DeviceMapOption = None,
    as_json: JsonOption = False,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Compare models: size, perplexity, agreement, speed, and what they write."""
    from surgeon.comparing import compare as measure
    from surgeon.report.comparison import PROMPTS

    _check_outputs(markdown, html, overwrite)
    with _progress() as say:
        found = measure(
            models,
            against=against,
            texts=text or (),
            tokenizer=tokenizer,
            window=window,
            windows=windows,
            agreement_windows=agreement_windows,
            prompts=prompt or (() if no_writing else PROMPTS),
            new_tokens=new_tokens,
            speed=not no_speed,
            repeat=repeat,
            threads=threads,
            tasks=_names(tasks),
            tasks_path=tasks_path,
            limit=limit,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            progress=say,
        )
    _show(found, device, as_json, markdown, html, overwrite)


def add(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    app.command("eval")(evaluate)
    app.command()(compare)


def _names(tasks: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (tasks or "").split(",") if name.strip())


@contextmanager
def _progress() -> Generator[Callable[[str], None] | None]:
    """Yields what shows a line of progress on a terminal, None where there is none."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    with console.status("starting") as status:
        yield lambda line: status.update(line)


def _check_outputs(markdown: Path | None, html: Path | None, overwrite: bool) -> None:
    from surgeon.calibrate.parallel import rank
    from surgeon.emit.files import check_output_file

    for path in (markdown, html):
        if path is not None and rank() == 0:
            check_output_file(path, overwrite=overwrite)


def _show(
    found: Evaluation,
    device: str,
    as_json: bool,
    markdown: Path | None,
    html: Path | None,
    overwrite: bool,
) -> None:
    """Prints an evaluation and writes the files that were asked for."""
    from surgeon.calibrate.parallel import rank
    from surgeon.emit.files import output_file
    from surgeon.report import comparison_table as t
    from surgeon.report.comparison_page import comparison_page

    if rank() != 0:
        return  # all processes have the same figures
    for path, content in ((markdown, t.markdown), (html, comparison_page)):
        if path is not None:
            with output_file(path, overwrite=overwrite) as partial:
                partial.write_text(content(found), encoding="utf-8")
    if device == "auto":
        for place in dict.fromkeys(model.device for model in found.models):
            typer.echo(f"running on {place}", err=True)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in t.tables(found):
        console.print(table)
    for reason in t.unknown(found):
        console.print(f"unknown: {reason}", markup=False)
    for path in (markdown, html):
        if path is not None:
            console.print(f"written: {path}", markup=False)
