"""`latency`: how long a model's pieces take by width, for budgets of measured time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgeon.commands.arguments import DeviceOption, ModelArg, RemoteOption


def latency(
    model: ModelArg,
    out: Annotated[Path, typer.Option("-o", "--output", help="JSON file to write")],
    tokens: Annotated[int, typer.Option(help="tokens of the prompt that is read at once")] = 128,
    batch: Annotated[int, typer.Option(help="rows at a time")] = 1,
    repeat: Annotated[int, typer.Option(help="timings of each width, of which the median")] = 5,
    points: Annotated[int, typer.Option(help="widths of each axis, evenly spaced")] = 5,
    role: Annotated[
        list[str] | None,
        typer.Option(help="roles timed at several widths: ffn, kv_heads and q_per_kv by default"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="threads on a CPU")] = None,
    device: DeviceOption = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace the file")] = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Time a model's layers at several widths on this machine, for prune --measure latency."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from surgeon.emit.files import check_output_file, output_file
    from surgeon.opening import open_model
    from surgeon.runtime.device import choose_torch_device
    from surgeon.runtime.latency import ROLES, Settings, measure

    found = choose_torch_device(device)
    settings = Settings(tokens, batch, repeat, points, tuple(role or ROLES), found.name)
    check_output_file(out, overwrite=overwrite)
    if threads is not None:
        torch.set_num_threads(threads)
    opened = open_model(model, trust_remote_code=trust_remote_code)
    console = Console(stderr=True)
    table = measure(
        opened.axes, settings, lambda line: console.print(f"timing {line}", highlight=False)
    )
    with output_file(out, overwrite=overwrite) as partial:
        partial.write_text(table.to_json(), encoding="utf-8")
    shown = Table("pieces", "widths", "milliseconds")
    for piece in table.pieces:
        (names, branches), more = piece.places[0], len(piece.places) - 1
        label = ", ".join(branches) + (f" and {more} alike" if more else "")
        roles = [opened.axes.by_name[name].role for name in names]
        for at in (0, -1):
            grid = piece.grids[0]
            widths = (f"{r}={c[at]}" for r, c in zip(roles, grid.counts, strict=True))
            shown.add_row(label, ", ".join(widths), f"{1e3 * grid.seconds[at]:.3f}")
    shown.add_row("the rest", "", f"{1e3 * table.rest:.3f}")
    Console().print(shown)
    typer.echo(f"{1e3 * table.clock(opened.axes).whole:.1f} ms in all on {table.device}; {out}")
