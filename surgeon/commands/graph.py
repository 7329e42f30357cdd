"""`graph`: a model's couplings or operations as a page, a picture, or data for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from surgeon.commands.arguments import ModelArg, RemoteOption
from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    from surgeon.axes.plan import Plan
    from surgeon.opening import Model

PLAN_FILE = "plan.json"


def graph(
    model: ModelArg,
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="file to write: .html, .graphml, .json, .dot, .svg or .png",
        ),
    ],
    of: Annotated[
        str,
        typer.Option(
            help="axes (with the parameters that carry them), coupling (every place of every "
            "tensor, and what ties them), or program (the captured operations)"
        ),
    ] = "axes",
    within: Annotated[
        str | None, typer.Option(help="module path, or a glob: only what lies there, and its ties")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="of pictures: graphviz, or networkx where that is not installed")
    ] = "graphviz",
    source: Annotated[
        str | None, typer.Option(help="the model that a pruned folder was made from, if it moved")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier file")] = False,
    trust_remote_code: RemoteOption = False,
) -> None:
    """Write a model's graph: a page to click in, a picture, or a file for other tools.

    Of a folder that prune wrote, the graph is that of the model before, coloured by what went.
    """
    from surgeon.emit.files import check_output_file, output_file
    from surgeon.report import graph_data, graph_files, graph_page

    suffix = graph_files.check_format(out, layout)
    graph_data.check_view(of)
    if suffix == ".html":
        graph_page.check_page_view(of)
        _whole(within)
    check_output_file(out, overwrite=overwrite)
    opened, plan = _opened(model, source, trust_remote_code)
    if suffix == ".html":
        content = graph_page.page(opened.axes, _title(opened), plan, of).encode()
    else:
        found = graph_data.build(opened.axes, of, plan, within)
        content = graph_files.write_graph(found, suffix, layout)
    with output_file(out, overwrite=overwrite, need_bytes=len(content)) as file:
        file.write_bytes(content)
    typer.echo(f"{out}: {graph_files.FORMATS[suffix]} ({len(content):,} bytes)")


def _whole(within: str | None) -> None:
    if within is not None:
        raise SurgeonError(
            Code.BAD_OPTION,
            "a page holds the whole model",
            at="--within",
            why="modules are opened and closed in the page itself",
            try_="leave --within out, or write another format",
        )


def _title(model: Model) -> str:
    """A model's name without the folders that lead to it."""
    path = Path(model.id)
    if not path.exists():
        return model.id
    return path.parent.name if path.name == "config.json" and path.parent.name else path.name


def _opened(name: str, source: str | None, remote: bool) -> tuple[Model, Plan | None]:
    """Returns the model to draw, and the plan where `name` is what a prune wrote."""
    from surgeon.opening import for_plan, open_model, opening_origin

    folder = Path(name)
    if not (folder.is_dir() and (folder / PLAN_FILE).is_file()):
        if source is not None:
            raise SurgeonError(
                Code.BAD_OPTION,
                "--source belongs to a pruned folder",
                at=name,
                why=f"there is no {PLAN_FILE} in it, so it was made from no other model",
                try_="leave --source out",
            )
        return open_model(name, trust_remote_code=remote), None
    from surgeon.axes.plan import check
    from surgeon.saving import read_plan

    plan, _ = read_plan(folder)
    before = source or dict(plan.source).get("id", "")
    with opening_origin(before, "this was made from", str(folder / PLAN_FILE)):
        origin = for_plan(open_model(before, trust_remote_code=remote), plan)
    return origin, check(origin.axes, plan)
