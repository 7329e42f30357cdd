"""Writes a checkpoint in fewer bits, and reads it back to see that it is what it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.axes.plan import Selection
from surgeon.capture.exported import DTYPES
from surgeon.capture.weights import SafetensorsWeights
from surgeon.emit import hf_writing
from surgeon.emit import huggingface as hf
from surgeon.emit.lowbit import eight, four
from surgeon.emit.lowbit.grid import SAME
from surgeon.emit.lowbit.modules import Chosen, choose
from surgeon.emit.lowbit.scheme import Scheme
from surgeon.emit.safetensors_file import TensorSpec, write_safetensors
from surgeon.errors import Code, SurgeonError
from surgeon.runtime.apply import Get

HALF = 0.5 * (1 + 2.0**-10)
"""Of a step: the rounding's own error, and a little for that of fp32."""


@dataclass(frozen=True)
class Checked:
    """How stored weights compare with those that they are the rounding of.

    Attributes:
        weights: how many are in fewer bits.
        same: how many of them lost nothing, as they were on these levels before.
        largest: the largest difference, in steps.
    """

    weights: int
    same: int
    largest: float


def write(
    folder: Path,
    emission: hf.Emission,
    selection: Selection,
    get: Get,
    dtype_of: Callable[[str], torch.dtype],
    scheme: Scheme,
    **carried: Any,
) -> Chosen:
    """Writes the checkpoint into an existing folder and returns what became of its weights.

    All tensors are held in their stored form until they are written.

    Args:
        folder: where to.
        emission: how the plan is written in full precision.
        selection: the plan's arithmetic.
        get: reads a parameter in full size, fp32.
        dtype_of: the element type of what stays as it is, and in which the model computes.
        scheme: of the weights in fewer bits.
        carried: what `huggingface.describe` is to put beside it.
    """
    chosen = choose(emission, selection, scheme)
    tensors: dict[str, torch.Tensor] = {}
    said: dict[str, str] = {}
    specs: list[TensorSpec] = []
    plain: list[str] = []
    for old, new in emission.names.items():
        dtype = dtype_of(old)
        if new in chosen.groups:
            wide = hf_writing.final(emission, selection, get, old, torch.float32)
            if scheme.scheme == "int4":
                parts, _ = four.packed(new, wide, chosen.groups[new], dtype)
            else:
                parts, header = eight.packed(new, wide, scheme, dtype)
                said.update(header)
            tensors.update(parts)
            continue
        plain.append(new)
        specs.append(
            TensorSpec(
                new,
                DTYPES[dtype],
                selection.shape(old),
                lambda old=old: hf_writing.final(emission, selection, get, old, dtype_of(old)),
            )
        )
    specs += [
        TensorSpec(name, DTYPES[t.dtype], tuple(t.shape), lambda t=t: t)
        for name, t in tensors.items()
    ]
    four_bits = scheme.scheme == "int4"
    write_safetensors(folder, specs, metadata=None if four_bits else eight.header(said, plain))
    settings = four.settings(chosen) if four_bits else eight.settings(scheme, chosen)
    hf_writing.describe(folder, emission, quantization=settings, **carried)
    return chosen


def check(
    folder: Path,
    emission: hf.Emission,
    selection: Selection,
    get: Get,
    dtype_of: Callable[[str], torch.dtype],
) -> Checked:
    """Returns how a folder's weights compare with a plan's: each is half a step or less away.

    What is in full precision has to be the same, bit for bit.

    Raises:
        SurgeonError: `verify-failed`.
    """
    stored = SafetensorsWeights(folder)
    left = set(stored.names())
    same, largest, count = 0, 0.0, 0
    for old, new in emission.names.items():
        if new in stored:
            left.discard(new)
            want = hf_writing.final(emission, selection, get, old, dtype_of(old))
            if stored.dtype(new) != want.dtype or not torch.equal(stored[new], want):
                raise _differs(folder, new, "the stored tensor is not the plan's, bit for bit")
            continue
        names, read = _form(new, stored)
        if not names:
            raise _differs(folder, new, "the checkpoint doesn't hold it in any form")
        left -= names
        want = hf_writing.final(emission, selection, get, old, torch.float32)
        values, steps = read(new, stored)
        if values.shape != want.shape:
            raise _differs(folder, new, f"it is {list(values.shape)} and not {list(want.shape)}")
        apart = (values - want).abs()
        in_steps = float((apart / steps.masked_fill(steps == 0, 1.0)).max())
        if not in_steps <= HALF:
            raise _differs(folder, new, f"a weight is {in_steps:.3f} of a step from the plan's")
        count += 1
        same += bool((apart <= SAME * want.abs().amax()).all())
        largest = max(largest, in_steps)
    if left:
        raise _differs(folder, min(left), "the plan's result has no such tensor")
    return Checked(count, same, largest)


def _form(name: str, stored: Mapping[str, torch.Tensor]) -> tuple[set[str], Callable[..., Any]]:
    """Returns under which names a weight is stored, and what reads it."""
    if four.names(name) <= set(stored):
        return four.names(name), four.read
    return eight.names(name, stored), eight.read


def _differs(folder: Path, name: str, why: str) -> SurgeonError:
    return SurgeonError(
        Code.VERIFY_FAILED,
        f"{name} is not the rounding of what the plan gives",
        at=str(folder),
        why=why,
        try_="quantise again; if the folder was edited, it is no longer this plan's result",
    )


def memory(model: Any) -> int:
    """Returns the bytes of a model's parameters and buffers once it has run.

    Packed ones count as they are packed; some are unpacked when they are first used.
    """
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    seen: dict[int, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        held: Any = getattr(tensor, "data", tensor)
        names = [*getattr(held, "tensor_data_names", ())]
        names += getattr(held, "optional_tensor_data_names", ())
        parts = [getattr(held, name) for name in names] if names else [held]
        seen[id(tensor)] = sum(part.nbytes for part in parts if part is not None)
    return sum(seen.values())
