"""What share of each layer's weights goes, by how much the layer matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from passes.transform._matrices import Matrix
from passes.transform._zeros import of_share
from surgeon.plugin import Context

Allocation = Literal["uniform", "influence", "weights"]


def shares(
    context: Context, found: Sequence[Matrix], allocation: Allocation, ratio: float, spread: float
) -> Mapping[str, float]:
    """Returns by parameter the share of it that goes; over all weights together it is the ratio.

    Layers are put in order of importance. The least important loses most; in between, shares go
    down evenly, none further than `spread` from the ratio.

    Args:
        context: what the pass is handed.
        found: the weights.
        allocation: what importance is.
        ratio: share of all of them.
        spread: largest difference from it.

    Raises:
        SurgeonError: `bad-option` for the influence of layers where there are none.
    """
    if allocation == "uniform":
        return {m.param: ratio for m in found}
    layers: dict[str, list[Matrix]] = {}
    for matrix in found:
        layers.setdefault(_layer(context, matrix.param, allocation), []).append(matrix)
    if allocation == "influence":
        alike = context.similarity(tuple(layers))
        worth = {layer: 1 - alike[layer] for layer in layers}
    else:
        worth = {layer: _lost(context, own, ratio) for layer, own in layers.items()}
    order = sorted(layers, key=lambda layer: worth[layer])
    if len(order) == 1:
        return {m.param: ratio for m in found}
    step = {layer: 1 - 2 * i / (len(order) - 1) for i, layer in enumerate(order)}
    size = {layer: sum(m.size for m in own) for layer, own in layers.items()}
    middle = sum(step[layer] * size[layer] for layer in order) / sum(size.values())
    most = max(abs(step[layer] - middle) for layer in order)
    return {
        m.param: ratio + spread * (step[layer] - middle) / most
        for layer, own in layers.items()
        for m in own
    }


def _layer(context: Context, param: str, allocation: Allocation) -> str:
    """Returns the module path of the layer that a parameter is in; without layers, its own name."""
    paths = dict.fromkeys(branch.layer for branch in context.axes.branches)
    found = [path for path in paths if param.startswith(path + ".")]
    if found:
        return max(found, key=len)
    if allocation == "influence":
        raise context.unable(param, "it is in no layer whose influence there would be")
    return param


def _lost(context: Context, own: Sequence[Matrix], ratio: float) -> float:
    """Returns the share of a layer's squared weights that goes with its smallest ones."""
    lost = whole = 0.0
    for matrix in own:
        rows: Any = matrix.take(context.weights(matrix.param)).double()
        gone = of_share(rows.abs(), ratio, "layer")
        lost += float(rows[gone].square().sum())
        whole += float(rows.square().sum())
    return lost / max(whole, 1e-30)
