"""Writes a pruned model: checkpoint, plan and report, complete or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon import formats
from surgeon.axes.plan import Plan, dropped
from surgeon.axes.renumber import MAP_FILE
from surgeon.capture.configs import config_and_class, quantised, read_config
from surgeon.capture.exported import DTYPES
from surgeon.capture.weights import SafetensorsWeights, same_bits, stored_tensors
from surgeon.emit import hf_writing
from surgeon.emit.files import output_folder
from surgeon.emit.hf_config import VLLM_TYPE
from surgeon.emit.mismatch import foreign, not_the_plans
from surgeon.emit.safetensors_file import TensorSpec, write_safetensors_file
from surgeon.emit.target import TRANSFORMERS, find_targets, get_target
from surgeon.errors import Code, SurgeonError, no_weights
from surgeon.report import verify as v
from surgeon.report.curve import curve, curves_of
from surgeon.report.page import report_page
from surgeon.runtime.graph_file import REWRITES
from surgeon.runtime.logits import positions_of

if TYPE_CHECKING:
    from surgeon.pruned import Pruned, Report

PLAN_FILE = "plan.json"
REWRITES_FILE = REWRITES
REPORT_FILE = "surgeon.json"
PAGE_FILE = "report.html"
CURVE_FILE = "loss.svg"


@dataclass(frozen=True)
class Form:
    """What was written for one target.

    Attributes:
        target: what a report says of it.
        notes: what the user should know of it.
        verification: how it compares with the masked reference, where that was asked for.
        seconds: by what they were spent on.
    """

    target: Mapping[str, Any]
    notes: tuple[str, ...]
    verification: v.Verification | None
    seconds: Mapping[str, float]


def save(pruned: Pruned, path: Path, *, overwrite: bool, verify: bool) -> Report:
    """Writes the result into the folder `path` and returns the completed report.

    Several targets have a folder each in it, by their names.

    Raises:
        SurgeonError: `bad-output`, `disk-full`, `target-refused`, `verify-failed`.
    """
    if pruned.origin.tensors is None:
        raise no_weights(pruned.origin.id)
    names = pruned.targets
    if pruned.source is None:  # a module has no class: its program is written
        names = tuple("pt2" if name == TRANSFORMERS else name for name in names)
    each = {name: replace(pruned, target=name) if len(names) > 1 else pruned for name in names}
    need = sum(_need(one, name) for name, one in each.items())
    report = pruned.report
    with output_folder(path, overwrite=overwrite, need_bytes=need) as folder:
        forms: dict[str, Form] = {}
        for name, one in each.items():
            place = folder if len(names) == 1 else folder / name
            place.mkdir(exist_ok=True)
            forms[name] = _written(one, name, place, verify=verify)
        write_plan(folder, pruned)
        report = _told(report, forms)
        write_report(folder, pruned, report)
    return report


def _told(report: Report, forms: Mapping[str, Form]) -> Report:
    """Returns a report that tells of what was written."""
    told = tuple(forms.values())
    target = told[0].target
    if len(told) > 1:
        size = sum(form.target["bytes"] for form in told)
        every = {name: form.target for name, form in forms.items()}
        target = {"name": ",".join(forms), "bytes": size, "targets": every}
    notes = dict.fromkeys((*report.notes, *(note for form in told for note in form.notes)))
    seconds = dict(report.seconds)
    for form in told:
        for what, spent in form.seconds.items():
            seconds[what] = seconds.get(what, 0.0) + spent
    report = replace(report, notes=tuple(notes), target=target, seconds=seconds)
    found = [form.verification for form in told if form.verification is not None]
    return replace(report, verification=v.together(found).to_json()) if found else report


def _need(pruned: Pruned, name: str) -> int:
    """Returns about how many bytes a target takes."""
    if name == TRANSFORMERS:
        emission = pruned.emission
        return sum(
            pruned.dtype(old).itemsize * prod(pruned.selection.shape(old)) for old in emission.names
        )
    if get_target(name).kind == "checkpoint":
        return formats.need_bytes(pruned)
    return sum(4 * prod(pruned.selection.shape(p.name)) for p in pruned.program.params)


def _written(pruned: Pruned, name: str, folder: Path, *, verify: bool) -> Form:
    """Writes a result for one target into an existing folder."""
    if name == TRANSFORMERS:
        return _checkpoint(pruned, folder, verify=verify)
    if get_target(name).kind == "graph":
        return _graph(pruned, name, folder, verify=verify)
    start = time.perf_counter()
    facts, found = formats.write(pruned, name, folder, verify=verify)
    notes = tuple(facts.pop("notes"))
    return Form(facts, notes, found, {"write": time.perf_counter() - start})


def _checkpoint(pruned: Pruned, folder: Path, *, verify: bool) -> Form:
    """Writes a result as a Transformers checkpoint into an existing folder."""
    assert pruned.source is not None
    emission, source = pruned.emission, pruned.source
    dtype = hf_writing.main_dtype(emission, pruned.selection, pruned.dtype)
    emission = hf_writing.with_dtype(emission, dtype)
    if verify and not pruned.fits:
        from surgeon.spotting import check_room

        check_room(pruned)
    start = time.perf_counter()
    hf_writing.write(
        folder,
        emission,
        pruned.selection,
        pruned.full,
        pruned.dtype,
        read=pruned.blocks,
        block=pruned.memory.block(),
        tokenizer_files=source.tokenizer_files,
        tokenizer=source.tokenizer,
        generation_config=source.generation_config,
    )
    seconds = {"write": time.perf_counter() - start}
    target = {
        "name": "transformers",
        "architecture": emission.architecture,
        "remote_code": emission.candidate.remote,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
    }
    found = None
    if verify:
        start = time.perf_counter()
        found = _verify(pruned, folder)
        seconds["verify"] = time.perf_counter() - start
    return Form(target, emission.notes, found, seconds)


def moved(pruned: Pruned, loaded: Any) -> float:
    """Returns the largest difference of logits from the masked reference's, of the largest."""
    masked, source = pruned.masked, pruned.origin.source
    vocab = int(getattr(source, "config").vocab_size)  # noqa: B009
    inputs = v.probes(vocab, positions=positions_of(source))
    forward = v.transformers_forward(loaded)
    apart = v.differences(lambda *args: forward(*args).float(), lambda *args: masked(*args), inputs)
    return max(d.largest for d in apart)


