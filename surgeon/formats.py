"""Writes results for runtimes with classes of their own: verified, then read back by tensor."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from surgeon.emit.decoder import Decoder, Material, decoder_of
from surgeon.emit.scales import Refused
from surgeon.emit.target import Refusal, get_target, refusal
from surgeon.errors import Code, SurgeonError
from surgeon.report import verify as v

if TYPE_CHECKING:
    from surgeon.pruned import Pruned


def need_bytes(pruned: Pruned) -> int:
    """Returns how much a result takes at most, in the element types that it comes in."""
    return sum(
        pruned.dtype(p.name).itemsize * prod(pruned.selection.shape(p.name))
        for p in pruned.program.params
        if p.kind in ("parameter", "buffer")
    )


def decoder(pruned: Pruned, name: str) -> Decoder:
    """Returns a result in the form that these targets share.

    Raises:
        SurgeonError: `target-refused`.
    """
    source: Any = pruned.source
    try:
        return decoder_of(pruned.axes, pruned.plan, source.config, pruned.origin.fixed)
    except Refused as refused:
        found = Refusal("", str(refused), "--to onnx or --to pt2")
        raise refusal(name, [found]) from refused


def material(pruned: Pruned) -> Material:
    """Returns where a result's tensors come from."""
    return Material(pruned.full, pruned.dtype, pruned.source)


def write(
    pruned: Pruned, name: str, folder: Path, *, verify: bool, **options: Any
) -> tuple[dict[str, Any], v.Verification | None]:
    """Writes a result for a target into an existing folder; returns facts and the comparison.

    Args:
        pruned: the result.
        name: of the target.
        folder: where to.
        verify: compare what the tensors mean with the masked reference, and read them back.
        options: what the target's `write` and `read` take.

    Raises:
        SurgeonError: `target-refused`, `verify-failed`.
    """
    target, found = get_target(name), decoder(pruned, name)
    facts = target.write(folder, found, material(pruned), **options)
    checked = check(pruned, name, folder, **options) if verify else None
    return {"name": name, **facts}, checked


def check(pruned: Pruned, name: str, folder: Path, **options: Any) -> v.Verification:
    """Returns how what was written for a target compares with the masked reference of its plan.

    A model that computes what the target's class does, on the tensors before they are rounded, has
    to give the reference's logits; the file has to hold the rounding of these tensors.

    Raises:
        SurgeonError: `verify-failed`.
    """
    target, found = get_target(name), decoder(pruned, name)
    result = _meaning(pruned, found)
    if target.read is not None:
        target.read(folder, found, material(pruned), **options)
    return replace(result, rounded=True)


def _meaning(pruned: Pruned, found: Decoder) -> v.Verification:
    from surgeon.emit.in_memory import in_memory
    from surgeon.runtime.logits import positions_of

    source: Any = pruned.source
    model = in_memory(found.emission, found.selection, pruned.full, lambda _: torch.float32)
    inputs = v.probes(found.vocab, source.load_tokenizer(), positions=positions_of(source))
    forward = v.transformers_forward(model)
    return v.check(forward, pruned.masked, inputs, pruned.axes, pruned.plan)


def no_option(name: str, option: str) -> SurgeonError:
    """Returns the refusal of an option that a target hasn't."""
    return SurgeonError(
        Code.BAD_OPTION,
        f"--to {name} has no {option}",
        at=f"--to {name} {option}",
        why="it is an option of another target",
        try_="leave it out",
    )
