"""`calibrate`: statistics of a model on a text, gathered once and kept in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from surgeon.commands.arguments import DeviceOption, JsonOption, ModelArg, RemoteOption
from surgeon.errors import Code, SurgeonError, near


def calibrate(
    model: ModelArg,
    out: Annotated[
        Path, typer.Option("-o", "--output", help="file to write, such as stats.safetensors")
    ],
    calibration: Annotated[
        list[str] | None,
        typer.Option(help="text, .jsonl, .npy of token ids or datasets:NAME; FILE=WEIGHT mixes"),
    ] = None,
    samples: Annotated[int, typer.Option(help="windows of calibration data")] = 64,
    length: Annotated[int, typer.Option(help="tokens in such a window")] = 512,
    seed: Annotated[int, typer.Option(help="of the windows' starts")] = 0,
    statistics: Annotated[
        str,
        typer.Option(
            help="any of moments, norms, gradients, fisher, similarity, routing, with commas"
        ),
    ] = "moments,similarity",
    device: DeviceOption = "cpu",
    offload: Annotated[
        Path | None, typer.Option(help="folder for what waits between layers, else in memory")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier file")] = False,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Gather what passes ask of a text, and keep it in a file.

    Under torchrun or accelerate launch every process takes its share of the windows.
    """
    from dataclasses import replace

    from surgeon.calibrate.data import Recipe, draw
    from surgeon.calibrate.gathered import Gathered
    from surgeon.calibrate.parallel import rank
    from surgeon.calibrate.stored import STATISTICS, Statistic, save
    from surgeon.commands.values import calibration as pieces_of
    from surgeon.emit.files import check_output_file
    from surgeon.errors import no_weights
    from surgeon.opening import open_model
    from surgeon.pipeline import versions

    asked = tuple(dict.fromkeys(name.strip() for name in statistics.split(",")))
    for name in asked:
        if name not in STATISTICS:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"there is no statistic {name!r}",
                at="--statistics",
                why=f"there are {', '.join(STATISTICS)}",
                try_=near(name, STATISTICS),
            )
    if rank() == 0:  # which may have written when the others come here
        check_output_file(out, overwrite=overwrite)
    recipe = Recipe((), samples, length, seed)
    if calibration:
        recipe = replace(recipe, pieces=pieces_of(calibration, samples, length, seed).pieces)
    opened = open_model(model, trust_remote_code=trust_remote_code)
    source = opened.source
    if opened.tensors is None or source is None:
        raise no_weights(opened.id)
    notes: list[str] = []
    vocab = int(source.config.vocab_size)
    windows = draw(recipe, source.load_tokenizer(), vocab=vocab, notes=notes)
    data = Gathered(opened.axes, opened.read, windows, device=device, offload=offload, notes=notes)
    about = {
        "fingerprint": opened.fingerprint(),
        "model": opened.id,
        "data": {name: list(found) for name, found in windows.origin.items()},
        "samples": samples,
        "length": length,
        "seed": seed,
        "versions": versions(),
    }
    kinds: tuple[Statistic, ...] = tuple(kind for kind in STATISTICS if kind in asked)
    counts = save(out, data, kinds, about, overwrite=overwrite)
    if rank() != 0:
        return
    if as_json:
        typer.echo(json.dumps({**about, "statistics": counts, "notes": notes}, indent=1))
        return
    found = ", ".join(f"{kind} of {count}" for kind, count in counts.items())
    typer.echo(f"{out}: {found} ({samples} windows of {length} tokens)")
    for note in notes:
        typer.echo(f"note: {note}")


def add(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(calibrate)
