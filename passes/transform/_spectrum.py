"""The singular values of a map, as it is weighed by what it reads and by what reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spectrum:
    """A map W [n, d] in the metric ‖Lᵀ·ΔW·S‖², for moments S·Sᵀ of inputs and L·Lᵀ of outputs.

    Attributes:
        energies: [k], f64, the squared singular values of Lᵀ·W·S, largest first.
        vectors: [n, k], f64, the left singular vectors; None where only values were asked for.
        shaped: [n, d], f64, Lᵀ·W.
        root: L [n, n], lower triangular, or None for the identity.
    """

    energies: Any
    vectors: Any
    shaped: Any
    root: Any

    def halves(self, rank: int) -> tuple[Any, Any]:
        """Returns up [n, rank] and down [rank, d], whose product is the nearest of that rank.

        What the map makes is projected on the first singular vectors: L⁻ᵀ·U·Uᵀ·Lᵀ·W. Of the map in
        the metric that is the truncated decomposition, and S need not have an inverse.
        """
        import torch

        left = self.vectors[:, :rank]
        down = left.mT @ self.shaped
        if self.root is not None:
            left = torch.linalg.solve_triangular(self.root.mT, left, upper=True)
        return left.contiguous(), down.contiguous()


def spectrum(
    weight: Any,
    inputs: Any = None,
    outputs: Any = None,
    *,
    damping: float = 0.0,
    vectors: bool = True,
) -> Spectrum:
    """Returns the spectrum of a map.

    Args:
        weight: [n, d].
        inputs: [d, d], second moment of what it reads; the identity without it.
        outputs: [n, n], second moment of the loss's gradients at what it makes; likewise.
        damping: added to the diagonal of `outputs`, as a share of its mean.
        vectors: whether more than the values is wanted.
    """
    import torch

    shaped, root = weight.double(), None
    if outputs is not None:
        moment = outputs.double()
        mean = moment.diagonal().mean().clamp(min=1e-30)
        root = torch.linalg.cholesky(moment + damping * mean * torch.eye(len(moment)))
        shaped = root.mT @ shaped
    # Of both products of Lᵀ·W·S with itself, the smaller one has all the values.
    wide = shaped.shape[0] <= shaped.shape[1]
    if wide:
        gram = shaped @ shaped.mT if inputs is None else shaped @ inputs.double() @ shaped.mT
        right = None
    else:
        right = shaped
        if inputs is not None:
            values, basis = torch.linalg.eigh(inputs.double())
            right = shaped @ (basis * values.clamp(min=0).sqrt())
        gram = right.mT @ right
    gram = (gram + gram.mT) / 2
    if not vectors:
        found = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
        return Spectrum(found, None, shaped, root)
    values, basis = torch.linalg.eigh(gram)
    values, basis = values.flip(0).clamp(min=0), basis.flip(1)
    if right is not None:
        # Not divided by singular values, of which some may be nought: columns stay orthonormal.
        basis = torch.linalg.qr(right @ basis).Q
    return Spectrum(values, basis, shaped, root)
