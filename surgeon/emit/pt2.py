"""A `torch.export` program of torch's own operations, that loads without Surgeon."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from surgeon.emit.files import output_file
from surgeon.emit.scratch import scratch
from surgeon.emit.target import Target
from surgeon.errors import Code, SurgeonError
from surgeon.ir import ParamRef, Program, Ref, TensorType
from surgeon.runtime.lower import TORCH_DTYPES, evaluate, lower

Weights = Mapping[str, torch.Tensor] | Callable[[str], torch.Tensor]
"""Parameters by name."""

Tensors = tuple[torch.Tensor, ...]
"""The inputs of a program in its order, or its outputs."""

Reference = Callable[..., Any]
"""From a program's inputs to its output, or outputs."""

TOLERANCE = 1e-4
"""The largest difference allowed, as a share of the largest output."""

METADATA = "surgeon.json"
"""The name, inside a `.pt2`, of the metadata."""

_PRIMES = (7, 3, 5, 11, 13, 17, 19, 23)


@dataclass(frozen=True)
class Sample:
    """Inputs to compare on. `valid` picks the places of the first output that count: `[B, S]`."""

    name: str
    inputs: Tensors
    valid: torch.Tensor | None = None


@dataclass(frozen=True)
class Written:
    """What was written: the files, and the largest difference from the reference if checked."""

    files: tuple[Path, ...]
    nodes: int
    largest: float | None = None


# --- inputs --------------------------------------------------------------------------------------


def sizes(program: Program, numbers: Sequence[int] = _PRIMES) -> dict[str, int]:
    """Returns a size for each symbol of the program, all different while `numbers` last."""
    return {
        name: numbers[i] if i < len(numbers) else 29 + 2 * i
        for i, name in enumerate(program.symbols)
    }


def example_inputs(
    program: Program, values: Mapping[str, int] | None = None, *, seed: int | None = None
) -> Tensors:
    """Returns inputs of the program's types.

    Args:
        program: any program.
        values: sizes of its symbols; different ones above 1 without it.
        seed: draw integers below what the program looks up with them, and floats of order 1;
            without it all are zero.
    """
    known = sizes(program) if values is None else values
    draw = torch.Generator().manual_seed(seed or 0)
    out: list[torch.Tensor] = []
    for given in program.inputs:
        shape = [_size(s, known.__getitem__) for s in given.type.shape]
        dtype = TORCH_DTYPES[given.type.dtype]
        if seed is None:
            out.append(torch.zeros(shape, dtype=dtype))
        elif dtype.is_floating_point or dtype.is_complex:
            out.append(torch.randn(shape, generator=draw, dtype=dtype))
        else:
            top = rows(program, given.name)
            out.append(torch.randint(0, top, shape, generator=draw).to(dtype))
    return tuple(out)


def _size(size: int | str, symbol: Callable[[str], Any]) -> Any:
    return size if isinstance(size, int) else evaluate(size, symbol)


def rows(program: Program, name: str) -> int:
    """Returns how many values an integer input may take: rows of what it is an index of, or 2."""
    same = {name}
    found: list[int] = []
    for op in program.ops:
        x, table = op.arg(0), op.arg(0)
        if op.target in ("aten.embedding.default", "aten.index_select.default"):
            index = op.arg(1 if "embedding" in op.target else 2)
            axis = op.arg(1) if "select" in op.target else 0
            if isinstance(index, Ref) and index.name in same and isinstance(table, Ref | ParamRef):
                size = program.type_of(table).shape[axis if isinstance(axis, int) else 0]
                found += [size] if isinstance(size, int) else []
        elif isinstance(x, Ref) and x.name in same and op.types[0].dtype.startswith("i"):
            same.update(op.outputs)
    return min(found, default=2)


LANGUAGE = ("input_ids", "attention_mask", "position_ids")


