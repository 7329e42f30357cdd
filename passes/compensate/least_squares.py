"""Maps that lose inputs are solved for anew: least squares towards the dense model's outputs.

Layer after layer, on what the pruned layers before it produce, each map that is summed over a cut
axis gets the weights on its kept inputs whose outputs are nearest to those of the dense map on the
dense model's inputs. A ridge holds them near their old values where the data says little.

Reference: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017, eq. 5;
Frantar and Alistarh, SparseGPT, 2023 (sequential calibration).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from surgeon.plugin import CompensatePass, Context, Plan, Selection, consumers


@dataclass(frozen=True)
class LeastSquares(CompensatePass):
    """The kept weights that come nearest to the dense outputs."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: sequential"})

    ridge: float = 0.01
    """Pull towards the old weights, as a share of the inputs' mean square."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}, it has to be above 0")

    def compensate(self, context: Context, plan: Plan) -> Mapping[str, Any]:
        """Returns by parameter name the full-size tensor that replaces it."""
        import torch

        axes = context.axes
        selection = Selection(axes, plan)
        found = (c.param for cut in plan.cuts for c in consumers(axes, axes.get(cut.axis)))
        params = list(dict.fromkeys(found))

        def solve(param: str, pair: Any) -> Any:
            weight = context.weights(param).double()
            weight = weight if pair.dim == 1 else weight.T
            indices = selection.kept(param)[pair.dim]
            kept = torch.arange(weight.shape[1]) if indices is None else torch.from_numpy(indices)
            second = pair.pruned[kept][:, kept]
            pull = self.ridge * pair.pruned.diagonal().mean()
            left = second + pull * torch.eye(len(kept), dtype=torch.float64)
            right = weight @ pair.cross[:, kept] + pull * weight[:, kept]
            out = torch.zeros_like(weight)
            out[:, kept] = torch.linalg.solve(left, right.T).T
            return (out if pair.dim == 1 else out.T).float().contiguous()

        return context.sequential(plan, params, solve)
