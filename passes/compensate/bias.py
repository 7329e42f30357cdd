"""What removed channels contribute on average goes into the biases of the maps that read them.

Of every map that loses inputs: the removed columns times the mean of their inputs over calibration
tokens, in the dense model, is added to the bias. A map without one is left as it is, with a note:
another parameter would be another program.

Reference: An et al., Fluctuation-based Adaptive Structured Pruning for Large Language Models, 2024
(baseline bias compensation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from surgeon.plugin import CompensatePass, Context, Plan, Selection, consumers


@dataclass(frozen=True)
class Bias(CompensatePass):
    """Biases that hold the mean of what was removed."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: norms"})

    def compensate(self, context: Context, plan: Plan) -> Mapping[str, Any]:
        """Returns the biases of the maps that lose inputs, in full size."""
        import torch

        axes = context.axes
        selection = Selection(axes, plan)
        read = {c.param: c for cut in plan.cuts for c in consumers(axes, axes.get(cut.axis))}
        readers = context.program.readers
        out: dict[str, Any] = {}
        without: list[str] = []
        several: list[str] = []
        for param, consumer in read.items():
            bias = consumer.bias
            if bias is None:
                without.append(param)
            elif len(readers[param]) > 1 or len(readers[bias]) > 1:
                several.append(param)
            else:
                weight = context.weights(param).double()
                weight = weight if consumer.dim == 1 else weight.T
                gone = torch.ones(weight.shape[1], dtype=torch.float64)
                kept = selection.kept(param)[consumer.dim]
                gone[slice(None) if kept is None else torch.from_numpy(kept)] = 0
                mean = context.norms([param])[param].mean.double()
                out[bias] = (context.weights(bias).double() + weight @ (mean * gone)).float()
        for found, why in ((without, "has no bias"), (several, "is used in several places")):
            if found:
                rest = f", and {len(found) - 1} more" if len(found) > 1 else ""
                context.notes.append(f"compensate/bias: left as it is, {found[0]} {why}{rest}")
        return out