def write_plan(folder: Path, pruned: Pruned) -> None:
    """Writes the plan, and beside it the tensors that it replaces others with."""
    plan = replace(pruned.plan, rewrites=tuple(sorted(pruned.rewrites)))
    (folder / PLAN_FILE).write_text(plan.to_json() + "\n", encoding="utf-8")
    if pruned.rewrites:
        specs = [
            TensorSpec(name, DTYPES[t.dtype], tuple(t.shape), lambda t=t: t.contiguous())
            for name, t in sorted(pruned.rewrites.items())
        ]
        write_safetensors_file(folder / REWRITES_FILE, specs, metadata={"format": "pt"})


def write_report(folder: Path, pruned: Pruned, report: Report) -> None:
    """Writes what the prune did, for programs and for people."""
    if report.vocabulary:
        _write_map(folder / MAP_FILE, pruned.plan)
    (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
    gone, axes = dropped(pruned.axes, pruned.plan), pruned.axes.axes
    names = {axis.name for axis in axes if all(m.param in gone for m in axis.members)}
    told = json.loads(report.to_json())
    page = report_page(told, names)
    (folder / PAGE_FILE).write_text(page, encoding="utf-8")
    if trainings := curves_of(told):
        (folder / CURVE_FILE).write_text(curve(trainings) + "\n", encoding="utf-8")


def _write_map(file: Path, plan: Plan) -> None:
    """Writes which token was which: the old id of each new one, in order."""
    found = plan.by_axis[plan.renumbered[0]]
    data = {"before": found.size, "after": found.count, "old_ids": list(found.kept)}
    file.write_text(json.dumps(data) + "\n", encoding="utf-8")


def read_plan(path: Path) -> tuple[Plan, dict[str, torch.Tensor]]:
    """Returns the plan of a folder or a plan file, and the tensors of its rewrites.

    Raises:
        SurgeonError: `missing-file` or `bad-plan`.
    """
    file = path / PLAN_FILE if path.is_dir() else path
    try:
        plan = Plan.from_json(file.read_text(encoding="utf-8"), str(file))
    except OSError as error:
        raise SurgeonError(
            Code.MISSING_FILE,
            "there is no plan to read",
            at=str(file),
            why=error.strerror or str(error),
            try_="give a folder that `surgeon prune` wrote, or its plan.json",
        ) from error
    except UnicodeDecodeError as error:
        raise SurgeonError(
            Code.BAD_PLAN,
            "this is no plan",
            at=str(file),
            why=f"it is not UTF-8 text: {error.reason}",
            try_="use the plan.json that a prune wrote",
        ) from error
    if not plan.rewrites:
        return plan, {}
    stored = file.with_name(REWRITES_FILE)
    if not stored.exists():
        raise SurgeonError(
            Code.MISSING_FILE,
            "the plan's rewrites are missing",
            at=str(stored),
            why=f"the plan replaces {len(plan.rewrites)} parameters whose tensors lie beside it",
            try_="keep plan.safetensors beside plan.json",
        )
    found = stored_tensors(stored)
    if lacking := sorted({*plan.rewrites} - found.keys()):
        raise SurgeonError(
            Code.BAD_PLAN,
            "the plan's rewrites are not whole",
            at=str(stored),
            why=f"there is no tensor {lacking[0]}",
            try_="keep the plan.safetensors that was written with plan.json",
        )
    return plan, {name: found[name] for name in found}


def _verify(pruned: Pruned, folder: Path) -> v.Verification:
    """Compares what was written with the masked reference."""
    source = pruned.source
    assert source is not None
    if not pruned.fits:
        from surgeon.spotting import verify_layers

        return verify_layers(pruned, folder)
    return verify_folder(pruned, folder, source.load_tokenizer())


def load_transformers(
    folder: Path, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> Any:
    """Returns the model of a checkpoint that Surgeon wrote, loaded by Transformers.

    Raises:
        SurgeonError: `remote-code` where its modelling file is not the one that Surgeon ships.
    """
    import transformers

    path = folder / "config.json"
    remote = config_and_class(path, read_config(path), trust_remote_code)[2]
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=remote, dtype=dtype or "auto"
    ).eval()


def verify_folder(
    pruned: Pruned, folder: Path, tokenizer: Any = None, *, trust_remote_code: bool = False
) -> v.Verification:
    """Returns how a written checkpoint compares with the masked reference of its plan.

    The logits of the plan applied in fp32 are compared; a checkpoint in a smaller element type
    must hold the rounding of that, bit for bit, and what the rounding does is reported.

    Raises:
        SurgeonError: `verify-failed`.
    """
    emission, selection = pruned.emission, pruned.selection
    if quantised(read_config(folder / "config.json")) is not None:
        from surgeon.emit.lowbit.write import check

        found = pruned.verify(tokenizer)
        check(folder, emission, selection, pruned.full, pruned.origin.dtype)
        loaded = load_transformers(folder, trust_remote_code=trust_remote_code)
        return replace(found, cast=moved(pruned, loaded))
    masked = v.reference(pruned.axes, pruned.plan, pruned.full)

    def forward(*args: torch.Tensor) -> torch.Tensor:
        return masked(*args)

    source = pruned.source
    vocab = int(getattr(source, "config").vocab_size)  # noqa: B009
    inputs = v.probes(vocab, tokenizer, positions=positions_of(source))
    _same_bits(pruned, folder)
    loaded = load_transformers(folder, torch.float32, trust_remote_code=trust_remote_code)
    half = [n for n in emission.names if pruned.dtype(n) != torch.float32]
    if not half:
        found = v.check(v.transformers_forward(loaded), forward, inputs, pruned.axes, pruned.plan)
        return replace(found, rounded=True)
    found_cast = v.differences(v.transformers_forward(loaded), forward, inputs)
    state = dict(loaded.state_dict())
    with torch.no_grad():
        for old, new in emission.names.items():
            state[new].copy_(hf_writing.final(emission, selection, pruned.full, old, torch.float32))
    found = v.check(v.transformers_forward(loaded), forward, inputs, pruned.axes, pruned.plan)
    return replace(found, rounded=True, cast=max(d.largest for d in found_cast))


def _same_bits(pruned: Pruned, folder: Path) -> None:
    stored = SafetensorsWeights(folder)
    emission = pruned.emission
    for old, new in emission.names.items():
        want = hf_writing.final(emission, pruned.selection, pruned.full, old, pruned.dtype(old))
        if new not in stored or not same_bits(stored[new], want):
            raise not_the_plans(folder, new)
    extra = set(stored.names()) - set(emission.names.values())
    if extra:
        raise foreign(folder, extra, "the plan does not give")


def written(folder: Path) -> Mapping[str, Path]:
    """Returns where an earlier prune wrote for which target: there, or in a folder of its own."""
    known = find_targets()
    inside = [name for name in (TRANSFORMERS, *known) if (folder / name).is_dir()]
    if inside and not (folder / "config.json").is_file():
        return {name: folder / name for name in inside}
    for name, info in known.items():
        if info.suffix and (folder / f"model{info.suffix}").is_file():
            return {name: folder}
    file = folder / "config.json"
    if file.is_file() and read_config(file).get("model_type") == VLLM_TYPE:
        return {"vllm": folder}
    return {TRANSFORMERS: folder}


def verify_written(
    pruned: Pruned, name: str, folder: Path, *, trust_remote_code: bool = False
) -> v.Verification:
    """Returns how what was written for a target compares with the masked reference.

    Args:
        pruned: the plan with its model again.
        name: of the target.
        folder: where it lies.
        trust_remote_code: run modelling code that comes with a checkpoint.

    Raises:
        SurgeonError: `verify-failed`.
    """
    pruned = replace(pruned, target=name)
    if name == TRANSFORMERS:
        tokenizer = pruned.source.load_tokenizer() if pruned.source else None
        return verify_folder(pruned, folder, tokenizer, trust_remote_code=trust_remote_code)
    target = get_target(name)
    if target.kind == "checkpoint":
        return formats.check(pruned, name, folder)
    return _verify_graph(pruned, folder / f"model{target.suffix}")


def _verify_graph(pruned: Pruned, path: Path) -> v.Verification:
    """Returns how a graph file, run where it runs, compares with the masked reference."""
    from surgeon.emit import onnx_decoder, onnx_graph, pt2

    onnx = path.suffix == ".onnx"
    if onnx and onnx_decoder.is_cached(path):
        vocab = pt2.rows(pruned.program, pruned.program.inputs[0].name)
        largest = onnx_decoder.check_decoder(path, pruned.masked, vocab)
    else:
        given = pt2.samples(pruned.program)
        check = onnx_graph.check_onnx if onnx else pt2.check_pt2
        largest = check(path, pruned.masked, given)
    found = pruned.verify()
    both = (*found.probes, v.Difference(path.name, largest))
    return replace(found, probes=both, largest=max(found.largest, largest))


def _graph(pruned: Pruned, name: str, folder: Path, *, verify: bool) -> Form:
    """Writes the result as a graph, which has no class that could refuse it."""
    target, source = get_target(name), pruned.source
    checked = pruned.verify() if verify else None
    # What is written is compared with this program once more, where it runs.
    if target.name == "onnx":
        from surgeon.emit.onnx_folder import options_for, write_folder

        options = options_for(pruned.program, source)
        found = write_folder(folder, pruned.program, pruned.tensor, source, options, check=verify)
        return Form(found.target(), tuple(found.notes), checked, {})
    file = folder / f"model{target.suffix}"
    target.write(pruned.program, pruned.tensor, file, check=verify)
    if source is not None:
        hf_writing.carry(folder, source.tokenizer_files, source.tokenizer)
    size = sum(f.stat().st_size for f in folder.glob("model*"))
    return Form({"name": target.name, "bytes": size, "dtype": "float32"}, (), checked, {})
