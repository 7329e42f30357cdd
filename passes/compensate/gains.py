"""Gains on the channels that maps read and make are learnt from the dense model's predictions.

What least squares leave behind is an error of the whole, which no layer sees: the smaller model as
one is made to predict, on the calibration data, what the dense model predicts. Only gains are
learnt, one for each row and column of every map (0.3 % of the parameters' number in a small
model, less in a large one), and for the vector that scales what a map without gains reads, such as
the norm before a tied head; they are then factors in the weights. No weight is trained by itself.

They had better be learnt on windows that least squares did not see: there the error is that of
any other text, three times as large. With `folds`, each part of the windows is learnt on in what
the other parts came to; gains belong to channels, not to one solution, and so serve the mean of
all. SmolLM2-135M, 20 % of the decoder, 64 windows of 512 tokens; perplexity of twelve of 1,024 from
WikiText-2's test set that are not in the project's protocol: least squares on all 64, 41.5, and
gains on the same, 40.8; gains on half of them in least squares on the other half, put into least
squares on all, 39.9. With another plan: halves solved for by themselves, their mean 39.58, with
gains learnt on each in the other's solution 37.73 (put into least squares on all, 39.86: 38.06).
The more parts, the nearer is what the gains learn in to what they are put into: 10 %, 24 windows,
quarters 29.51 and with gains 29.10, eighths 29.50 and 28.92 (with steps of 0.0015 and 0.008 in
place of 0.003: 28.96 and 29.33; at 20 % 33.66 and 34.07 in place of 33.47). 24 other windows, 20 %:
33.30 before gains, 31.64 with those of maps alone, 31.56 with the last norm's as well (31.70 where
every window is seen twice).

Most of where a gain goes is noise: with the signs of its slopes drawn at random it goes as far.
Where little is removed, the divergence on windows that nothing saw hardly falls therefore, while
the perplexity does (24 windows, a tenth gone): 28.12 and 0.112 nats without gains, 27.69 and 0.110
with those of what maps read, 27.56 and 0.112 with those of what they make, 27.51 and 0.116 with
both. Worse are steps that stay as large to the end (27.76, 0.117) and one second moment for a whole
map (27.78, 0.121). In between lie steps by Adam's second moment to the power of 0.75 in place of
its root (27.62, 0.115), steps that shrink where a slope's sign is unsure (27.52, 0.116), and gains
made smaller afterwards by what noise alone would come to (27.78, 0.111). On a text of another kind
(Python's help, 6 windows) both fall: 17.72 and 0.302 without, 17.43 and 0.293 with them.

What can't be done is to go on, while layers are solved for, with what was solved for without a
window: 60.2, as each layer makes up for the errors of those before it and of no others.

Reference: Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Liu et al., Few-Shot
Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, 2022 (IA³).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from passes._refit import check_folds
from surgeon.plugin import CompensatePass, Context, Plan


@dataclass(frozen=True)
class Gains(CompensatePass):
    """Factors of rows and columns that bring the predictions nearer to the dense model's."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: distillation"})

    rate: float = 3e-3
    """Adam's largest step size; gains begin at 1."""

    epochs: float = 1.0
    """Times that every calibration window is seen."""

    windows: int = 1
    """Calibration windows in a step."""

    folds: int = 1
    """Parts of the calibration windows. On each, gains are learnt in what `least_squares` with as
    many `folds` solved for on the others; with 1, in the model as it is. Where there are fewer
    windows, each is a part."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        for name in ("rate", "epochs", "windows"):
            if not getattr(self, name) > 0:  # true for NaN as well
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be above 0")
        check_folds(self.folds)

    def compensate(self, context: Context, plan: Plan) -> Mapping[str, Any]:
        """Returns by parameter name the full-size tensor that replaces it."""
        found, steps = context.distilled(
            plan,
            rate=self.rate,
            epochs=self.epochs,
            windows=self.windows,
            folds=self.folds,
        )
        quarter = max(1, len(steps) // 4)
        first, last = (sum(s) / len(s) for s in (steps[:quarter], steps[-quarter:]))
        context.notes.append(
            f"gains: divergence from the dense model {first:.3f} nats in the first quarter of "
            f"{len(steps)} steps, {last:.3f} in the last"
        )
        return found
