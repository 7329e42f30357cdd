"""Puts axes between two linear maps into the basis in which their indices can best be spared.

Where nothing but linear maps touches an axis (the width of attention's values, between the value
and the output projection), any invertible map may be put on what makes it, and its inverse on what
reads it. The one chosen makes channels whose contributions to the output are uncorrelated, largest
first: without the last ones, what is left is the best approximation of the product by maps of that
rank, measured on calibration data. For a map W on inputs a with second moment H that is the
singular value decomposition of W H^½.

Query heads that share a value head share its basis. The error is then a sum over pairs of heads,
Σ tr(W_sᵀ W_r X H_rs Xᵀ) for a projection 1 - X; the sum of Kronecker products Σ W_sᵀ W_r ⊗ H_rs is
replaced by the single one that is nearest to it.

Reference: Eckart and Young, 1936; Wang et al., SVD-LLM, 2025 (whitening by the inputs' covariance
before the decomposition); Van Loan and Pitsianis, Approximation with Kronecker Products, 1993.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

from passes.transform._basis import Changed, flat, open_to_change, shared
from surgeon.plugin import Axis, Consumer, Context, Gauge, Producer, TransformPass
from surgeon.plugin import consumers as consumers_of
from surgeon.plugin import producers as producers_of


@dataclass(frozen=True)
class ValueOutput(TransformPass):
    """Uncorrelated channels, largest first, wherever any invertible map may be put on an axis."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: second moment"})
    exact: ClassVar[bool] = True

    damping: float = 1e-4
    """Added to the second moment's diagonal, as a share of its mean; a singular one has no inverse.
    """

    rounds: int = 30
    """Steps towards the nearest single Kronecker product, where heads share a basis."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}, it has to be above 0")
        if self.rounds < 1:
            raise ValueError(f"rounds is {self.rounds}, it has to be 1 or more")

    def transform(self, context: Context) -> Mapping[str, Any]:
        """Returns the maps on both sides of each such axis; the model computes what it did."""
        changed = Changed(context.weights)
        for axis in open_to_change(context):
            if axis.gauge is not Gauge.ANY:
                continue
            made, read = producers_of(context.axes, axis), consumers_of(context.axes, axis)
            if not made or not read:
                continue  # such as queries and keys, which meet each other and no map
            why = _obstacle(context, axis, made, read)
            if why:
                context.notes.append(f"transform/value_output: {axis.name} is left as it is: {why}")
                continue
            self._change(context, changed, made, read)
        return changed.found

    def _change(
        self,
        context: Context,
        changed: Changed,
        made: tuple[Producer, ...],
        read: tuple[Consumer, ...],
    ) -> None:
        import torch

        moments = context.moments([consumer.param for consumer in read])
        pairs = [_pairs(changed, c, moments[c.param].second.double()) for c in read]
        weights, inputs = (torch.cat(found, dim=1) for found in zip(*pairs, strict=True))
        first, second = _nearest(weights, inputs, self.rounds)
        size = second.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
        eye = torch.eye(second.shape[-1], dtype=torch.float64)
        second = second + self.damping * size[:, None, None] * eye
        values, vectors = torch.linalg.eigh(second)
        root = (vectors * values.sqrt()[:, None]) @ vectors.mT
        inverse = (vectors / values.sqrt()[:, None]) @ vectors.mT
        # Ascending eigenvalues: the largest contribution comes last, and is put first.
        basis = torch.linalg.eigh(root @ first @ root).eigenvectors.flip(-1)
        forth, back = basis.mT @ inverse, root @ basis
        # Weights keep their size: inputs of unit variance would make those of some models tiny.
        scale = size.sqrt()[:, None, None]
        forth, back = forth * scale, back / scale
        for producer in made:
            changed.along(producer.param, producer.dim, flat(producer.groups), forth)
            if producer.bias is not None:
                changed.along(producer.bias, 0, flat(producer.groups), forth)
        for consumer in read:
            changed.along(consumer.param, consumer.dim, flat(consumer.groups), back.mT)


def _obstacle(
    context: Context, axis: Axis, made: tuple[Producer, ...], read: tuple[Consumer, ...]
) -> str | None:
    """Returns why an axis can't be given another basis, although what uses it would allow it."""
    left = [(p.param, p.dim) for p in made] + [(p.bias, 0) for p in made if p.bias]
    right = [(c.param, c.dim) for c in read]
    others = {(m.param, m.dim) for m in axis.members} - {*left, *right}
    if others:
        return f"{min(others)[0]} is no map that makes it or reads it"
    several = shared(context, [name for name, _ in (*left, *right) if name])
    if several:
        return f"{several} is used in several places"
    outer = prod(context.axes.by_name[name].size for name in axis.outer)
    for found in (*made, *read):
        if prod(found.groups.shape[:-2]) != outer:
            return f"{found.param} doesn't tell apart what encloses it"
    return None


def _pairs(changed: Changed, consumer: Consumer, second: Any) -> tuple[Any, Any]:
    """Returns W_sᵀ W_r and H_rs, both [n, pairs of copies, size, size].

    Args:
        changed: reads the weight.
        consumer: the map; each index of the axis has g copies among its columns.
        second: [d, d], of its inputs.
    """
    import torch

    weight = changed.read(consumer.param)
    weight = weight if consumer.dim == 1 else weight.T
    places = torch.from_numpy(flat(consumer.groups))
    n, size, copies = places.shape
    own = weight[:, places]
    weights = torch.einsum("onis,onjr->nrsij", own, own)
    # [n, size, g, size, g] to the second moment of copy r with copy s.
    inputs = second[places[:, :, :, None, None], places[:, None, None, :, :]]
    inputs = inputs.permute(0, 2, 4, 1, 3)
    return (
        weights.reshape(n, copies * copies, size, size),
        inputs.reshape(n, copies * copies, size, size),
    )


def _nearest(weights: Any, inputs: Any, rounds: int) -> tuple[Any, Any]:
    """Returns the single Kronecker product nearest to a sum of such, [n, size, size] each.

    Power iteration on the rearranged sum: both factors stay symmetric and positive.
    """
    import torch

    first = torch.eye(weights.shape[-1], dtype=weights.dtype).expand(len(weights), -1, -1)
    second = first
    for _ in range(rounds):
        first = first / first.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30)
        second = ((weights * first[:, None]).sum((-1, -2), keepdim=True) * inputs).sum(1)
        share = second / second.norm(dim=(1, 2), keepdim=True).square().clamp(min=1e-30)
        first = ((inputs * share[:, None]).sum((-1, -2), keepdim=True) * weights).sum(1)
    return (first + first.mT) / 2, (second + second.mT) / 2
