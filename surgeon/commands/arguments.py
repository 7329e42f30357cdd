"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
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
MemoryOption = Annotated[
    str | None,
    typer.Option(help="most to hold in memory, such as 2GB; half of what is free by default"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON")]
DeviceOption = Annotated[str, typer.Option(help="cuda, cpu, or auto: cuda where it works")]
RunnableArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="as for prune, or an ONNX or .pt2 file or folder")
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(help="store weights in fewer bits: int8, w8 or int4; none for full precision"),
]
QuantizeOptionOption = Annotated[
    list[str] | None, typer.Option(help="NAME=VALUE for that: group=64, embeddings=true")
]
MeasureTextOption = Annotated[
    Path | None, typer.Option(help="text to score before and after quantisation")
]
MeasureWindowsOption = Annotated[int, typer.Option(help="windows of it scored at most")]
MeasureWindowOption = Annotated[int, typer.Option(help="tokens in such a window")]
