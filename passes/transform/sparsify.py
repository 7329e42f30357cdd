"""Sets single weights to zero: those of least size, least effect on outputs, or N of every M.

Shapes stay what they are, so a dense runtime gains nothing; what zeros save, and where, stands in
the report. Magnitude and random numbers need no text. Wanda weighs a weight by the norm of what it
is multiplied with; SparseGPT by what the output loses when the other weights of the row make up for
it, which they then do. Layer after layer, on what the sparse layers before it produce.

Reference: Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024,
eq. 1; Frantar and Alistarh, SparseGPT, 2023, Algorithm 1; Mishra et al., Accelerating Sparse Deep
Neural Networks, 2021 (2:4); Han et al., Learning both Weights and Connections, 2015 (in rounds);
Men et al., ShortGPT, 2024, eq. 1 (block influence).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from passes.transform._importance import Allocation, shares
from passes.transform._matrices import Matrix, matrices
from passes.transform._sweep import swept
from passes.transform._zeros import Group, Pattern, below, of_pattern, of_share, unread
from surgeon.plugin import Context, TransformPass


@dataclass(frozen=True)
class Sparsify(TransformPass):
    """Zeros among the weights of maps and convolutions."""

    exact: ClassVar[bool] = False

    by: Literal["magnitude", "random", "wanda", "sparsegpt"] = "magnitude"
    """What a weight is worth."""

    ratio: float | None = None
    """Share of the weights to be zero; half of them without it and without a pattern."""

    pattern: Annotated[str | None, BeforeValidator(unread)] = None
    """N:M, such as 2:4, in place of a ratio: no more than N of every M along the inputs stay."""

    scope: Literal["layer", "global"] = "layer"
    """Whether every map has the same share of zeros, or the lowest of all maps go."""

    group: Group | None = None
    """What a weight is compared with, for a ratio: its row or its whole layer; by default the row
    for wanda, as its paper says, and the layer otherwise (for sparsegpt, of `block` inputs)."""

    allocation: Allocation = "uniform"
    """Where zeros go: the same share everywhere, or more in layers of little `influence` on the
    residual stream, or in those that lose least of their squared `weights`."""

    spread: float = 0.1
    """How far a layer's share may be from the ratio, where shares differ."""

    normalise: Literal["none", "mean"] = "none"
    """Whether scores are divided by their map's mean, for maps to be compared."""

    update: bool | None = None
    """Whether weights that stay make up for the others, as in SparseGPT; by default only there."""

    rounds: int = 1
    """Times to go over the model, each with the same share of what is left to go."""

    damping: float = 0.01
    """Added to the second moment's diagonal, as a share of its mean, where weights make up."""

    block: int = 128
    """Inputs that sparsegpt compares with each other, for a ratio."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing, or nothing together."""
        if self.ratio is not None and self.pattern is not None:
            raise ValueError("it takes a ratio, such as 0.5, or a pattern, such as 2:4; not both")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}, it has to be above 0 and below 1")
        if self.pattern is not None:
            Pattern.read(self.pattern)
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}, it has to be above 0")
        if self.block < 1 or self.rounds < 1:
            raise ValueError("block and rounds have to be 1 or more")
        for refused, why in self._together():
            if refused:
                raise ValueError(why)

    def _together(self) -> Sequence[tuple[bool, str]]:
        """Returns what options may not be together, and why."""
        whole = self.scope == "global"
        uneven = self.allocation != "uniform"
        low, high = self.share - self.spread, self.share + self.spread
        return (
            (
                self.pattern is not None and (whole or uneven or self.group is not None),
                "a pattern is the same share of every few weights: it goes with scope: layer, "
                "allocation: uniform and no group",
            ),
            (
                whole and self.by == "sparsegpt",
                "sparsegpt has no scores of all maps at once: those of later maps depend on what "
                "earlier ones lost; take scope: layer",
            ),
            (
                whole and self.by == "wanda" and self.normalise == "none",
                "wanda's scores have the scale of each map's inputs, and can't be compared over "
                "maps; take normalise: mean or scope: layer",
            ),
            (
                whole and (uneven or self.group is not None),
                "scope: global compares all weights: it takes neither an allocation nor a group",
            ),
            (
                not whole and self.normalise != "none",
                "normalise is for maps to be compared: it goes with scope: global",
            ),
            (
                self.rounds > 1 and not self.updates and (self.by != "wanda" or whole),
                f"nothing changes what {self.by} says between rounds, so that one gives the "
                "same; take update: true, or rounds: 1",
            ),
            (
                self.by == "sparsegpt" and self.update is False,
                "sparsegpt's scores take it that weights make up; take by: wanda, or update",
            ),
            (
                self.updates and whole,
                "weights make up for others map after map, and scope: global chooses all at once",
            ),
            (
                uneven and not (self.spread > 0 and low >= 0 and high < 1),
                f"with a spread of {self.spread} a layer's share could be {low:g} or {high:g}; "
                "from 0 to below 1 it has to be",
            ),
        )

    @property
    def share(self) -> float:
        """The ratio, given or not; a pattern has its own."""
        return 0.5 if self.ratio is None else self.ratio

    @property
    def updates(self) -> bool:
        """Whether weights that stay make up for those that go."""
        return self.by == "sparsegpt" if self.update is None else self.update

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What its score looks at."""
        found = {"weights"}
        if self.allocation == "influence":
            found.add("activations: similarity")
        if self.by == "wanda" and self.scope == "global":
            found.add("activations: norms")
        elif self.by in ("wanda", "sparsegpt") or self.updates:
            found.add("activations: sequential")
        return frozenset(found)

    def transform(self, context: Context) -> Mapping[str, Any]:
        """Returns by name the weights with zeros among them.

        Raises:
            SurgeonError: `bad-option` where there is no weight to change, a convolution's is asked
                for by its inputs, or a pattern stands before a selection.
        """
        selected = context.budget.ratio is not None or bool(context.budget.roles)
        if self.pattern is not None and selected and context.plan.empty:
            raise context.unable(
                f"a pattern of {self.pattern}",
                "it stands before the selection, and channels that go break it: put it last",
            )
        found = matrices(context)
        if self.updates or self.by in ("wanda", "sparsegpt"):
            _check_inputs(context, found)
        by_name = {m.param: m for m in found}
        if self.scope == "global":
            return self._all_at_once(context, found)
        wanted = shares(context, found, self.allocation, self.share, self.spread)
        if wanted and self.allocation != "uniform":
            least, most = min(wanted.values()), max(wanted.values())
            context.notes.append(
                f"transform/sparsify: layers have from {least:.1%} to {most:.1%} of zeros"
            )
        made: dict[str, Any] = {}
        for number in range(1, self.rounds + 1):
            now = context.after(made) if made else context
            made = self._round(now, by_name, wanted, number / self.rounds)
        return made

    def _round(
        self,
        context: Context,
        found: Mapping[str, Matrix],
        wanted: Mapping[str, float],
        part: float,
    ) -> dict[str, Any]:
        """Returns the weights after a round, when `part` of the rounds are over."""

        def solve(param: str, pair: Any) -> Any:
            matrix, full = found[param], context.weights(param)
            share = 1 - (1 - wanted[param]) ** part
            return matrix.put(full, self._sparse(context, matrix, full, pair, share, part))

        if "activations: sequential" in self.needs:
            return dict(context.sequential(context.plan, found, solve, cross=False))
        return {param: solve(param, None) for param in found}

    def _sparse(
        self, context: Context, matrix: Matrix, full: Any, pair: Any, share: float, part: float
    ) -> Any:
        """Returns what is left of a weight, [out, runs, d], with zeros."""
        rows = matrix.take(full).double()
        second = None
        if pair is not None:
            kept = matrix.inputs
            second = pair.pruned if kept is None else pair.pruned[kept][:, kept]

        def choose(scores: Any) -> Any:
            if self.pattern is not None:
                asked = Pattern.read(self.pattern)
                left = round(asked.of - (asked.of - asked.kept) * part)
                return of_pattern(scores, Pattern(left, asked.of))
            group = self.group or ("row" if self.by == "wanda" else "layer")
            return of_share(scores, share, group)

        if not self.updates:
            return rows.masked_fill(choose(self._scores(context, matrix, rows, second)), 0.0)
        assert second is not None, "what makes up for others is solved for on data"
        of = Pattern.read(self.pattern).of if self.pattern is not None else 0
        block = self.block if not of else max(of, self.block // of * of)
        if self.by == "sparsegpt":
            made = swept(
                rows[:, 0],
                second,
                lambda costs, _: choose(costs[:, None])[:, 0],
                damping=self.damping,
                block=block,
                width=of or block,
            )
        else:
            mask = choose(self._scores(context, matrix, rows, second))[:, 0]
            made = swept(
                rows[:, 0],
                second,
                lambda costs, j: mask[:, j : j + costs.shape[1]],
                damping=self.damping,
                block=block,
                width=block,
            )
        return made[:, None]

    def _scores(self, context: Context, matrix: Matrix, rows: Any, second: Any) -> Any:
        """Returns a number for each of [out, runs, d]; what is zero already has the lowest."""
        import numpy as np
        import torch

        if self.by == "random":
            draw = np.random.default_rng([context.seed, zlib.crc32(matrix.param.encode())])
            scores = torch.from_numpy(draw.random(rows.shape))
        elif self.by == "magnitude":
            scores = rows.abs()
        else:
            scores = rows.abs() * second.diagonal().clamp(min=0).sqrt()
        return scores.masked_fill(rows == 0, -1.0)

    def _all_at_once(self, context: Context, found: Sequence[Matrix]) -> dict[str, Any]:
        """Returns the weights without the lowest of all."""
        import torch

        norms = context.norms([m.param for m in found]) if self.by == "wanda" else {}
        every: list[Any] = []
        for matrix in found:
            second = None
            if self.by == "wanda":
                kept = matrix.inputs
                square = norms[matrix.param].square
                second = torch.diag(square if kept is None else square[kept])
            rows = matrix.take(context.weights(matrix.param))
            scores = self._scores(context, matrix, rows, second).float()
            if self.normalise == "mean":
                mean = scores.clamp(min=0).mean().clamp(min=1e-30)
                scores = torch.where(scores < 0, scores, scores / mean)
            every.append(scores)
        out: dict[str, Any] = {}
        for matrix, gone in zip(found, below(every, self.share), strict=True):
            full = context.weights(matrix.param)
            out[matrix.param] = matrix.put(full, matrix.take(full).masked_fill(gone, 0.0))
        return out


def _check_inputs(context: Context, found: Sequence[Matrix]) -> None:
    """Refuses weights whose inputs calibration doesn't see, or that have others in every row."""
    for matrix in found:
        if matrix.kernel:
            why = "a convolution's inputs are not gathered: take magnitude or random, or --freeze"
            raise context.unable(matrix.param, why)
        if not matrix.separable:
            why = "other inputs are left in other rows: take magnitude or random"
            raise context.unable(matrix.param, why)
