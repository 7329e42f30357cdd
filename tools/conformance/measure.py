"""What holds of every role of an architecture, found by running a tiny model of it."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from surgeon.axes import Axes
from surgeon.axes.plan import merged
from surgeon.errors import SurgeonError
from surgeon.ir import Program
from surgeon.opening import Model, open_model
from surgeon.pipeline import Pruned, prune
from surgeon.report import verify as v
from tests import families, mixtures, models
from tests.exactness import Subject, left_padded

DECODERS = (*models.ARCHITECTURES, *families.DECODERS)
MIXTURES = tuple(mixtures.MIXTURES)
MODULES = tuple(families.MODULES)
SHARE = 0.34
SHARES = {"hidden": 0.25, "layers": 0.5}
EXACT = 1e-4
"""The largest difference from the masked model that counts as none, of the largest output."""
FIXED = ("vocab", "positions", "pair", "kernel")
"""Roles that stay by their nature: rows picked by data, the two of a pair, extents of kernels."""
TOGETHER = ("hidden", "kv_heads", "q_per_kv", "ffn")
"""Roles that most configurations express."""

CLASS, FILE, GRAPH, WRONG, PINNED = "class", "file", "graph", "wrong", "pinned"
"""How the result can be had: in a stock class, with the modelling file, as a graph, not at all."""


@dataclass(frozen=True)
class Cell:
    """One role of one architecture.

    Attributes:
        state: one of the above.
        why: what pins it, or why Transformers can't have it.
        difference: of removed and masked, over the largest output.
        inexact: whether the reference's normalisers see kept channels only.
        loaded: the difference of what `from_pretrained` gives, where it is written.
    """

    state: str
    why: str = ""
    difference: float | None = None
    inexact: bool = False
    loaded: float | None = None


@dataclass(frozen=True)
class Line:
    """One architecture: its roles, and the graphs of all of them cut at once."""

    name: str
    cells: dict[str, Cell] = field(default_factory=dict[str, Cell])
    pt2: float | str = ""
    onnx: float | str = ""
    style: str = ""
    seconds: float = 0.0
    refused: str = ""


def _why(error: SurgeonError) -> str:
    return error.why.splitlines()[0]


def _subject(origin: Model, inputs: tuple[torch.Tensor, ...]) -> Subject:
    weights = {p.name: origin.read(p.name) for p in origin.program.params}
    causal = len(inputs) == 3
    return Subject(origin.axes, weights, inputs, inputs[1].bool() if causal else None)


def _pins(axes: Axes, role: str) -> str:
    reasons = (pin for axis in axes.of_role(role) for pin in axis.pins)
    return "; ".join(dict.fromkeys(f"{r.why} ({r.where})" if r.where else r.why for r in reasons))


def _roles(axes: Axes) -> list[str]:
    return [role for role in axes.roles if role not in FIXED]


def _loaded(made: Pruned, folder: Path) -> float:
    """Writes the checkpoint, loads it by Transformers alone, and compares it with the masked."""
    import transformers

    made.save(folder, verify=False)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=made.emission.candidate.remote, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    masked = v.reference(made.axes, made.plan, made.full)
    probes = v.probes(models.RECORDED["Llama"]["config"]["vocab_size"], length=10)[:2]
    forward = v.transformers_forward(model.eval())
    found = v.check(forward, masked, probes, made.axes, made.plan, tolerance=EXACT)
    return found.largest


def _exact(made: Pruned, subject: Subject) -> Cell:
    """Returns whether removing is masking, for graphs."""
    axes = [made.axes.by_name[c.axis] for c in made.plan.cuts]
    inexact = not all(axis.exact for axis in axes)
    try:
        apart = subject.difference(made.plan)
    except SurgeonError as error:
        return Cell(WRONG, _why(error))
    if not apart <= EXACT:
        return Cell(WRONG, f"removed and masked differ by {apart:.0e}", apart, inexact)
    return Cell(GRAPH, "", apart, inexact)


def _written(made: Pruned, folder: Path) -> tuple[str, str, float | None]:
    """Returns how Transformers can have a result, why not better, and how far it is off."""
    try:
        remote = made.emission.candidate.remote
        return (FILE if remote else CLASS), "", _loaded(made, folder)
    except SurgeonError as error:
        return GRAPH, _why(error), None


def _transformers(
    origin: Model, cells: dict[str, Cell], plans: dict[str, Pruned], folder: Path
) -> None:
    """Finds how Transformers can have each role; those that usually can are tried together."""
    usual = [role for role in TOGETHER if role in plans]
    whole = prune(origin, plan=merged(plans[role].plan for role in usual), verify=False)
    state, _, loaded = _written(whole, folder / "together")
    for role, made in plans.items():
        if role in usual and state == CLASS:
            cells[role] = replace(cells[role], state=state, loaded=loaded)
            continue
        how, why, off = _written(made, folder / role)
        cells[role] = replace(cells[role], state=how, why=why, loaded=off)


def _pt2(program: Program, weights: dict[str, Any], folder: Path) -> float | str:
    from surgeon.emit.pt2 import TOLERANCE, compare, samples, write_pt2
    from surgeon.runtime.lower import lower

    path = folder / "model.pt2"
    try:
        write_pt2(program, weights, path, check=False)
        run, given = torch.export.load(path).module(), samples(program)
        with torch.no_grad():
            found = [run(*sample.inputs) for sample in given]
        return compare(path.name, found, lower(program, weights.__getitem__), given, TOLERANCE)
    except SurgeonError as error:
        return _why(error)
    except AssertionError as error:  # torch.export's own, of sizes that its trace left out
        return str(error)


def _onnx(
    program: Program, weights: dict[str, Any], folder: Path, causal: bool
) -> tuple[float | str, str]:
    from surgeon.emit.onnx_decoder import Options, write_decoder

    why = ""
    for style in ("ort", "standard", "generic") if causal else ("generic",):
        path = folder / f"{style}.onnx"
        try:
            found = write_decoder(program, weights, path, options=Options(style, positions=64))
            assert found.largest is not None
            return found.largest, style
        except SurgeonError as error:
            why = why or _why(error)
    return why, ""


def _graphs(made: list[Pruned], subject: Subject, folder: Path, causal: bool) -> dict[str, Any]:
    """Cuts every role at once and writes the program as graphs."""
    plan = merged(one.plan for one in made)
    program, weights = subject.small(plan)
    onnx, style = _onnx(program, weights, folder, causal)
    return {"pt2": _pt2(program, weights, folder), "onnx": onnx, "style": style}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)


def _opened(name: str) -> tuple[Model, tuple[torch.Tensor, ...], bool]:
    if name in (*DECODERS, *MIXTURES):
        model = families.decoder(name) if name in DECODERS else mixtures.tiny(name)
        return open_model(model), left_padded(), True
    module, inputs = families.module(name)
    return open_model(module, example_inputs=inputs), inputs, False


def measure(name: str, *, graphs: bool = True) -> Line:
    """Returns what holds of an architecture.

    Args:
        name: of `DECODERS`, `MIXTURES` or `MODULES`.
        graphs: also write `.pt2` and ONNX files of the model with every role cut.
    """
    start = time.process_time()
    with _quiet(), TemporaryDirectory() as folder:
        try:
            origin, inputs, causal = _opened(name)
            subject = _subject(origin, inputs)
        except SurgeonError as error:
            return Line(name, refused=_why(error), seconds=time.process_time() - start)
        cells: dict[str, Cell] = {}
        plans: dict[str, Pruned] = {}
        for role in _roles(origin.axes):
            axes = origin.axes.of_role(role)
            if role != "layers" and not any(a.prunable and a.size > 1 for a in axes):
                cells[role] = Cell(PINNED, _pins(origin.axes, role))
                continue
            share = {role: SHARES.get(role, SHARE)}
            made = prune(origin, roles=share, score="random", verify=False)
            cells[role] = _exact(made, subject)
            if cells[role].state != WRONG:
                plans[role] = made
        if causal and plans:
            _transformers(origin, cells, plans, Path(folder))
        line = Line(name, cells)
        # `qk` stands for the whole width of a head, rotary pairs included.
        some = ("layers", "qk") if "rotary" in plans else ("layers",)
        kept = [made for role, made in plans.items() if role not in some]
        if graphs and kept:
            line = replace(line, **_graphs(kept, subject, Path(folder), causal))
    return replace(line, seconds=time.process_time() - start)
