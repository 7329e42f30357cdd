"""What a prune did, on one page: sizes, widths, comparison with the masked model, recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from surgeon.report.colours import shade
from surgeon.report.curve import curve, curves_of
from surgeon.report.heatmap import heatmap
from surgeon.report.html import bullets, page, section, table
from surgeon.report.tables import Row, Unit, text, vocabulary_words


def _sizes(report: Mapping[str, Any], gone: Collection[str]) -> str:
    rows = [
        Row(f"parameters, {name}", found["before"], found["after"], Unit.COUNT)
        for name, found in report["parameters"].items()
    ]
    roles: dict[str, list[int]] = {}
    for axis in report["axes"]:
        total = roles.setdefault(axis["role"], [0, 0])
        total[0] += axis["before"]
        total[1] += 0 if axis["name"] in gone else axis["after"]
    rows += [
        Row(f"{role}, all axes together", before, after, Unit.COUNT)
        for role, (before, after) in roles.items()
        if before != after
    ]
    return table(("", "before", "after", "change"), (row.cells for row in rows))


def _written(report: Mapping[str, Any]) -> list[Sequence[str]]:
    target = dict(report["target"])
    out: list[Sequence[str]] = []
    for key, value in target.items():
        shown = text(value, Unit.BYTES) if key == "bytes" else str(value)
        if isinstance(value, bool):
            shown = "yes" if value else "no"
        out.append((key.replace("_", " "), shown))
    return out


def _verification(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "<p>It was not compared with the masked model (<code>--no-verify</code>).</p>"
    parts = [
        f"<p>The largest difference from the masked model is <b>{found['largest']:.1e}</b> of the "
        f"largest logit; {found['tolerance']:.0e} is allowed.</p>"
    ]
    if found.get("cast") is not None:
        parts.append(
            f"<p>Rounding to the checkpoint’s element type moves logits by {found['cast']:.1e}.</p>"
        )
    if found["reasons"]:
        parts.append("<p>Not what masking gives, because</p>" + bullets(found["reasons"]))
    probes = found.get("probes") or ()
    if probes:
        head = list(probes[0])
        rows = ([_figure(probe[key]) for key in head] for probe in probes)
        parts.append(table(head, rows))
    return "".join(parts)


def _figure(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else str(value)


def _zeros(found: Mapping[str, Any]) -> str:
    """Zeros among the weights: in all, what they save where, and by parameter."""
    pattern = f", {found['pattern']} along the inputs" if found["pattern"] else ""
    saves = (
        (
            row["where"],
            text(row["before"], Unit.BYTES),
            text(row["after"], Unit.BYTES),
            f"{row['share']:.4g}",
            row["says"],
        )
        for row in found["saves"]
    )
    own = (
        (
            one["name"],
            " × ".join(map(str, one["shape"])),
            f"{one['sparsity']:.1%}",
            one["pattern"] or "",
        )
        for one in found["parameters"]
    )
    return (
        f"<p>{found['sparsity']:.1%} of {found['weights']:,} weights{pattern}, "
        f"{found['of_all']:.1%} of all parameters.</p>"
        + table(("where", "without zeros", "with them", "share", ""), saves)
        + table(("parameter", "shape", "zeros", "pattern"), own)
    )


def _trainings(report: Mapping[str, Any]) -> list[str]:
    found = curves_of(report)
    if not found:
        return []
    return [section("Training: loss by step", f'<div class="wide">{curve(found)}</div>')]


def _recipe(report: Mapping[str, Any]) -> str:
    rows: list[Sequence[str]] = []
    for step in report["recipe"]:
        options = json.dumps(step["options"], ensure_ascii=False, default=str)
        seconds = text(step["seconds"], Unit.SECONDS) if "seconds" in step else ""
        rows.append((step["pass"], options, seconds))
    return table(("pass", "options", "time"), rows)


def command(report: Mapping[str, Any]) -> str:
    """Returns the command that makes the same result again, run in the result's folder."""
    source = report["source"].get("id", "")
    target = report["target"].get("name", "transformers")
    words = ["surgeon", "prune", source, "--plan", "plan.json", "-o", "again"]
    if target != "transformers":
        words += ["--to", target]
    return shlex.join(words)


PYTHON = """from pathlib import Path
import surgeon
from surgeon.saving import read_plan

plan, rewrites = read_plan(Path("."))
again = surgeon.prune(model, plan=plan, rewrites=rewrites{more})
again.save("again")"""
"""The same from Python, for a model that is not read from a path or a hub."""


def _reproduce(report: Mapping[str, Any]) -> str:
    fingerprint = report["source"].get("fingerprint")
    target = report["target"].get("name", "transformers")
    more = "" if target == "transformers" else f', target="{target}"'
    parts = [
        "<p>The plan beside this page says which channels stay, whatever the passes would say "
        "today. In this folder, with the model where it was:</p>"
    ]
    if fingerprint:
        parts.append(f"<pre>{escape(command(report))}\nsurgeon verify again</pre>")
        parts.append("<p>With the model at hand in Python:</p>")
    else:
        more += ", example_inputs=example_inputs"
    parts.append(f"<pre>{escape(PYTHON.format(more=more))}</pre>")
    if fingerprint:
        parts.append(f"<p>The source’s fingerprint is <code>{escape(fingerprint)}</code>.</p>")
    return "".join(parts) + table(("made with", "version"), report["versions"].items())


def report_page(report: Mapping[str, Any], gone: Collection[str] = ()) -> str:
    """Returns the page of a prune, in one file that asks for nothing else.

    Args:
        report: the content of `surgeon.json`.
        gone: names of the axes that went with dropped branches.
    """
    removed = report["ratio"]["removed"]
    stops = ", ".join(shade(n / 8) for n in range(9))
    scale = (
        '<p class="scale">removed 0 % '
        f'<i style="background:linear-gradient(to right, {stops})"></i> 100 %</p>'
    )
    seconds = ", ".join(f"{k} {text(v, Unit.SECONDS)}" for k, v in report["seconds"].items())
    sections = [
        section("Size", _sizes(report, gone)),
        section(
            "What is kept, by role and layer",
            f'<div class="wide">{heatmap(report["axes"], gone)}</div>',
            scale,
        ),
    ]
    if report.get("sparsity"):
        sections.append(section("Zeros", _zeros(report["sparsity"])))
    if report.get("vocabulary"):
        sections.append(section("Vocabulary", bullets(vocabulary_words(report["vocabulary"]))))
    if report["branches"]:
        sections.append(section("Dropped branches", bullets(report["branches"])))
    sections += [
        section("Compared with the masked model", _verification(report["verification"])),
        *_trainings(report),
        section("Recipe", _recipe(report), f"<p>{escape(seconds)}</p>"),
        section("Written", table(("", ""), _written(report))),
    ]
    if report["notes"]:
        sections.append(section("Notes", bullets(report["notes"])))
    sections.append(section("The same again", _reproduce(report)))
    source = str(report["source"].get("id", ""))
    share = f"{100 * removed:.1f} %"
    below = f"{share} of the decoder parameters removed"
    return page(f"{source}, {share} removed", source, below, sections)
