"""An evaluation as tables: for a terminal, in Markdown, and as rows for a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from surgeon.report.comparison import Evaluated, Evaluation, Written
from surgeon.report.evaluate import Perplexity
from surgeon.report.tables import Unit, Value, text
from surgeon.report.writing import Writing, mean

if TYPE_CHECKING:
    from rich.table import Table

_FACTS: tuple[tuple[str, str, Unit], ...] = (
    ("parameters", "parameters", Unit.COUNT),
    ("… in decoder layers", "decoder_parameters", Unit.COUNT),
    ("zeros in linear maps", "sparsity", Unit.SHARE),
    ("weights on disk", "disk_bytes", Unit.BYTES),
    ("weights in memory", "memory_bytes", Unit.BYTES),
    ("FLOPs per token", "flops", Unit.COUNT),
    ("… for each token attended to", "flops_context", Unit.COUNT),
    ("cache per token", "cache_bytes", Unit.BYTES),
)
_SMALLER = (
    ("smaller by parameters", "parameters"),
    ("… on disk", "disk_bytes"),
    ("… in memory", "memory_bytes"),
)
_WRITING: tuple[tuple[str, str], ...] = (
    ("distinct words", "distinct_1"),
    ("distinct pairs of words", "distinct_2"),
    ("repeated runs of 4 tokens", "repetition"),
    ("longest loop", "loop"),
    ("broken characters", "broken"),
    ("unknown words", "unknown"),
)


@dataclass(frozen=True)
class Section:
    """A part of the table: rows of a label and one cell for each model."""

    title: str
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def columns(found: Evaluation) -> tuple[str, ...]:
    """Returns what the models are called: the ends of their paths, where those differ."""
    names = [model.name for model in found.models]
    ends = [PurePath(name).name or name for name in names]
    return tuple(ends if len(set(ends)) == len(ends) else names)


def sections(found: Evaluation) -> list[Section]:
    """Returns every figure; a section of which nothing was measured is left out."""
    every = [
        Section("what it is", tuple(_identity(found))),
        Section("size", tuple(_sizes(found))),
        Section("perplexity", tuple(_texts(found)), _about_texts(found)),
        Section("speed", tuple(_speed(found)), _about_speed(found)),
        Section("what it writes", tuple(_writing(found)), _about_writing(found)),
        Section("tasks", tuple(_tasks(found))),
    ]
    return [section for section in every if section.rows]


def unknown(found: Evaluation) -> list[str]:
    """Returns why figures are missing, one sentence each."""
    out: dict[str, None] = {}
    labels = {name: label.removeprefix("… ") for label, name, _ in _FACTS}
    for name, model in zip(columns(found), found.models, strict=True):
        reasons: dict[str, list[str]] = {}
        for figure, why in model.facts.unknown.items():
            reasons.setdefault(why, []).append(labels[figure])
        for why, figures in reasons.items():
            out[f"{name}: {', '.join(figures)}: {why}"] = None
        for scored in model.texts:
            if scored.why:
                figure = "agreement" if scored.found else "perplexity"
                out[f"{name}: {figure} on {scored.text}: {scored.why}"] = None
    if found.why_no_speed:
        out[f"speed: {found.why_no_speed}"] = None
    return list(out)


# --- rows ----------------------------------------------------------------------------------------


def _row(
    found: Evaluation, label: str, get: Callable[[Evaluated], Value], unit: Unit = Unit.NUMBER
) -> tuple[str, ...]:
    return label, *(text(get(model), unit) for model in found.models)


def _identity(found: Evaluation) -> Iterator[tuple[str, ...]]:
    yield _row(found, "class", lambda m: m.facts.architecture)
    yield _row(found, "read from", lambda m: m.facts.kind)


def _sizes(found: Evaluation) -> Iterator[tuple[str, ...]]:
    for label, name, unit in _FACTS:

        def fact(model: Evaluated, name: str = name) -> Value:
            return getattr(model.facts, name)

        if any(fact(model) is not None for model in found.models):
            yield _row(found, label, fact, unit)
    if len(found.models) > 1:
        for label, name in _SMALLER:
            ratios = [found.compression(i, name) for i in range(len(found.models))]
            if any(ratio is not None for ratio in ratios):
                yield label, *(_times(ratio) for ratio in ratios)


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"×{ratio:.2f}"


def _texts(found: Evaluation) -> Iterator[tuple[str, ...]]:
    for number, scored in enumerate(found.reference.texts):

        def value(model: Evaluated, number: int = number) -> Value:
            own = model.texts[number].found
            return None if own is None else own.perplexity

        yield _row(found, scored.text, value)
        for label, name, unit in (
            ("… same likeliest token", "top1", Unit.SHARE),
            ("… KL from the reference", "kl", Unit.NUMBER),
        ):

            def agreement(model: Evaluated, number: int = number, name: str = name) -> Value:
                own = model.texts[number].agreement
                return None if own is None else getattr(own, name)

            if any(agreement(model) is not None for model in found.models):
                yield _row(found, label, agreement, unit)


def _about_texts(found: Evaluation) -> str:
    scored = next((t.found for t in found.reference.texts if t.found), None)
    if scored is None:
        return ""
    about = [_windows(found.reference.texts[i].found) for i in range(len(found.reference.texts))]
    out = "; ".join(dict.fromkeys(filter(None, about)))
    compared = next((t.agreement for m in found.models for t in m.texts if t.agreement), None)
    if compared is None:
        return out
    first = min(found.settings.agreement_windows, scored.windows)
    return f"{out}; compared with {_reference(found)} on the first {first} (KL in nats, exact)"


def _windows(scored: Perplexity | None) -> str:
    return "" if scored is None else f"{scored.windows} windows of {scored.window} tokens"


def _reference(found: Evaluation) -> str:
    return columns(found)[found.against]


def _speed(found: Evaluation) -> Iterator[tuple[str, ...]]:
    speed = found.speed
    if speed is None:
        return
    yield "run by", *(own.kind for own in speed.models)
    for label, name in (("prefill, tokens/s", "prefill"), ("decoding, tokens/s", "decode")):
        yield label, *(text(getattr(own, name)) for own in speed.models)
        if len(speed.models) > 1:
            yield "… relative", *(_times(found.speed_up(i, name)) for i in range(len(found.models)))
    yield "peak memory", *(text(own.peak_bytes, Unit.BYTES) for own in speed.models)


def _about_speed(found: Evaluation) -> str:
    if found.speed is None:
        return ""
    s = found.speed.settings
    return (
        f"{s.prompt_tokens} tokens of prompt, {s.new_tokens} new ones, measured in turns, each "
        f"in a process of its own; median of {s.repeat}"
    )


def _writing(found: Evaluation) -> Iterator[tuple[str, ...]]:
    if not found.settings.prompts:
        return
    means: list[Writing] = [mean(w.measures for w in m.written) for m in found.models]
    for label, name in _WRITING:
        yield label, *(text(getattr(own, name), Unit.SHARE) for own in means)


def _about_writing(found: Evaluation) -> str:
    s = found.settings
    if not s.prompts:
        return ""
    return (
        f"prompts: {len(s.prompts)}; at most {s.new_tokens} tokens each, greedy; means; known "
        f"are the {found.known_words:,} words of the texts and the prompts"
    )


def _tasks(found: Evaluation) -> Iterator[tuple[str, ...]]:
    for task, metrics in found.reference.tasks.items():
        for metric in metrics:

            def value(model: Evaluated, task: str = task, metric: str = metric) -> Value:
                return model.tasks.get(task, {}).get(metric)

            yield _row(found, f"{task}, {metric}", value)


# --- forms ---------------------------------------------------------------------------------------


def tables(found: Evaluation) -> list[Table]:
    """Returns a table for each section, and one of what was written."""
    from rich.table import Table
    from rich.text import Text

    out: list[Table] = []
    for section in sections(found):
        table = Table(title=section.title, title_justify="left", caption=section.note or None)
        table.caption_justify = "left"
        table.add_column("")
        for name in columns(found):
            table.add_column(name, justify="right", overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        out.append(table)
    for prompt, written in side_by_side(found):
        table = Table(title=Text(prompt), title_justify="left", show_header=True)
        for name in columns(found):
            table.add_column(name, overflow="fold", ratio=1)
        table.add_row(*(Text(visible(own.text)) for own in written))
        out.append(table)
    return out


def side_by_side(found: Evaluation) -> Iterator[tuple[str, list[Written]]]:
    """Yields each prompt with what every model wrote after it."""
    for number, prompt in enumerate(found.settings.prompts):
        yield prompt, [model.written[number] for model in found.models]


def visible(written: str) -> str:
    """Returns a text in which control characters that a terminal would obey are shown."""
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in written)


def markdown(found: Evaluation) -> str:
    """Returns everything in Markdown, ending in a newline."""
    names = columns(found)
    lines = [f"# {title(found)}", ""]
    for section in sections(found):
        lines += [f"## {section.title.capitalize()}", ""]
        lines += _markdown_table(("", *names), section.rows, figures=True)
        lines += [section.note, ""] if section.note else []
    written = list(side_by_side(found))
    if written:
        lines += ["## Side by side", ""]
        for prompt, texts in written:
            lines += [f"**{_escaped(prompt)}**", ""]
            lines += _markdown_table(names, [[visible(own.text) for own in texts]])
    reasons = unknown(found)
    if reasons:
        lines += ["## Unknown", "", *(f"- {_escaped(reason)}" for reason in reasons), ""]
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    lines += [f"Measured with {versions}."]
    return "\n".join(lines) + "\n"


def _markdown_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, figures: bool = False
) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(_escaped, cells)) + " |"

    marks = ["---", *("---:" if figures else "---" for _ in head[1:])]
    return [line(head), "|" + "|".join(marks) + "|", *map(line, rows), ""]


def _escaped(cell: str) -> str:
    for sign in "\\`*_[]<>|#":
        cell = cell.replace(sign, "\\" + sign)
    return cell.replace("\n", "<br>")


def title(found: Evaluation) -> str:
    """Returns what was evaluated, in a line."""
    names = columns(found)
    if len(names) == 1:
        return names[0]
    others = [name for place, name in enumerate(names) if place != found.against]
    return f"{', '.join(others)} beside {_reference(found)}"
