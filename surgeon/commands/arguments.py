"""Arguments and options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelArg = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="checkpoint folder, config.json, GGUF file, hub id, or the alias smollm2",
    ),
]
RemoteOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="run modelling code that comes with MODEL")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
DeviceOption = Annotated[str, typer.Option(help="cuda, cpu, or auto: cuda where it works")]
RunnableArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="as for prune, or an ONNX or .pt2 file or folder")
]
