"""The conformance table as Markdown: written, read back, compared."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tools.conformance.measure import (
    CLASS,
    DECODERS,
    FILE,
    GRAPH,
    MIXTURES,
    MODULES,
    PINNED,
    WRONG,
    Line,
)

PATH = Path(__file__).parents[2] / "docs" / "conformance.md"
NAMES = (*DECODERS, *MIXTURES, *MODULES)
ROLES = ("hidden", "kv_heads", "q_per_kv", "rotary", "qk", "v", "ffn", "experts", "expert_groups")
HEAD = ("architecture", *ROLES, "channels", "width", "layers", "pt2", "ONNX", "largest difference")
RANK = {"": 1, "refused": 0, WRONG: 0, PINNED: 1, GRAPH: 2, FILE: 3, CLASS: 4}
"""What is better than what. A role that isn't found is no worse than one that can't be cut."""

INTRO = """# What holds of which architecture

Made by running `tools/zoo`, which builds a model of two layers and random weights of each, removes
about a third of every role (a quarter of `hidden`, half of the `layers`), and compares.

| cell | |
|---|---|
| `class` | removed equals masked; written for Transformers, loaded by `from_pretrained`: equal |
| `file` | the same, with the modelling file that comes with the checkpoint |
| `graph` | removed equals masked; for graphs only (`.pt2`, ONNX), no configuration expresses it |
| `pinned` | found, and can't be removed; why is said below |
| `wrong` | removed and masked differ, or the result can't be built |
| | the architecture has no such role |

`~`: the reference's normalisers see kept channels only, as LayerNorm's mean can't be masked. Roles
that one class expresses are written together. `pt2` and `ONNX` are the differences of one graph
with every role cut at once, loaded by torch and run by ONNX Runtime: with a cache (`ort`,
`standard`) or without (`generic`). All differences are shares of the largest output, and 1e-4 is
allowed.

`tools/zoo NAME …` measures some rows anew; `tools/zoo --sweep` tries every architecture of
Transformers.
"""


@dataclass
class Table:
    """Rows of the published table, each by its architecture, and the remarks on them."""

    rows: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    remarks: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def cells(self, name: str) -> Mapping[str, str]:
        """Returns a row by its columns."""
        return dict(zip(HEAD, self.rows[name], strict=True))


def _number(value: float | str, style: str = "") -> str:
    if isinstance(value, str):
        return "refused" if value else ""
    return f"{value:.0e}" + (f" {style}" if style else "")


def row(line: Line) -> tuple[str, ...]:
    """Returns the cells of an architecture."""
    if line.refused:
        return (line.name, *("refused" for _ in HEAD[1:2]), *("" for _ in HEAD[2:]))
    cells = [line.cells.get(role) for role in HEAD[1:-3]]
    states = ("" if c is None else c.state + ("~" if c.inexact else "") for c in cells)
    found = [d for c in line.cells.values() for d in (c.difference, c.loaded) if d is not None]
    last = (_number(line.pt2), _number(line.onnx, line.style), _number(max(found, default=0.0)))
    return (line.name, *states, *last)


def remarks(line: Line) -> list[str]:
    """Returns why cells are not better than they are, one sentence a reason."""
    if line.refused:
        return [f"can't be captured: {line.refused}"]
    grouped: dict[str, list[str]] = {}
    for role, cell in line.cells.items():
        if cell.why:
            grouped.setdefault(f"{cell.state}: {_short(cell.why)}", []).append(f"`{role}`")
    for target, found in (("pt2", line.pt2), ("ONNX", line.onnx)):
        if isinstance(found, str) and found:
            grouped.setdefault(f"refused: {_short(found)}", []).append(target)
    return [f"{', '.join(roles)} {why}" for why, roles in grouped.items()]


def _short(why: str) -> str:
    """Returns the first of several reasons."""
    return re.sub(r"\s+", " ", why).split("; ")[0].replace("|", "/")[:220].rstrip(". ")


def read(path: Path = PATH) -> Table:
    """Returns the table as it is published; an empty one where there is none."""
    table = Table()
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        cells = tuple(cell.strip() for cell in line.strip("|").split("|"))
        if len(cells) == len(HEAD) and cells[0] in NAMES:
            table.rows[cells[0]] = cells
        elif found := re.fullmatch(r"- \*\*(\w+)\*\*: (.+)", line):
            table.remarks.setdefault(found[1], []).append(found[2])
    return table


def text(table: Table) -> str:
    """Returns the document."""
    out = [INTRO]
    sections = {
        "Decoders": DECODERS,
        "Mixtures of experts": MIXTURES,
        "Encoders and convolutions": MODULES,
    }
    for heading, names in sections.items():
        rows = [table.rows[name] for name in names if name in table.rows]
        if not rows:
            continue
        out += [f"## {heading}\n", _line(HEAD), _line(["---"] * len(HEAD))]
        out += [*map(_line, rows), ""]
    notes = [f"- **{name}**: {note}" for name in NAMES for note in table.remarks.get(name, ())]
    if notes:
        out += ["## Why not\n", *notes, ""]
    return "\n".join(out)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def updated(table: Table, lines: Iterable[Line]) -> Table:
    """Returns the table with some architectures measured anew."""
    for line in lines:
        table.rows[line.name] = row(line)
        table.remarks[line.name] = remarks(line)
    return table


def worse(published: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Returns the columns in which an architecture has lost something, in words."""
    out: list[str] = []
    for column in HEAD[1:-1]:
        before, now = published[column], found[column]
        if column in ("pt2", "ONNX"):
            lost = before not in ("", "refused") and now in ("", "refused")
        else:
            lost = RANK[now.rstrip("~")] < RANK[before.rstrip("~")]
            lost = lost or (now.endswith("~") and not before.endswith("~") and before != PINNED)
            lost = lost and bool(before)
        if lost:
            out.append(f"{column}: {before or 'nothing'} became {now or 'nothing'}")
    return out
