"""The `surgeon` command. Heavy libraries are imported by the commands that use them."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from surgeon.commands import calibrate as command_calibrate
from surgeon.commands import evaluate as command_evaluate
from surgeon.commands import graph, latency, passes, see, values
from surgeon.commands import prune as command_prune
from surgeon.commands import quantize as command_quantize
from surgeon.commands import recover as command_recover
from surgeon.commands.arguments import (
    DeviceOption,
    JsonOption,
    MemoryOption,
    ModelArg,
    RemoteOption,
    RunnableArg,
)
from surgeon.commands.printing import print_verification
from surgeon.errors import SurgeonError, refused_by_system

app = typer.Typer(
    name="surgeon",
    help="Makes language models physically smaller.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace an earlier result")]


command_prune.add(app)
command_recover.add(app)
see.add(app)
command_calibrate.add(app)
command_evaluate.add(app)
app.command()(graph.graph)
app.command()(passes.passes)
app.command()(latency.latency)
app.command()(command_quantize.quantize)


@app.command()
def ir(model: ModelArg, trust_remote_code: RemoteOption = False) -> None:
    """Print the captured program."""
    from surgeon.ir import to_text
    from surgeon.pipeline import open_model

    typer.echo(to_text(open_model(model, trust_remote_code=trust_remote_code).program), nl=False)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder that prune wrote")],
    source: Annotated[
        str | None, typer.Option(help="the model it was made from, if it moved")
    ] = None,
    by_layer: Annotated[
        bool,
        typer.Option("--by-layer", help="each layer by itself, no model as a whole in memory"),
    ] = False,
    memory: MemoryOption = None,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Compare a written checkpoint with the masked original."""
    from surgeon import pipeline

    found = pipeline.verify(
        out,
        source=source,
        trust_remote_code=trust_remote_code,
        by_layer=by_layer,
        memory=memory,
    ).to_json()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_verification(found)


@app.command()
def export(
    model: ModelArg,
    to: Annotated[str, typer.Option("--to", "--target", help="onnx, pt2, gguf or vllm")],
    out: Annotated[
        Path,
        typer.Option("-o", "--output", help="file to write; or a folder, for all but pt2"),
    ],
    style: Annotated[
        str | None,
        typer.Option(help="of ONNX: ort (the default), standard, or generic, without a cache"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of ONNX (fp32 by default) and GGUF: fp32, fp16 or bf16")
    ] = None,
    positions: Annotated[
        int | None, typer.Option(help="longest sequence; the configuration's by default")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="weights in fewer bits; ONNX: int4, w8, or int8 for CPUs; GGUF: q8_0"),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="neighbouring weights that share a scale; 32 by default")
    ] = None,
    rounding: Annotated[
        str | None, typer.Option(help="of quantised weights: nearest or k-quant")
    ] = None,
    overwrite: OverwriteOption = False,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="skip running what was written")
    ] = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Write a model for a runtime: ONNX Runtime, torch, llama.cpp or vLLM."""
    from surgeon import exporting

    found = exporting.export(
        model,
        to,
        out,
        style=style,
        dtype=dtype,
        positions=positions,
        quantize=quantize,
        block_size=block_size,
        rounding=rounding,
        overwrite=overwrite,
        check=not no_check,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(found.summary)
    for note in found.notes:
        typer.echo(f"note: {note}")


@app.command()
def generate(
    model: RunnableArg,
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="several are one batch")
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="folder with the tokenizer of an ONNX file")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens to write at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="draw from this many tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from this much probability")] = None,
    seed: Annotated[int, typer.Option(help="for sampling")] = 0,
    device: DeviceOption = "auto",
    trust_remote_code: RemoteOption = False,
) -> None:
    """Let a model go on from a prompt, or from each of several."""
    from surgeon import exporting
    from surgeon.runtime.generate import Sampling
    from surgeon.runtime.generate import generate as write

    sampling = Sampling(temperature, top_k, top_p, seed)
    runnable, tokens = exporting.load(
        model, tokenizer, device=device, trust_remote_code=trust_remote_code
    )
    tokens = exporting.need_tokenizer(tokens, model)
    started: list[int] = []

    def show(row: int, piece: str) -> None:
        # One text is shown as it is written; several would get into one another.
        if len(prompts) == 1:
            typer.echo(piece if started else prompts[0] + piece, nl=False)
            started.append(row)

    found = write(
        runnable, tokens, prompts, max_new_tokens=max_new_tokens, sampling=sampling, on_text=show
    )
    if started:
        typer.echo()
    _say_device(device, exporting.where(runnable))
    if started:
        return
    for prompt, written in zip(prompts, found, strict=True):
        typer.echo(prompt + written.text)


def _say_device(asked: str, taken: str) -> None:
    if asked == "auto":
        typer.echo(f"running on {taken}", err=True)


@app.command()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="as for eval; the same one twice shows the noise"),
    ],
    prompt_tokens: Annotated[int, typer.Option(help="tokens read at once")] = 128,
    new_tokens: Annotated[int, typer.Option(help="tokens written one at a time")] = 32,
    batch: Annotated[int, typer.Option(help="rows at a time")] = 1,
    threads: Annotated[int | None, typer.Option(help="threads of each model")] = None,
    repeat: Annotated[int, typer.Option(help="turns measured, after one that warms up")] = 5,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Compare the speed and memory of models, measured in turns."""
    from contextlib import nullcontext

    from rich.console import Console

    from surgeon.report.bench_table import bench_table
    from surgeon.runtime.bench import Settings, compare

    arguments = {"device": device, "threads": threads, "trust_remote_code": trust_remote_code}
    settings = Settings(prompt_tokens, new_tokens, batch, repeat)
    console = Console(stderr=True)
    with console.status("starting") if console.is_terminal else nullcontext() as status:
        found = compare(
            models,
            "surgeon.exporting:load_to_measure",
            arguments,
            settings,
            progress=status.update if status else None,
        )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
        return
    Console().print(bench_table(found))
    if device == "auto":
        for note in dict.fromkeys(f"{m.device} ({m.note})" for m in found.models):
            _say_device(device, note)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--output", help="folder to write")] = Path(
        "surgeon-demo"
    ),
    ratio: Annotated[str, typer.Option(help="share of decoder-layer parameters")] = "0.2",
    windows: Annotated[int, typer.Option(help="windows of 512 tokens to score")] = 8,
) -> None:
    """Prune a real model by 20 %, export it, run it, and show before and after."""
    from surgeon.demo import run

    run(out, values.number(ratio, "--ratio"), windows)


def main() -> None:
    """Runs the command; a user's mistake ends with its four parts and no traceback."""
    # Libraries underneath draw bars of their own for steps that are not the user's.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Which kernels of theirs this machine lacks is no warning to the user either.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except SurgeonError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    except OSError as error:
        sys.stderr.write(f"{refused_by_system(error)}\n")
        sys.exit(1)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of an interruption
            sys.stderr.write("interrupted; nothing half-written is left\n")
        raise


if __name__ == "__main__":
    main()
