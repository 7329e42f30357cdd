"""`quantize`: a checkpoint whose weights take 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.commands import values
from surgeon.commands.arguments import (
    JsonOption,
    MeasureTextOption,
    MeasureWindowOption,
    MeasureWindowsOption,
    ModelArg,
    RemoteOption,
)


def quantize(
    model: ModelArg,
    out: Annotated[Path, typer.Option("-o", "--output", help="folder to write (new or empty)")],
    scheme: Annotated[str, typer.Option(help="int8, w8 or int4")] = "int8",
    group: Annotated[
        int | None, typer.Option(help="of int4: neighbours that share a scale; 32 by default")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="round the embedding and the head too (8 bits)")
    ] = False,
    measure_text: MeasureTextOption = None,
    measure_windows: MeasureWindowsOption = 8,
    measure_window: MeasureWindowOption = 1024,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an earlier result")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="skip reading back what was written")
    ] = False,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Store a checkpoint's weights in fewer bits, after pruning or without."""
    from surgeon.calibrate.parallel import rank
    from surgeon.commands.printing import print_report
    from surgeon.emit.lowbit.scheme import Scheme
    from surgeon.exporting import quantize as write

    report = write(
        model,
        out,
        Scheme(scheme, group, embeddings),
        overwrite=overwrite,
        verify=not no_verify,
        measure=values.measuring(measure_text, measure_windows, measure_window),
        trust_remote_code=trust_remote_code,
    )
    if rank() != 0:
        return
    if as_json:
        typer.echo(report.to_json(), nl=False)
    else:
        print_report(report, out)
