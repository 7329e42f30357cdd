"""Zeros among the weights of a result: how many, in which pattern, and what they save where."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch

from surgeon.axes.budget import count
from surgeon.axes.consumers import contractions
from surgeon.ir.program import Program

LEAST = 0.01
"""A parameter with a smaller share of zeros than this is not called sparse."""

GROUPS = (*range(2, 9), 16, 32)
"""Lengths of the groups of inputs in which a pattern is looked for."""

SLACK = 0.05
"""What the largest group of a pattern may have over the mean, as a share of its length."""

SAMPLE = 64 * 1024
"""Elements of a parameter whose bytes are zipped, to tell what all would take."""

HALF = 2
"""Bytes of a weight in fp16 and bf16."""

SEMI_ROWS, SEMI_COLUMNS = 32, 64
"""What rows and columns of a matrix have to be multiples of for torch's 2:4 kernels in fp16."""

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Sparse:
    """One parameter with zeros.

    Attributes:
        name: its name.
        shape: its shape in the result.
        zeros: how many weights are zero.
        sparsity: their share.
        pattern: N:M where no more than N of every M weights along the inputs are left; the one
            with the smallest share, or None.
        semi: whether it is 2:4, and of a shape that 2:4 kernels take.
    """

    name: str
    shape: tuple[int, ...]
    zeros: int
    sparsity: float
    pattern: str | None
    semi: bool


def sparsity_of(
    program: Program, names: Iterable[str], get: Read, before: Read, width: Callable[[str], int]
) -> dict[str, Any] | None:
    """Returns what a report says of zeros; None where no parameter has any to speak of.

    Args:
        program: of the result.
        names: parameters with other weights than before; the rest is not looked at.
        get: reads one of the result's.
        before: reads what it would be if nothing were set to zero.
        width: bytes of an element of a parameter as it is stored.
    """
    dims = {c.param: c.dim for c in contractions(program)}
    kept = [name for name in names if name in program.param]
    found = [one for name in kept if (one := sparse(name, get(name), dims.get(name, 1)))]
    if not found:
        return None
    weights = {one.name: one.zeros / one.sparsity for one in found}
    total, zeros = round(sum(weights.values())), sum(one.zeros for one in found)
    every = count(program, [p.name for p in program.params if p.kind == "parameter"])
    return {
        "weights": total,
        "zeros": zeros,
        "sparsity": zeros / total,
        "of_all": zeros / max(1, every),
        "pattern": _common(found),
        "saves": list(_saves(found, get, before, width)),
        "parameters": [asdict(one) for one in found],
    }


def sparse(name: str, tensor: torch.Tensor, dim: int) -> Sparse | None:
    """Returns what there is to say of a parameter's zeros; None where there are few.

    Args:
        name: its name.
        tensor: it.
        dim: its dimension along the inputs.
    """
    zeros = tensor.numel() - int(tensor.count_nonzero())
    if tensor.dim() < 2 or zeros < LEAST * tensor.numel():
        return None
    rows = tensor.movedim(dim, -1).reshape(-1, tensor.shape[dim])
    fits = tensor.dim() == 2 and len(rows) % SEMI_ROWS == 0 and rows.shape[1] % SEMI_COLUMNS == 0
    semi = fits and largest(rows, 4) <= 2
    share = zeros / tensor.numel()
    return Sparse(name, tuple(tensor.shape), zeros, share, pattern_of(rows), semi)


def largest(rows: torch.Tensor, of: int) -> int:
    """Returns how many of every `of` neighbours in a row are not zero at most."""
    padded = torch.nn.functional.pad(rows != 0, (0, -rows.shape[1] % of))
    return int(padded.reshape(len(rows), -1, of).sum(-1).max())


def pattern_of(rows: torch.Tensor) -> str | None:
    """Returns the pattern N:M of smallest share that rows keep to, and of the same the shortest.

    Groups of a pattern are full, or nearly so: what has few weights by chance is no pattern.
    """
    limit = float((rows != 0).float().mean()) + SLACK
    best: tuple[float, int, int] | None = None
    for of in GROUPS:
        # A few rows tell where there is none.
        if of > rows.shape[1] or largest(rows[:16], of) > limit * of:
            continue
        kept = largest(rows, of)
        if kept <= min(limit * of, of - 1):
            best = min(best or (kept / of, of, kept), (kept / of, of, kept))
    return None if best is None else f"{best[2]}:{best[1]}"


def _common(found: Iterable[Sparse]) -> str | None:
    """Returns the pattern that all have, or None."""
    patterns = {one.pattern for one in found}
    return patterns.pop() if len(patterns) == 1 else None


def _saves(
    found: list[Sparse], get: Read, before: Read, width: Callable[[str], int]
) -> Iterable[Mapping[str, Any]]:
    """Yields, place after place, the bytes of these weights as they are stored there."""
    stored = {one.name: prod(one.shape) * width(one.name) for one in found}
    whole = sum(stored.values())
    yield _row(
        "dense runtimes (Transformers, ONNX Runtime, llama.cpp)",
        whole,
        whole,
        "nothing: a zero is stored and multiplied like any other weight",
    )
    semi = [one for one in found if one.semi]
    if semi:
        dense = HALF * sum(prod(one.shape) for one in semi)
        # Half of the values, and two bits for each of them that say where it stood.
        yield _row(
            "2:4 kernels in fp16 or bf16 (NVIDIA Ampere or later, "
            "torch.sparse.to_sparse_semi_structured)",
            dense,
            dense // 2 + dense // 16,
            f"{len(semi)} of {len(found)} sparse matrices can be kept that way",
        )
    else:
        yield _row(
            "2:4 kernels (NVIDIA Ampere or later)",
            whole,
            whole,
            f"nothing: no matrix is 2:4 with rows a multiple of {SEMI_ROWS} and columns of "
            f"{SEMI_COLUMNS}",
        )
    # Of each weight that is left its value and a 32-bit column, of each row where it begins.
    listed = sum(
        (prod(one.shape) - one.zeros) * (width(one.name) + 4) + 4 * (one.shape[0] + 1)
        for one in found
    )
    note = "" if listed < whole else "nothing: columns take more than the zeros do"
    yield _row("compressed rows (CSR, 32-bit columns)", whole, min(listed, whole), note)
    zipped = {
        label: sum(stored[one.name] * _zipped(read(one.name), width(one.name)) for one in found)
        for label, read in (("before", before), ("after", get))
    }
    yield _row(
        "a zipped file (zlib, from a sample)",
        round(zipped["before"]),
        round(zipped["after"]),
        "on disk only; it is unzipped before it runs",
    )


def _row(where: str, before: int, after: int, says: str) -> Mapping[str, Any]:
    share = after / before if before else 1.0
    return {"where": where, "before": before, "after": after, "share": share, "says": says}


def _zipped(tensor: torch.Tensor, width: int) -> float:
    """Returns the share of a parameter's bytes that is left when they are zipped."""
    dtype = torch.float32 if width >= 4 else torch.float16
    data = tensor.detach().reshape(-1)[:SAMPLE].to(dtype).contiguous().numpy().tobytes()
    return len(zlib.compress(data, 1)) / max(1, len(data))