def samples(program: Program) -> tuple[Sample, ...]:
    """Returns inputs to compare on: one place of everything, other sizes than traced, padding.

    Those of a language model are padded on the left, and only its tokens count.
    """
    names = tuple(i.name for i in program.inputs)
    if names != LANGUAGE:
        ways = ((2, 9, 4, 6), (1, 1, 1, 1), (3, 17, 6, 10)) if program.symbols else ((),)
        return tuple(
            Sample(f"sizes {chosen}", example_inputs(program, sizes(program, chosen), seed=i + 1))
            for i, chosen in enumerate(ways)
        )
    top = rows(program, names[0])
    draw = torch.Generator().manual_seed(0)
    out: list[Sample] = []
    for batch, seq, pad in ((2, 11, 4), (1, 1, 0), (3, 17, 9)):
        ids = torch.randint(0, top, (batch, seq), generator=draw)
        mask = torch.ones_like(ids)
        mask[0, :pad] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = tuple(
            t.to(TORCH_DTYPES[i.type.dtype])
            for t, i in zip((ids, mask, positions), program.inputs, strict=True)
        )
        out.append(Sample(f"{batch}×{seq}, {pad} of padding", inputs, mask.bool()))
    return tuple(out)


# --- export --------------------------------------------------------------------------------------


def dynamic_shapes(program: Program) -> tuple[dict[int, Any], ...]:
    """Returns for each input the dimensions that stay dynamic, as `torch.export` takes them."""
    dims = {name: Dim(name) for name in program.symbols}
    return tuple(
        {
            dim: _size(size, dims.__getitem__)
            for dim, size in enumerate(given.type.shape)
            if isinstance(size, str)
        }
        for given in program.inputs
    )


def tensors(program: Program, weights: Weights) -> Callable[[str], torch.Tensor]:
    """Returns a reader of weights in the program's own types.

    Raises:
        SurgeonError: `plan-mismatch` where a weight hasn't the shape that the program has.
    """
    get = weights if callable(weights) else weights.__getitem__

    def read(name: str) -> torch.Tensor:
        type_ = program.param[name].type
        tensor = get(name).detach()
        if tuple(tensor.shape) != type_.shape:
            raise _mismatch(name, type_, tensor)
        tensor = tensor.to(TORCH_DTYPES[type_.dtype]).contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor if whole else tensor.clone()  # a view would be saved with all it views

    return read


def _mismatch(name: str, type_: TensorType, tensor: torch.Tensor) -> SurgeonError:
    return SurgeonError(
        Code.PLAN_MISMATCH,
        f"{name} is not what the program reads",
        at=name,
        why=f"the program has the shape {list(type_.shape)}, the weight {list(tensor.shape)}",
        try_="pass the weights after the plan together with the program after the plan",
    )


def export(program: Program, weights: Weights) -> ExportedProgram:
    """Returns the program as torch's, of torch's own operations, with its weights.

    Sizes that the program names stay dynamic; a size of 1 is as good as any other.

    Raises:
        SurgeonError: `target-refused` where torch's exporter refuses, with the operation.
    """
    module = lower(program, tensors(program, weights))
    try:
        return torch.export.export(
            module,
            example_inputs(program),
            dynamic_shapes=dynamic_shapes(program),
            strict=False,
        )
    except Exception as error:
        raise refused(program, "torch.export", error, _operation(program, error)) from error


def _operation(program: Program, error: Exception) -> str:
    """Returns the place of the operation that torch says it was executing."""
    made = {op.outputs[0]: op for op in program.ops}
    # torch interprets the graph, whose nodes are named after the program's values.
    named = re.search(r"While executing %(\w+)", str(error))
    if named and named[1] in made:
        op = made[named[1]]
        return f"{op.target} in {op.where}"
    return "the whole program"


