"""An ONNX graph without a cache, by torch's own exporter: any program goes this way."""

from __future__ import annotations

import copy
import logging
import re
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from surgeon.emit.files import output_file
from surgeon.emit.pt2 import (
    LANGUAGE,
    TOLERANCE,
    Reference,
    Sample,
    Weights,
    Written,
    compare,
    export,
    refused,
    samples,
    tensors,
)
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program
from surgeon.runtime.lower import lower

OPSET = 23
"""The first with an attention operation, which takes grouped heads as they are."""

EXTERNAL_ABOVE = 1 << 30
"""Bytes of weights above which they lie in a file beside; a protobuf file ends at 2 GiB."""

INLINE = 1024
"""Bytes up to which a tensor stays in the graph all the same: shapes and scalars."""


class _Undecomposed(ExportedProgram):
    """A program that the ONNX exporter takes as it is.

    Taking operations apart means tracing the whole model once more with symbolic sizes, which is
    nine tenths of the exporter's time, and the operations of most models have no need of it.
    """

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        """Returns the program itself."""
        return self


@contextmanager
def _quiet() -> Generator[None]:
    """Silences what the exporter says of packages that aren't installed and of its own future."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _convert(exported: ExportedProgram, opset: int) -> Any:
    with _quiet():
        made = torch.onnx.export(
            exported, (), dynamo=True, optimize=False, opset_version=opset, verbose=False
        )
    assert made is not None
    return made.model


def to_onnx(program: Program, weights: Weights, *, opset: int = OPSET) -> Any:
    """Returns the program as an `onnx_ir.Model`, its dynamic sizes named as in the program.

    Args:
        program: any program.
        weights: by parameter name.
        opset: version of the ONNX operations; below 23 attention is spelled out.

    Raises:
        SurgeonError: `target-refused` where torch's exporters refuse, with the operation.
    """
    exported = export(program, weights)
    whole = copy.copy(exported)
    whole.__class__ = _Undecomposed
    try:
        model = _convert(whole, opset)
    except torch.onnx.OnnxExporterError as first:
        # Some operation has to be taken apart. The graph is made anew: the exporter changed it.
        exported = export(program, weights)
        try:
            model = _convert(exported, opset)
        except Exception as error:
            # By now messages name operations that the program hasn't; the first one's it has.
            where = _operation(program, first)
            raise refused(program, "torch.onnx.export", _root(error), where) from error
    return _tidy(model, program)


def _root(error: BaseException) -> Exception:
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    assert isinstance(error, Exception)
    return error


def _operation(program: Program, error: BaseException | None) -> str:
    """Returns the operation that the exporter's messages name, with its place if it is known."""
    made = {op.outputs[0]: op for op in program.ops}
    target = ""
    while error is not None:
        text = str(error)
        if not target and (name := re.search(r"op='([\w.]+)', overload='(\w+)'", text)):
            target = f"{name[1]}.{name[2]}"
        if (node := re.search(r"node %(\w+)", text)) and node[1] in made:
            op = made[node[1]]
            return f"{op.target} in {op.where}"
        error = error.__cause__
    named = [op for op in program.ops if op.target == target]
    return f"{target} in {named[0].where}" if named else target or "the whole program"


