"""The weights on a map's kept inputs that come nearest to what it is wanted to make."""

from __future__ import annotations

from typing import Any

from surgeon.plugin import Code, SurgeonError

RIDGE = 0.2
"""Pull towards the old weights, as a share of the inputs' mean square. Some ten thousand tokens
don't determine a matrix: on windows not solved for, errors are least at 0.1 to 0.3. On eighths of
them by themselves 0.4 is neither better nor worse: perplexity 28.96 against 28.92 where a tenth of
SmolLM2-135M goes, 33.44 against 33.47 where a fifth does (by the recipe `default`)."""


def refitted(
    weight: Any, dim: int, kept: Any, second: Any, cross: Any, ridge: float, wanted: Any = None
) -> Any:
    """Returns weights, fp32 and of the old shape, that are zero on inputs that are not kept.

    Args:
        weight: the map's; where the data says little the new weights are like these.
        dim: its dimension that is summed over, of size d.
        kept: numbers of the kept inputs; None for all.
        second: [d, d], the second moment of the inputs.
        cross: [d, d], the mean of y·xᵀ for inputs x; what the old weights make of y is wanted.
        ridge: the pull towards the old weights, as a share of the inputs' mean square.
        wanted: [out, d], the mean of w·xᵀ for what is wanted, w, in place of `cross`.

    Raises:
        SurgeonError: `bad-option` where the ridge is too small for a singular second moment.
    """
    import torch

    old = weight.double() if dim == 1 else weight.double().T
    kept = torch.arange(old.shape[1]) if kept is None else torch.from_numpy(kept)
    wanted = old @ cross if wanted is None else wanted
    pull = ridge * second.diagonal().mean()
    left = second[kept][:, kept] + pull * torch.eye(len(kept), dtype=torch.float64)
    right = wanted[:, kept] + pull * old[:, kept]
    out = torch.zeros_like(old)
    # Positive definite, as its ridge is: half of what other factors take.
    root, failed = torch.linalg.cholesky_ex(left)
    if bool(failed):
        raise SurgeonError(
            Code.BAD_OPTION,
            "weights can't be solved for",
            at=f"ridge: {ridge:g}",
            why="beside so small a ridge the second moment of a map's inputs is singular",
            try_="a larger ridge, or more calibration windows (--samples)",
        )
    out[:, kept] = torch.cholesky_solve(right.T, root).T
    return (out if dim == 1 else out.T).float().contiguous()


def check_folds(folds: int) -> None:
    """Refuses what is no number of parts."""
    if folds < 1:
        raise ValueError(f"folds is {folds}, it has to be 1 or more")
