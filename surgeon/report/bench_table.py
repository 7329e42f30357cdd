"""What a comparison of speed and memory found, as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgeon.report.tables import Unit, text

if TYPE_CHECKING:
    from rich.table import Table

    from surgeon.runtime.bench import Comparison


def bench_table(found: Comparison) -> Table:
    """Returns a row for every model, each figure with its ratio to the first model's."""
    from rich.table import Table

    table = Table(title=title(found), show_lines=True)
    for name in ("model", "run by"):
        table.add_column(name, overflow="fold")
    for name in ("prefill\ntokens/s", "decode\ntokens/s", "peak\nmemory"):
        table.add_column(name, justify="right", no_wrap=True)
    for index, model in enumerate(found.models):
        cells = [model.model, f"{model.kind}, {model.device}"]
        for figure, unit in (
            ("prefill", Unit.NUMBER),
            ("decode", Unit.NUMBER),
            ("peak_bytes", Unit.BYTES),
        ):
            ratio, shown = found.ratio(index, figure), text(getattr(model, figure), unit)
            cells.append(shown if ratio is None else f"{shown}\n×{ratio:.2f}")
        table.add_row(*cells)
    return table


def title(found: Comparison) -> str:
    """Returns what was measured, in a line."""
    s = found.settings
    return (
        f"{s.batch} × {s.prompt_tokens} tokens of prompt, {s.new_tokens} new ones; "
        f"median of {s.repeat} turns; × is relative to the first"
    )
