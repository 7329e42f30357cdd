"""`inspect`, `explain` and `diff`: what a model's axes are, why, and how two models differ."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgeon.commands.arguments import JsonOption, ModelArg, RemoteOption

if TYPE_CHECKING:
    from surgeon.opening import Model


def _opened(model: str, trust_remote_code: bool) -> Model:
    from surgeon.opening import open_model

    return open_model(model, trust_remote_code=trust_remote_code)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, ensure_ascii=False))


def inspect(
    model: ModelArg,
    layer: Annotated[int | None, typer.Option(help="one layer only, by its number")] = None,
    role: Annotated[str | None, typer.Option(help="one role only, such as ffn or layers")] = None,
    param: Annotated[
        str | None, typer.Option(help="only axes of these parameters: a glob, or a name's end")
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Show the axes of a model: what is coupled with what, and what may be pruned."""
    from surgeon.report.inspect import to_json, tree, view
    from surgeon.viewing import costs_of

    opened = _opened(model, trust_remote_code)
    costs = costs_of(opened)
    found = view(opened.id, opened.axes, costs, layer=layer, role=role, param=param)
    if as_json:
        _print_json(to_json(found))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(tree(found))
    for guard in opened.program.guards:
        console.print(f"guard: {guard}")


def explain(
    model: ModelArg,
    a: Annotated[
        str, typer.Argument(metavar="A", help="an axis, or a dimension such as k_proj.weight:0")
    ],
    b: Annotated[
        str | None, typer.Argument(metavar="[B]", help="another one, to see what couples them")
    ] = None,
    channel: Annotated[
        int | None, typer.Option(help="the channel of A that goes; 0 by default")
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Show why A and B are coupled; of A alone what goes with it, and what keeps it.

    Names may be shortened to any part that says which one is meant, such as layers.3/ffn.
    """
    from surgeon.axes.explain import explain as ask
    from surgeon.viewing import costs_of

    opened = _opened(model, trust_remote_code)
    found = ask(opened.axes, a, b, channel=channel, costs=costs_of(opened))
    if as_json:
        _print_json(found.to_json())
    else:
        typer.echo(str(found))


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="a model, a plan, or what prune wrote")],
    b: Annotated[str, typer.Argument(metavar="B", help="another one")],
    source: Annotated[
        str | None, typer.Option(help="the model that plans were made for, if it moved")
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Compare two models, two plans, or a model and its pruned output."""
    from surgeon.report.diff import difference, tables
    from surgeon.viewing import sides

    found = difference(*sides(a, b, source=source, trust_remote_code=trust_remote_code))
    if as_json:
        _print_json(found.to_json())
        return
    from rich.console import Console

    console = Console(highlight=False)
    for table in tables(found):
        console.print(table)
    for word, names in (("without", found.dropped), ("with", found.added)):
        if names:
            console.print(f"{b} is {word} {', '.join(names)}")
    if found.same:
        console.print("nothing differs")


def add(app: typer.Typer) -> None:
    """Adds these commands to the application."""
    for command in (inspect, explain, diff):
        app.command()(command)