def _tidy(model: Any, program: Program) -> Any:
    """Names inputs, outputs and sizes, and drops what says nothing to a runtime."""
    import onnx_ir
    from onnx_ir.passes import common

    graph = model.graph
    rename: dict[str, str] = {}
    for value, given in zip(graph.inputs, program.inputs, strict=True):
        value.name = given.name
        for dim, size in zip(value.shape, given.type.shape, strict=True):
            if isinstance(size, str) and size in program.symbols:
                rename[str(dim.value)] = size
    names = outputs(program)
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name
    onnx_ir.passes.Sequential(
        # The exporter's notes on every node are most of the graph's size.
        common.ClearMetadataAndDocStringPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.shape is not None:
            value.shape = onnx_ir.Shape(_renamed(dim, rename) for dim in value.shape)
    return model


def _renamed(dim: Any, names: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(dim.value))


def outputs(program: Program) -> tuple[str, ...]:
    """Returns the names of the graph's outputs: `logits` where it is a language model's."""
    language = tuple(i.name for i in program.inputs) == LANGUAGE and len(program.outputs) == 1
    return ("logits",) if language else program.outputs


def write_onnx(
    program: Program,
    weights: Weights,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    check: bool = True,
    opset: int = OPSET,
    external_above: int = EXTERNAL_ABOVE,
) -> Written:
    """Writes the program as an ONNX file for ONNX Runtime, in fp32 and without a cache.

    The file appears when it is whole and, with `check`, has given the program's outputs.

    Args:
        program: the program after the plan.
        weights: after the plan too, by parameter name.
        path: of the file; large weights lie beside it, in a file of its name and `.data`.
        metadata: text entries of the model.
        overwrite: replace an existing file.
        check: run it in ONNX Runtime on the CPU and compare.
        opset: version of the ONNX operations.
        external_above: bytes of weights above which they go beside.

    Raises:
        SurgeonError: `target-refused`, `runtime-failed`, `verify-failed`, or the file can't be
            written.
    """
    import onnx_ir

    path = Path(path)
    get = tensors(program, weights)
    model = to_onnx(program, get, opset=opset)
    model.metadata_props.update(metadata or {})
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    beside = path.with_name(path.name + ".data")

    def checked(file: Path) -> float | None:
        given = samples(program)
        return check_onnx(file, lower(program, get), given) if check else None

    if size <= external_above:
        replaced = path.is_file() and path.stat().st_size > 0
        with output_file(path, overwrite=overwrite, need_bytes=size) as partial:
            onnx_ir.save(model, partial, format="protobuf")
            largest = checked(partial)
        if replaced:
            beside.unlink(missing_ok=True)
        return Written((path,), len(model.graph), largest)
    with (
        output_file(path, overwrite=overwrite, need_bytes=size) as partial,
        output_file(beside, overwrite=overwrite) as data,
    ):
        model = onnx_ir.external_data.unload_from_model(
            model, data.parent, data.name, size_threshold_bytes=INLINE
        )
        onnx_ir.save(model, partial, format="protobuf")
        largest = checked(partial)
        point(model, beside.name)
        onnx_ir.save(model, partial, format="protobuf")
        # Between the two renames that follow, an old graph must not find new weights.
        path.unlink(missing_ok=True)
    return Written((path, beside), len(model.graph), largest)


def point(model: Any, location: str) -> None:
    """Has tensors outside the graph read from another file beside it, `location`."""
    import onnx_ir

    for value in model.graph.initializers.values():
        old = value.const_value
        if isinstance(old, onnx_ir.ExternalTensor):
            value.const_value = onnx_ir.ExternalTensor(
                location, old.offset, old.length, old.dtype, shape=old.shape, name=value.name
            )


def check_onnx(
    path: str | Path,
    reference: Reference,
    given: Sequence[Sample],
    *,
    tolerance: float = TOLERANCE,
) -> float:
    """Returns the largest difference of ONNX Runtime on the CPU, relative to the largest output.

    Raises:
        SurgeonError: `runtime-failed` where the file is not valid or does not run,
            `verify-failed` where it gives other outputs.
    """
    import onnx
    import onnxruntime

    settings: Any = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    found: list[Any] = []
    sample = "none"
    try:
        onnx.checker.check_model(str(path))
        session: Any = onnxruntime.InferenceSession(
            path, settings, providers=["CPUExecutionProvider"]
        )
        names = [value.name for value in session.get_inputs()]
        for one in given:
            sample = one.name
            feed = {n: t.numpy() for n, t in zip(names, one.inputs, strict=True)}
            found.append(tuple(torch.from_numpy(a) for a in session.run(None, feed)))
    except Exception as error:
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            "the exported graph does not run in ONNX Runtime",
            at=f"{path}, inputs {sample}",
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            try_="export to pt2, or report this with the plan",
        ) from error
    return compare(str(path), found, reference, given, tolerance)
