"""`recover`: a pruned model trained further."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from surgeon.commands import values
from surgeon.commands.arguments import JsonOption, RemoteOption
from surgeon.commands.prune import NoVerifyOption, OverwriteOption


def recover(
    pruned: Annotated[Path, typer.Argument(metavar="OUT", help="folder that prune wrote")],
    out: Annotated[Path, typer.Option("-o", "--output", help="folder to write (new or empty)")],
    method: Annotated[str | None, typer.Option(help="full, or lora: low-rank adapters")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of the optimizer; 300")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="text, .jsonl, .npy or datasets:NAME; by default what prune looked at"),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(help="what the dense model teaches: logits, hidden, both or none; logits"),
    ] = None,
    rate: Annotated[float | None, typer.Option(help="largest learning rate; 1e-4")] = None,
    batch: Annotated[int | None, typer.Option(help="windows in a step; 4")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in a window; 512")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; fp32")] = None,
    seed: Annotated[int | None, typer.Option(help="of windows, order, adapters; 0")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for any other: see 'surgeon passes recover'"),
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="folder to go on from after an interruption; BETTER.training"),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="the model it was made from, if it moved")
    ] = None,
    overwrite: OverwriteOption = False,
    no_verify: NoVerifyOption = False,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Train a pruned model further, and write it as a whole new folder.

    Under accelerate launch or torchrun every process takes its share of the windows.
    """
    from surgeon.calibrate.parallel import rank
    from surgeon.commands.printing import print_report
    from surgeon.emit.files import check_output
    from surgeon.improving import recover as train

    kept = checkpoints or out.with_name(out.name + ".training")
    named: dict[str, Any] = {
        "method": method,
        "steps": steps,
        "data": tuple(data) if data else None,
        "distill": distill,
        "rate": rate,
        "batch": batch,
        "length": length,
        "precision": precision,
        "seed": seed,
        "checkpoints": str(kept),
    }
    options = {name: value for name, value in named.items() if value is not None}
    options = {**values.options(option or [], "--option"), **options}
    if rank() == 0:  # which may have written when the others come here
        check_output(out, overwrite=overwrite)
    result = train(
        pruned, source=source, verify=False, trust_remote_code=trust_remote_code, **options
    )
    report = result.save(out, overwrite=overwrite, verify=not no_verify)
    if rank() != 0:
        return
    if checkpoints is None and kept.is_dir():
        shutil.rmtree(kept)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        print_report(report, out)


def add(app: typer.Typer) -> None:
    """Adds the command to the application."""
    app.command()(recover)
