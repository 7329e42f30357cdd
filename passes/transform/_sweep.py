"""Weights are set to zero column by column, and those to the right make up for each.

Reference: Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in
One-Shot, 2023, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Choose = Callable[[Any, int], Any]
"""From scores [out, width] and the number of their first column to where zeros go, the same shape.
"""


def swept(
    weight: Any, second: Any, choose: Choose, *, damping: float, block: int, width: int
) -> Any:
    """Returns weights, float64, of which some are zero and the rest made up for these.

    A weight at column j costs w² / [H⁻¹]jj, where H is that of columns j and later; taking it
    changes those by -w / [H⁻¹]jj · [H⁻¹]j. All these inverses are in one Cholesky factor.

    Args:
        weight: [out, d].
        second: [d, d], the second moment of its inputs.
        choose: picks the zeros of `width` columns at a time, when the sweep comes to them.
        damping: added to the diagonal of `second`, as a share of its mean.
        block: columns after which those beyond them are changed, all at once.
        width: columns that are compared with each other; divides `block`.
    """
    import torch

    weight, second = weight.double().clone(), second.double()
    size = float(second.diagonal().mean())
    eye = torch.eye(len(second), dtype=torch.float64)
    damped = second + (damping * size if size > 0 else 1.0) * eye
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    root = factor.diagonal()
    before = weight == 0  # what was zero stays so
    gone = torch.zeros(weight.shape, dtype=torch.bool)
    whole = weight.shape[1]
    for start in range(0, whole, block):
        end = min(start + block, whole)
        errors = torch.zeros(len(weight), end - start, dtype=torch.float64)
        for j in range(start, end):
            if (j - start) % width == 0:
                some = slice(j, min(j + width, end))
                costs = (weight[:, some] / root[some]).square()
                gone[:, some] = choose(costs.masked_fill(before[:, some], -1.0), j)
            error = torch.where(gone[:, j], weight[:, j], 0.0) / root[j]
            weight[:, j:end] -= error[:, None] * factor[j, j:end]
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight.masked_fill(gone, 0.0)
