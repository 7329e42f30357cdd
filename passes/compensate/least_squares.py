"""Maps that lose inputs are solved for anew: least squares towards what the dense model computes.

Layer after layer, on what the pruned layers before it produce, each map that is summed over a cut
axis gets the weights on its kept inputs that come nearest to a target: what the dense map makes of
the dense model's inputs, or that and what the residual stream lacks by then, so that a branch makes
up for the layers before it too. A ridge holds weights near their old values where the data says
little.

SmolLM2-135M, 20 % of the decoder from MLPs alone by optimal brain surgeon in units of the loss,
eight windows of WikiText-2's test set that are not in the project's protocol: towards the branch
28.0, towards the stream 26.5, with a ridge of 0.2 instead of 0.01 26.2 (dense 18.7).

The mean of what parts of the windows come to, each on a pruned model of its own, is better on other
text than what all of them come to at once, and takes no longer. Another plan, twelve windows of
1,024: all 64 windows at once 39.86; a half of them 41.19, the mean of both halves 39.58; quarters
42.6 to 43.4, the mean of three 39.91, of four 39.45 (with a ridge of 0.1 39.73). Eight are no worse
than four. To solve as well for maps that lose nothing but end a branch behind others that do is no
better: 26.09 instead of 26.05 where a tenth goes (the recipe `default` on the project's protocol).

Reference: He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017, eq. 5;
Frantar and Alistarh, SparseGPT, 2023 (sequential calibration); Breiman, Bagging Predictors, 1996,
and Wortsman et al., Model soups, 2022 (means of solutions).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from passes._refit import RIDGE, check_folds, refitted
from surgeon.plugin import CompensatePass, Context, Plan, Selection, consumers


@dataclass(frozen=True)
class LeastSquares(CompensatePass):
    """The kept weights that come nearest to the dense outputs."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: sequential"})

    ridge: float = RIDGE
    """Pull towards the old weights, as a share of the inputs' mean square."""

    towards: Literal["stream", "branch"] = "stream"
    """What a map whose outputs are added to the residual stream is solved for: that the stream
    after it be the dense model's, or that what it adds be."""

    folds: int = 1
    """Parts of the calibration windows that all is solved for on by itself; the mean stays. Where
    there are fewer windows, each is a part."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if not self.ridge > 0:
            raise ValueError(f"ridge is {self.ridge}, it has to be above 0")
        check_folds(self.folds)

    def compensate(self, context: Context, plan: Plan) -> Mapping[str, Any]:
        """Returns by parameter name the full-size tensor that replaces it."""
        axes = context.axes
        selection = Selection(axes, plan)
        found = (c.param for cut in plan.cuts for c in consumers(axes, axes.get(cut.axis)))
        params = list(dict.fromkeys(found))

        def solve(param: str, pair: Any) -> Any:
            kept = selection.kept(param)[pair.dim]
            wanted = pair.wanted if self.towards == "stream" else None
            weight = context.weights(param)
            return refitted(weight, pair.dim, kept, pair.pruned, pair.cross, self.ridge, wanted)

        cross = self.towards == "branch"
        return context.sequential(plan, params, solve, cross=cross, folds=self.folds)
