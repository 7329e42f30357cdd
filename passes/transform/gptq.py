"""Rounds weights to four bits so that outputs change least: later weights make up for each.

Column after column is rounded to the levels of its group, and the columns not yet rounded change so
that the map's outputs on calibration data stay nearest to what they were, layer after layer, on
what the rounded layers before it produce. What it gives is on the levels, and `quantize: int4`
with the same group packs it as it is. It belongs last: whatever changes weights afterwards takes
them off.

Reference: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers, 2022, Algorithm 1 (columns in their order; steps of a group fixed when it is reached).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.transform._matrices import Matrix, matrices
from passes.transform._sweep import settled
from surgeon.plugin import Context, TransformPass, group_for, levels_of, step_of


@dataclass(frozen=True)
class Gptq(TransformPass):
    """Weights on the levels of four bits, with least change of outputs."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: sequential"})
    exact: ClassVar[bool] = False

    group: int = 32
    """Neighbouring weights of a row that share a step; fewer where it doesn't divide a row."""

    damping: float = 0.01
    """Added to the second moment's diagonal, as a share of its mean."""

    block: int = 128
    """Columns that are settled before those beyond them change."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if self.group < 8:
            raise ValueError(f"group is {self.group}, it has to be 8 or more")
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}, it has to be above 0")
        if self.block < 1:
            raise ValueError(f"block is {self.block}, it has to be 1 or more")

    def transform(self, context: Context) -> Mapping[str, Any]:
        """Returns by name the weights on their levels.

        Raises:
            SurgeonError: `bad-option` where it stands before a selection, or there is no weight
                that it can round.
        """
        selected = context.budget.ratio is not None or bool(context.budget.roles)
        if selected and context.plan.empty:
            why = "it stands before the selection, and channels that go take rows off: put it last"
            raise context.unable("weights that are to be rounded", why)
        found: dict[str, Matrix] = {}
        groups: dict[str, int] = {}
        for matrix in matrices(context):
            if matrix.kernel:
                raise context.unable(matrix.param, "a convolution's inputs are not gathered")
            if not matrix.separable:
                raise context.unable(matrix.param, "other inputs are left in other rows")
            rows = matrix.shape[matrix.dim]
            group = group_for(rows, self.group)
            if group is None:
                context.notes.append(
                    f"transform/gptq: {matrix.param} stays as it is: no group from 8 to "
                    f"{self.group} divides its {rows} inputs"
                )
                continue
            found[matrix.param], groups[matrix.param] = matrix, group

        def solve(param: str, pair: Any) -> Any:
            matrix, full = found[param], context.weights(param)
            kept = matrix.inputs
            second = pair.pruned if kept is None else pair.pruned[kept][:, kept]
            rows = matrix.take(full)[:, 0]
            return matrix.put(full, self._rounded(rows, second, groups[param])[:, None])

        return context.sequential(context.plan, found, solve, cross=False)

    def _rounded(self, rows: Any, second: Any, group: int) -> Any:
        """Returns rows [out, d], float64, on their levels."""
        steps: list[Any] = []

        def settle(j: int, now: Any, root: Any) -> Any:
            if j % group == 0:
                steps[:] = [step_of(now[:, j : j + group]).double()]
            return levels_of(now[:, j, None], steps[0])[:, 0] * steps[0]

        block = max(group, self.block // group * group)
        return settled(rows, second, settle, damping=self.damping, block=block)