def refused(program: Program, exporter: str, error: Exception, where: str) -> SurgeonError:
    """Returns the four-part error of an exporter that refuses a program."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return SurgeonError(
        Code.TARGET_REFUSED,
        f"{exporter} refuses the program",
        at=where,
        why=why[:500],
        try_="write a Transformers checkpoint, or express that line in other operations",
        data={"exporter": exporter, "operation": where},
    )


def write_pt2(
    program: Program,
    weights: Weights,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> Written:
    """Writes the program as a `.pt2` that `torch.export.load` opens without Surgeon.

    The file appears when it is whole and, with `check`, has given the program's outputs.

    Args:
        program: the program after the plan.
        weights: after the plan too, by parameter name.
        path: of the file.
        metadata: text entries, stored in the file's own `extra` folder.
        overwrite: replace an existing file.
        check: run it in a process of its own and compare.

    Raises:
        SurgeonError: `target-refused`, `verify-failed`, or the file can't be written.
    """
    get = tensors(program, weights)
    exported = export(program, get)
    size = sum(t.numel() * t.element_size() for t in exported.state_dict.values())
    with output_file(path, overwrite=overwrite, need_bytes=size) as partial:
        extra = {METADATA: json.dumps(dict(metadata or {}), ensure_ascii=False)}
        with partial.open("wb") as file:
            torch.export.save(exported, file, extra_files=extra)
        largest = None
        if check:
            largest = check_pt2(partial, lower(program, get), samples(program))
    return Written((Path(path),), len(exported.graph.nodes), largest)


# --- comparison ----------------------------------------------------------------------------------

_ALONE = """
import sys
sys.modules["surgeon"] = sys.modules["transformers"] = None  # importing either now fails
import torch
program, given, out = sys.argv[1:]
run = torch.export.load(program).module()
with torch.no_grad():
    torch.save([run(*inputs) for inputs in torch.load(given, weights_only=True)], out)
"""


def check_pt2(
    path: str | Path,
    reference: Reference,
    given: Sequence[Sample],
    *,
    tolerance: float = TOLERANCE,
) -> float:
    """Returns the largest difference from `reference`, as a share of its largest output.

    The file is loaded in a process that can import torch and neither Surgeon nor Transformers.

    Raises:
        SurgeonError: `runtime-failed` where it does not load or run there, `verify-failed` where
            it gives other outputs.
    """
    with scratch() as folder:
        inputs, outputs = folder / "inputs.pt", folder / "outputs.pt"
        torch.save([sample.inputs for sample in given], inputs)
        # -I keeps the caller's folder and environment out of what can be imported.
        done = subprocess.run(
            [sys.executable, "-I", "-c", _ALONE, str(path), str(inputs), str(outputs)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise SurgeonError(
                Code.RUNTIME_FAILED,
                "the exported program does not run by torch alone",
                at=str(path),
                why=lines[-1][:500],
                try_="export with the version of torch that is to load it",
                data={"stderr": done.stderr[-4000:]},
            )
        found = torch.load(outputs, weights_only=True)
    return compare(str(path), found, reference, given, tolerance)


def compare(
    where: str,
    found: Sequence[Any],
    reference: Reference,
    given: Sequence[Sample],
    tolerance: float,
) -> float:
    """Returns the largest difference of outputs from the reference's, relative to its largest.

    Raises:
        SurgeonError: `verify-failed` where that is above the tolerance, or an output is no number.
    """
    largest = 0.0
    for sample, result in zip(given, found, strict=True):
        with torch.no_grad():
            wanted = reference(*sample.inputs)
        apart = difference(several(result), several(wanted), sample.valid)
        largest = max(largest, apart)
        if apart > tolerance:
            raise SurgeonError(
                Code.VERIFY_FAILED,
                "the exported program gives other outputs",
                at=f"{where}, inputs {sample.name}",
                why=f"they differ by {apart:.1e} of the largest, {tolerance:.0e} is allowed",
                try_="report this with the plan; the checkpoint itself is not concerned",
                data={"largest": apart, "tolerance": tolerance, "sample": sample.name},
            )
    return largest


def several(result: Any) -> Tensors:
    """Returns what a module returned as a tuple."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def difference(found: Tensors, wanted: Tensors, valid: torch.Tensor | None = None) -> float:
    """Returns the largest |found − wanted| over the largest |wanted|.

    Infinite where shapes differ or anything found is no number, be it at a place that doesn't
    count: it would spread as soon as a later layer looked there.
    """
    largest = 0.0
    for a, b in zip(found, wanted, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a).all()):
            return math.inf
        a, b = (a, b) if valid is None else (a[valid], b[valid])
        if b.numel():
            scale = max(float(b.abs().max()), torch.finfo(torch.float32).tiny)
            largest = max(largest, float((a.double() - b.double()).abs().max()) / scale)
    return largest


TARGET = Target(
    name="pt2",
    description="a torch.export program that torch loads by itself",
    suffix=".pt2",
    write=write_pt2,
)
