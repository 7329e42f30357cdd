"""Makes two maps of one: y = W·x becomes y = U·(V·x), over fewer channels than W has either way.

A map of n outputs and d inputs takes n·d parameters; as two of rank r it takes r·(n + d), and is
left as it is where that isn't less. What is lost is the squared singular values beyond the rank:
those of W itself, or of W as its inputs weigh it. For inputs x of second moment H, in the dense
model, the error is tr(ΔW·H·ΔWᵀ), the mean square of what the outputs differ by, and with H = S·Sᵀ
the best W is that of W·S, cut off and multiplied with S⁻¹. That is U·Uᵀ·W with the left singular
vectors U of W·S, so that H may be singular. With the loss's gradients at the outputs, of second
moment G, the error ½·tr(G·ΔW·H·ΔWᵀ) is what the loss is predicted to grow by, and maps can be
compared: a budget for all gives each the rank at which a parameter is worth the same.

Reference: Eckart and Young, 1936; Wang et al., SVD-LLM, 2025 (whitening by the inputs); Chen et
al., DRONE, 2021 (without an inverse); Hsu et al., Language Model Compression with Weighted Low-Rank
Factorization, 2022 (Fisher information as the weight); Martens and Grosse, K-FAC, 2015 (its
Kronecker factors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from passes.transform._matrices import Matrix, matrices
from passes.transform._ranks import Costs, spread
from passes.transform._spectrum import Spectrum, spectrum
from surgeon.plugin import (
    Context,
    Product,
    Selection,
    TransformPass,
    contractions,
    counts,
    factorable,
)

ENERGY = 0.9
"""What each map keeps of its energy where nothing else is asked for."""


@dataclass(frozen=True)
class LowRank(TransformPass):
    """Maps as products of two, where that saves parameters."""

    exact: ClassVar[bool] = False
    factors: ClassVar[bool] = True

    energy: float | None = None
    """Share of its energy, the squared singular values, that each map keeps; 0.9 without it and
    the next three."""

    ratio: float | None = None
    """Share of its parameters that each map loses, in place of an energy."""

    budget: float | None = None
    """Share of the decoder layers' parameters that all maps lose together, in place of these; ranks
    are highest where most would be lost."""

    rank: int | None = None
    """Of every map, in place of these."""

    by: Literal["weights", "inputs", "loss"] = "inputs"
    """What singular values are of: of the weights alone, as their inputs weigh them, or as inputs
    and the loss's gradients do."""

    multiple_of: int = 1
    """Ranks are multiples of this."""

    head: bool = False
    """Whether the map to the logits may be two as well, if it is a parameter of its own."""

    damping: float = 0.01
    """Added to the diagonal of the gradients' second moment, as a share of its mean."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing, or nothing together."""
        said = [n for n in ("energy", "ratio", "budget", "rank") if getattr(self, n) is not None]
        if len(said) > 1:
            found = " and ".join(said)
            raise ValueError(f"it takes one of energy, ratio, budget and rank, and has {found}")
        for name in ("energy", "ratio", "budget"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name} is {share}, it has to be above 0 and below 1")
        if (self.rank is not None and self.rank < 1) or self.multiple_of < 1:
            raise ValueError("rank and multiple_of have to be 1 or more")
        if not self.damping > 0:
            raise ValueError(f"damping is {self.damping}, it has to be above 0")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What singular values are weighed by."""
        found = {"weights"}
        if self.by != "weights":
            found.add("activations: second moment")
        if self.by == "loss":
            found.add("gradients: outputs")
        return frozenset(found)

    def transform(self, context: Context) -> Mapping[str, Any]:
        """Returns by name the products that stand in place of maps.

        Raises:
            SurgeonError: `bad-option` where no map may change, or the budget can't be met.
        """
        found = self._maps(context)
        spectra = self._spectra(context, found)
        ranks = self._ranks(context, found, spectra)
        out: dict[str, Any] = {}
        for matrix in found:
            rank, (rows, columns) = ranks[matrix.param], _sizes(matrix)
            if rank is not None and rank * (rows + columns) < rows * columns:
                made = spectra(matrix, vectors=True)
                out[matrix.param] = _product(context, matrix, made, min(rank, len(made.energies)))
        self._tell(context, found, out)
        return out

    def _maps(self, context: Context) -> list[Matrix]:
        """Returns the maps that may become two."""
        axes = context.axes
        allowed = set(factorable(axes)) - context.factored
        ranks = {(m.param, m.dim) for axis in axes.of_role("rank") for m in axis.members}
        half = {param for param, _ in ranks}
        every = list(matrices(context)) + (self._heads(context) if self.head else [])
        found = [
            m
            for m in every
            if not m.kernel and m.param in allowed and m.param not in half and m.separable
        ]
        if not found:
            raise context.unable("the weights", "no map of its own is left that may become two")
        if half:
            context.notes.append(
                f"transform/low_rank: {len(half)} maps are halves of a product already, and stay: "
                "cut their axes (role rank)"
            )
        return found

    def _heads(self, context: Context) -> list[Matrix]:
        """Returns the maps that make what the model returns."""
        program, budget = context.program, context.budget
        found = [c for c in contractions(program) if c.out in program.outputs]
        for head in found:
            if head.param not in factorable(context.axes):
                why = "it is used elsewhere too, such as by the embedding: leave out head"
                raise context.unable(head.param, why)
        selection = Selection(context.axes, context.plan)
        return [
            Matrix(c.param, c.dim, False, selection)
            for c in found
            if budget.params is None or c.param in budget.params
        ]

    def _spectra(self, context: Context, found: Sequence[Matrix]) -> _Spectra:
        names = [m.param for m in found]
        moments = context.moments(names) if self.by != "weights" else {}
        fisher = context.fisher(names) if self.by == "loss" else {}
        return _Spectra(context, moments, fisher, self.damping)

    def _ranks(
        self, context: Context, found: Sequence[Matrix], spectra: _Spectra
    ) -> dict[str, int | None]:
        """Returns the rank that is wanted of each map; None where it is to stay one."""
        if self.rank is not None:
            rank = max(self.rank // self.multiple_of, 1) * self.multiple_of
            return {m.param: rank for m in found}
        if self.ratio is not None:
            return {m.param: _costs(m, [], self.multiple_of).by_ratio(self.ratio) for m in found}
        costs: list[Costs] = []
        for matrix in found:
            energies = spectra(matrix, vectors=False).energies.numpy()
            # Only the loss has one scale for all maps: of other energies, the share counts.
            scale = 0.5 if self.by == "loss" else 1 / max(float(energies.sum()), 1e-30)
            costs.append(_costs(matrix, energies * scale, self.multiple_of))
        if self.budget is None:
            energy = ENERGY if self.energy is None else self.energy
            every = zip(found, costs, strict=True)
            return {m.param: cost.by_energy(energy) for m, cost in every}
        counted = context.budget.counted or tuple(m.param for m in found)
        whole = counts(context.axes, context.plan, counted)[1]
        goal = round(self.budget * whole)
        ranks = spread(costs, goal)
        if ranks is None:
            most = sum(max(0, c.saved(c.step)) for c in costs) / whole
            raise context.unable(
                f"a budget of {self.budget:g}",
                f"with the lowest ranks, {len(found)} maps would lose {most:.1%} of the parameters",
            )
        lost = sum(
            float(cost.lost(np.array([rank]))[0])
            for cost, rank in zip(costs, ranks, strict=True)
            if rank is not None
        )
        if self.by == "loss":
            context.notes.append(
                f"transform/low_rank: the loss is predicted to grow by {lost:.4f} a token"
            )
        return {m.param: rank for m, rank in zip(found, ranks, strict=True)}

    def _tell(self, context: Context, found: Sequence[Matrix], made: Mapping[str, Product]) -> None:
        """Says how many maps became two, and why the others didn't."""
        if not made:
            context.notes.append(
                f"transform/low_rank: none of {len(found)} maps became two: at the ranks that were "
                "asked for, they would have no fewer parameters"
            )
            return
        sizes = {m.param: _sizes(m) for m in found}
        before = sum(sizes[n][0] * sizes[n][1] for n in made)
        after = sum(p.rank * sum(sizes[n]) for n, p in made.items())
        ranks = sorted(p.rank for p in made.values())
        energies = sorted(p.energy for p in made.values())
        context.notes.append(
            f"transform/low_rank: {len(made)} of {len(found)} maps are two now, of rank "
            f"{ranks[0]} to {ranks[-1]}, which keep {energies[0]:.1%} to {energies[-1]:.1%} of "
            f"their energy and {after:,} of {before:,} parameters"
        )
        if len(made) < len(found):
            context.notes.append(
                f"transform/low_rank: {len(found) - len(made)} maps stay one: of the rank they "
                "would need, two would have no fewer parameters"
            )


