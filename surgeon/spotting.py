"""A written checkpoint compared with its source layer by layer, from the files of both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from surgeon.capture.blocks import Reader, extent, spans, stream
from surgeon.capture.model import capture_model
from surgeon.capture.source import resolve
from surgeon.capture.weights import Weights, same_bits
from surgeon.emit import hf_writing
from surgeon.emit.mismatch import foreign, not_the_plans
from surgeon.emit.pieces import full_shape
from surgeon.report.spots import Side, check_layers, masked_program, needed
from surgeon.report.verify import Verification
from surgeon.runtime.apply import masked
from surgeon.runtime.logits import positions_of

if TYPE_CHECKING:
    from surgeon.pruned import Pruned


def verify_layers(pruned: Pruned, folder: Path, *, trust_remote_code: bool = False) -> Verification:
    """Returns how the layers of a written checkpoint compare with those of the masked reference.

    Each layer is read from the files, the model that Transformers makes of them is captured
    without values, and no more than one layer is held. Tensors that were replaced or folded into
    are compared in fp32; of those the files must hold the rounding, bit for bit.

    Args:
        pruned: the plan with its source.
        folder: what was written.
        trust_remote_code: run modelling code that comes with it and isn't Surgeon's.

    Raises:
        SurgeonError: `verify-failed`; `bad-option` where one layer doesn't fit in memory.
    """
    found = resolve(folder, trust_remote_code=trust_remote_code)
    assert found.weights is not None
    captured = capture_model(found.meta_model())
    stored, program = found.weights, captured.program
    stored.check(program.params)
    _check_names(stored, set(program.param_of), folder)
    fixed = {**captured.constants, **found.computed()}
    old_of = {new: old for old, new in pruned.emission.names.items()}
    block = pruned.memory.block()

    def dense(name: str) -> torch.Tensor:
        if name in pruned.origin.fixed:
            return masked(pruned.selection, name, pruned.full(name))
        full = full_shape(pruned.selection, name)
        wide = _wide(pruned.blocks, name, full, pruned.dtype(name), block)
        return masked(pruned.selection, name, wide)

    def sliced(name: str) -> torch.Tensor:
        if name in fixed:
            value = fixed[name]
            return value.float() if value.is_floating_point() else value
        param = program.param[name]
        old = next((old_of[n] for n in (name, *param.aliases) if n in old_of), None)
        dtype = stored.dtype(name)
        if old is None or not _rounded(pruned, old, dtype):
            return _wide(stored.blocks, name, stored.shape(name), dtype, block)
        want = hf_writing.final(pruned.emission, pruned.selection, pruned.full, old, torch.float32)
        if dtype != pruned.dtype(old) or not same_bits(stored[name], want.to(dtype)):
            raise not_the_plans(folder, name)
        return want

    made = check_layers(
        Side(masked_program(pruned.axes, pruned.plan), dense),
        Side(program, sliced),
        pruned.axes,
        pruned.plan,
        memory=pruned.memory,
        positions=positions_of(found),
    )
    return replace(made, rounded=True)


def check_room(pruned: Pruned) -> None:
    """Refuses, before anything is written, what its layers could not be compared in.

    Raises:
        SurgeonError: `bad-option`, with the number that is needed.
    """
    pruned.memory.check(
        needed(masked_program(pruned.axes, pruned.plan)),
        "the largest layer is compared in fp32 once it is written",
        "or --no-verify now, and surgeon verify OUT --by-layer where there is more",
    )


def _rounded(pruned: Pruned, name: str, dtype: torch.dtype) -> bool:
    """Whether a tensor is stored as the rounding of one that was computed in fp32."""
    computed = name in pruned.rewrites or name in pruned.emission.scales
    return computed and dtype != torch.float32


def _wide(
    read: Reader, name: str, shape: tuple[int, ...], dtype: torch.dtype, size: int
) -> torch.Tensor:
    """Returns a tensor in fp32 (integers as they are), read in blocks."""
    out = torch.empty(shape, dtype=torch.float32 if dtype.is_floating_point else dtype)
    wanted = spans(*extent(shape, dtype.itemsize), size)
    for _, start, values in stream(read, [(name, wanted)], size):
        if out.ndim:
            out[start : start + len(values)] = values
        else:
            out.copy_(values)
    return out


def _check_names(stored: Weights, known: set[str], folder: Path) -> None:
    """Refuses a checkpoint with tensors that the model doesn't have."""
    extra = set(stored.names()) - known
    if extra:
        raise foreign(folder, extra, "its model does not have")
