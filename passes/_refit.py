"""The weights on a map's kept inputs that come nearest to what it is wanted to make."""

from __future__ import annotations

from typing import Any

RIDGE = 0.2
"""Pull towards the old weights, as a share of the inputs' mean square. Some ten thousand tokens
don't determine a matrix: on windows not solved for, errors are least at 0.1 to 0.3."""


def refitted(weight: Any, second: Any, wanted: Any, kept: Any, ridge: float) -> Any:
    """Returns weights, float64 [out, d], that are zero on inputs that are not kept.

    Args:
        weight: [out, d], float64; where the data says little the new weights are like these.
        second: [d, d], the second moment of the inputs.
        wanted: [out, d], the mean of w·xᵀ for inputs x and what is wanted of them, w.
        kept: numbers of the kept inputs.
        ridge: the pull towards the old weights, as a share of the inputs' mean square.
    """
    import torch

    pull = ridge * second.diagonal().mean()
    left = second[kept][:, kept] + pull * torch.eye(len(kept), dtype=torch.float64)
    right = wanted[:, kept] + pull * weight[:, kept]
    out = torch.zeros_like(weight)
    out[:, kept] = torch.linalg.solve(left, right.T).T
    return out