@dataclass(frozen=True)
class _Spectra:
    """Makes the spectrum of what is left of a map."""

    context: Context
    moments: Mapping[str, Any]
    fisher: Mapping[str, Any]
    damping: float

    def __call__(self, matrix: Matrix, *, vectors: bool) -> Spectrum:
        rows = matrix.take(self.context.weights(matrix.param))[:, 0]
        inputs = outputs = None
        if matrix.param in self.moments:
            inputs = _left(self.moments[matrix.param].second, matrix.inputs)
        if matrix.param in self.fisher:
            outputs = _left(self.fisher[matrix.param].second, matrix.outputs)
        return spectrum(rows, inputs, outputs, damping=self.damping, vectors=vectors)


def _left(second: Any, kept: Any) -> Any:
    """Returns the second moment of those channels that are left."""
    return second if kept is None else second[kept][:, kept]


def _sizes(matrix: Matrix) -> tuple[int, int]:
    """Returns the outputs and inputs that are left of a map."""
    columns = matrix.shape[matrix.dim]
    return matrix.size // columns, columns


def _costs(matrix: Matrix, energies: Any, step: int) -> Costs:
    return Costs(*_sizes(matrix), np.asarray(energies, np.float64), step)


def _product(context: Context, matrix: Matrix, made: Spectrum, rank: int) -> Product:
    """Returns the product in full size, with zeros where channels are gone."""
    import torch

    up, down = made.halves(rank)
    full = context.program.param[matrix.param].type.shape
    wide = (full[1 - matrix.dim], full[matrix.dim])
    halves = [up, down.mT]
    for place, kept in enumerate((matrix.outputs, matrix.inputs)):
        if kept is not None:
            whole = torch.zeros(int(wide[place]), rank, dtype=torch.float64)
            whole[torch.from_numpy(kept)] = halves[place]
            halves[place] = whole
    if matrix.dim == 0:
        halves.reverse()
    left, right = (half.float().contiguous() for half in halves)
    total = max(float(made.energies.sum()), 1e-30)
    kept_energy = float(made.energies[:rank].sum()) / total
    return Product(left, right.mT.contiguous(), kept_energy)
