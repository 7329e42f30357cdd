"""Scores channels and branches by how much the loss grows, to second order, when they go.

Without an index a map's output changes by δ, and the mean negative log-likelihood of a token grows
by ½ E[(gᵀδ)²], where g is the gradient of the loss at that output: the Fisher matrix stands for the
Hessian. Input and gradient are taken to be independent, so that the expectation is the product of
two second moments (Kronecker factors): for columns C of a weight W, ½ tr(G · W_C H_CC W_Cᵀ). The
maps that are summed over an axis are taken one by one and their costs added up.

Reference: LeCun et al., Optimal Brain Damage, 1990; Martens and Grosse, Optimizing Neural
Networks with Kronecker-factored Approximate Curvature, 2015 (section 3); Wang et al.,
EigenDamage: Structured Pruning in the Kronecker-Factored Eigenbasis, 2019 (the same for channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from passes.score._reading import added, matrix, readers
from surgeon.plugin import Context, ScorePass, contractions, ending


@dataclass(frozen=True)
class Fisher(ScorePass):
    """The growth of the mean negative log-likelihood of a token, nothing making up for the loss."""

    needs: ClassVar[frozenset[str]] = frozenset(
        {"weights", "activations: second moment", "gradients: outputs"}
    )
    unit: ClassVar[Literal["role", "loss"]] = "loss"

    widest: int = 8192
    """Maps with more outputs than this don't count: a head's Fisher matrix has no room."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if self.widest < 1:
            raise ValueError(f"widest is {self.widest}, it has to be 1 or more")

    def score(self, context: Context) -> dict[str, Any]:
        """Returns growths of the loss, float64, in nats a token."""
        axes = context.axes
        branches = {branch.name: branch for branch in axes.branches}
        out: dict[str, Any] = {}
        for name in context.targets:
            if name in branches:
                out[name] = self._branch(context, branches[name])
                continue
            read = readers(context, name)
            counted = tuple(c for c in read if self._narrow(context, c.param, c.dim))
            if not counted:
                raise context.unable(name, f"what reads it has more than {self.widest} outputs")
            left = [c.param for c in read if c not in counted]
            note = f"score/fisher: {name} counts without {', '.join(left)}: too many outputs"
            if left and note not in context.notes:
                context.notes.append(note)
            out[name] = added(context, name, counted, self._map)
        return out

    def _narrow(self, context: Context, param: str, dim: int) -> bool:
        shape = context.program.param[param].type.shape
        return int(shape[1 - dim]) <= self.widest

    def _map(self, context: Context, consumer: Any) -> Any:
        """Returns the costs [*outer, size] for one map."""
        import torch

        fisher = context.fisher([consumer.param])[consumer.param].second.double()
        second = context.moments([consumer.param])[consumer.param].second.double()
        weight = matrix(context, consumer.param, consumer.dim)
        groups = torch.from_numpy(consumer.groups.reshape(-1, consumer.groups.shape[-1]))
        if groups.shape[-1] == 1:
            columns = weight[:, groups[:, 0]]
            square = second.diagonal()[groups[:, 0]]
            costs = (columns * (fisher @ columns)).sum(0) * square / 2
        else:
            # tr(G W_C H_CC W_Cᵀ) is the sum over C × C of WᵀGW times H, element by element.
            product = (weight.T @ fisher @ weight) * second
            costs = product[groups[:, :, None], groups[:, None, :]].sum((1, 2)) / 2
        return costs.reshape(consumer.groups.shape[:-1]).numpy()

    def _branch(self, context: Context, branch: Any) -> Any:
        """Returns the cost [] of all that a branch adds: ½ tr(G · E[y yᵀ])."""
        last = ending(context.axes, branch)
        if last is None:
            raise context.unable(branch.name, "what it adds comes from no map, or from several")
        if not self._narrow(context, last.param, last.dim):
            raise context.unable(branch.name, f"it has more than {self.widest} outputs")
        if sum(found.param == last.param for found in contractions(context.program)) > 1:
            raise context.unable(branch.name, "the map that ends it serves elsewhere as well")
        moments = context.moments([last.param])[last.param]
        fisher = context.fisher([last.param])[last.param].second.double()
        weight = matrix(context, last.param, last.dim)
        second = weight @ moments.second.double() @ weight.T
        if last.bias is not None:
            bias = context.weights(last.bias).double()
            mean = weight @ moments.mean.double() + bias
            second = second + mean.outer(bias) + bias.outer(mean) - bias.outer(bias)
        return np.asarray(float((fisher * second).sum()) / 2)
