"""Weights are settled column by column, and those to the right make up for each.

Settled is set to zero, or rounded to a level.

Reference: Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in
One-Shot, 2023, Algorithm 1; Frantar et al., GPTQ: Accurate Post-Training Quantization for
Generative Pre-trained Transformers, 2022, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Choose = Callable[[Any, int], Any]
"""From scores [out, width] and the number of their first column to where zeros go, the same shape.
"""

Settle = Callable[[int, Any, Any], Any]
"""From a column's number, the weights [out, d] as they are then, and what a change of a column
weighs [d], to the column's last values [out]. It may look ahead to the end of the block."""


def settled(weight: Any, second: Any, settle: Settle, *, damping: float, block: int) -> Any:
    """Returns weights, float64, each column as it was settled when the sweep came to it.

    A change e of column j costs e² / [H⁻¹]jj, where H is that of columns j and later; it changes
    those by -e / [H⁻¹]jj · [H⁻¹]j. All these inverses are in one Cholesky factor.

    Args:
        weight: [out, d].
        second: [d, d], the second moment of its inputs.
        settle: gives a column's values.
        damping: added to the diagonal of `second`, as a share of its mean.
        block: columns after which those beyond them are changed, all at once.
    """
    import torch

    weight, second = weight.double().clone(), second.double()
    size = float(second.diagonal().mean())
    eye = torch.eye(len(second), dtype=torch.float64)
    damped = second + (damping * size if size > 0 else 1.0) * eye
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True)
    root = factor.diagonal()
    whole = weight.shape[1]
    for start in range(0, whole, block):
        end = min(start + block, whole)
        errors = torch.zeros(len(weight), end - start, dtype=torch.float64)
        for j in range(start, end):
            last = settle(j, weight, root)
            error = (weight[:, j] - last) / root[j]
            weight[:, j:end] -= error[:, None] * factor[j, j:end]
            weight[:, j] = last
            errors[:, j - start] = error
        weight[:, end:] -= errors @ factor[start:end, end:]
    return weight


def swept(
    weight: Any, second: Any, choose: Choose, *, damping: float, block: int, width: int
) -> Any:
    """Returns weights, float64, of which some are zero and the rest made up for these.

    Args:
        weight: [out, d].
        second: [d, d], the second moment of its inputs.
        choose: picks the zeros of `width` columns at a time, when the sweep comes to them.
        damping: added to the diagonal of `second`, as a share of its mean.
        block: columns after which those beyond them are changed, all at once.
        width: columns that are compared with each other; divides `block`.
    """
    import torch

    before = weight == 0  # what was zero stays so
    gone = torch.zeros(weight.shape, dtype=torch.bool)

    def settle(j: int, now: Any, root: Any) -> Any:
        if j % width == 0:
            some = slice(j, min(j + width, now.shape[1]))
            costs = (now[:, some] / root[some]).square()
            gone[:, some] = choose(costs.masked_fill(before[:, some], -1.0), j)
        return now[:, j].masked_fill(gone[:, j], 0.0)

    return settled(weight, second, settle, damping=damping, block=block).masked_fill(gone, 0.0)
