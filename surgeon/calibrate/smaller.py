"""What passes ask of a smaller model on calibration data: how it does, and what mends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan, Selection, dropped
from surgeon.calibrate.data import Windows
from surgeon.calibrate.distil import Part, Schedule, distilled, streams_of
from surgeon.calibrate.divergence import Divergence, Trial, divergences
from surgeon.calibrate.loss import mean_loss
from surgeon.calibrate.parallel import join
from surgeon.calibrate.running import TOKENS, Change, Get, Machine
from surgeon.calibrate.sequential import Mask, Solve, sequential
from surgeon.runtime.apply import kept_only, masked, removed, rewritten

GRADIENT_WINDOWS = 12
"""Windows that the loss's gradients are taken on; second moments want more of them. SmolLM2-135M,
20 % of the decoder by `default`, after least squares and without gains, perplexity of twelve
windows of 1,024 tokens outside the project's protocol: both on 12 windows of 512 tokens 39.86;
second moments on 61 and gradients on 12 38.67, on 24 38.59; both on 60 38.57. The whole recipe at
10 %, on the protocol: 26.05 with 12, 26.10 with 24."""

TRIAL_WINDOWS = 3
"""Windows that the divergence of trials is taken on. They are the last: gradients and what else is
gathered have not seen them unless there are few."""


@dataclass(frozen=True)
class _Without:
    """What was solved for without each part of the windows.

    Attributes:
        plan: what is removed.
        by_part: by how much it differs from the mean, in the smaller model's size. That is little,
            and so does with half the bytes.
    """

    plan: Plan
    by_part: tuple[Mapping[str, torch.Tensor], ...]

    @property
    def names(self) -> Set[str]:
        """The parameters."""
        return self.by_part[0].keys()

    def fits(self, plan: Plan, folds: int) -> bool:
        """Tells whether they are of this plan and of so many parts."""
        return len(self.by_part) == folds and self.plan == plan


class OnData:
    """A model and what becomes of it, on calibration windows.

    Args:
        axes: of the model.
        get: its weights in fp32.
        windows: token ids [samples, length].
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one.
        offload: a folder where states between pieces are kept, so that windows and layers without
            number need no more memory; they stay in memory without it.
        loss_windows: how many windows the loss is taken over; all without it.
        gradient_windows: how many windows the loss's gradients are taken on; that costs four
            times what a walk forwards does.
        notes: gets what there is to say to the user.
        tokens: how many go through a piece at a time, rounded to whole windows.
    """

    def __init__(
        self,
        axes: Axes,
        get: Get,
        windows: Windows,
        *,
        device: str = "cpu",
        offload: Path | None = None,
        loss_windows: int | None = None,
        gradient_windows: int = GRADIENT_WINDOWS,
        notes: list[str] | None = None,
        tokens: int = TOKENS,
    ) -> None:
        self.axes, self.get, self.windows = axes, get, windows
        if device != "cpu":
            from surgeon.runtime.device import choose_torch_device

            device = choose_torch_device(device).name
        self.machine = Machine(join(device), offload, tokens)
        every = torch.from_numpy(windows.ids)
        self.ids = self.machine.world.share(every)
        self.loss_ids = self.machine.world.share(every[:loss_windows])
        self.gradient_ids = self.machine.world.share(every[:gradient_windows])
        self.trial_ids = self.machine.world.share(every[-TRIAL_WINDOWS:])
        self.notes = [] if notes is None else notes
        self.dense: Mapping[str, torch.Tensor] = {}
        self.pruned: Mapping[str, torch.Tensor] = {}
        self._streams: dict[int, list[torch.Tensor]] = {}
        self._without: _Without | None = None
        self._expected: frozenset[str] = frozenset()
        self._brief = False

    def read(self, name: str) -> torch.Tensor:
        """Returns a parameter of the dense model, fp32."""
        return _fp32(rewritten(self.get, self.dense)(name))

    def loss(self, plan: Plan, rewrites: Mapping[str, Any] | None = None) -> float:
        """Returns the masked model's mean negative log-likelihood of a predicted token, in nats.

        Args:
            plan: what is masked.
            rewrites: tensors that replace those of the pruned model before they are masked.
        """
        now = rewritten(self.get, {**self.pruned, **(rewrites or {})})
        mask, change = self._masking(plan)
        machine, program = self.machine, self.axes.program
        return mean_loss(
            program, lambda n: mask(n, _fp32(now(n))), self.loss_ids, machine, change=change
        )

    def divergences(
        self, trials: Iterable[tuple[Plan, Callable[[str], Any]]]
    ) -> tuple[Divergence, ...]:
        """Returns how far the dense model's predictions move under each of several plans.

        Args:
            trials: what is masked, and what gives the tensor that replaces a parameter before it
                is masked, or None; it is called when the parameter is read.
        """
        machine, program = self.machine, self.axes.program
        made = [self._trial(plan, new) for plan, new in trials]
        return divergences(program, self.read, made, self.trial_ids, machine)

    def _trial(self, plan: Plan, replaced: Callable[[str], Any]) -> Trial:
        mask, change = self._masking(plan)
        selection, silent = Selection(self.axes, plan), dropped(self.axes, plan)
        names = (p.name for p in self.axes.program.params)
        touched = {n for n in names if any(k is not None for k in selection.kept(n))}

        def get(name: str) -> torch.Tensor:
            found = replaced(name) if name in touched else None
            return mask(name, self.read(name) if found is None else _fp32(found))

        return Trial(get, frozenset(touched | set(silent)), change)

    def sequential(
        self,
        plan: Plan,
        params: Sequence[str],
        solve: Solve,
        *,
        cross: bool = True,
        folds: int = 1,
    ) -> Mapping[str, Any]:
        """Returns the parameters solved for, each on what those before it produce.

        Args:
            plan: what is removed.
            params: to solve for.
            solve: from a name and a `Pair` to the tensor that replaces the parameter.
            cross: as `surgeon.calibrate.sequential` describes it.
            folds: parts of the windows; where there are fewer windows, each is a part. All is
                solved for on each part by itself; the mean of the solutions is returned. Where
                gains are announced, `distilled` can then learn on each part in a model that has
                not seen it.

        Reference: Breiman, Bagging Predictors, 1996; Wortsman et al., Model soups, 2022.
        """
        mask, change = self._masking(plan)
        now = rewritten(self.get, self.pruned)
        parts = self._parts(folds)
        count = len(parts)
        distils = "activations: distillation" in self._expected
        # Who distils afterwards wants the dense stream at the head, which this walk comes by.
        streams: list[torch.Tensor] | None = [] if distils else None
        mean: dict[str, torch.Tensor] = {}
        apart: list[dict[str, torch.Tensor]] = [{} for _ in parts]
        selection = Selection(self.axes, plan)
        for name, found in sequential(
            self.axes.program,
            self.read,
            lambda name: _fp32(now(name)),
            mask,
            parts,
            params,
            solve,
            self.machine,
            change=change,
            cross=cross,
            streams=streams,
        ):
            mean[name] = found[0] if count == 1 else torch.stack(found).mean(0)
            if streams is None or count == 1:
                continue
            for own, part in zip(found, apart, strict=True):
                others = (mean[name] - own) / (count - 1)  # their mean, less that of all
                part[name] = removed(selection, name, others).bfloat16()
        if streams is not None:
            self._streams[count] = streams
            self._without = _Without(plan, tuple(apart)) if count > 1 else None
        return mean

    def distilled(
        self, plan: Plan, *, rate: float, epochs: float, windows: int, folds: int = 1
    ) -> tuple[Mapping[str, Any], tuple[float, ...]]:
        """Returns maps with gains in their rows and columns, learnt from the dense model.

        Args:
            plan: what is removed; the smaller model is what learns.
            rate: Adam's largest step size.
            epochs: times that every window is seen.
            windows: in a step.
            folds: parts of the windows, as `sequential` counts them. If that solved on each of as
                many, what it found on the others stands in the model that learns on a part; the
                gains, which are the same for all, are then put into the mean over all of them.

        Returns:
            The tensors in full size, and the divergence from the dense model at every step, nats.
        """
        program, parts = self.axes.program, self._parts(folds)
        count = len(parts)
        if count not in self._streams:
            whole = torch.cat(parts)
            self._streams[count] = streams_of(program, self.read, whole, self.machine)
        streams = iter(self._streams[count])
        known: Sequence[Mapping[str, torch.Tensor]] = [{}] * count
        if self._without is not None and self._without.fits(plan, count):
            known = self._without.by_part
        now = rewritten(self.get, self.pruned)
        return distilled(
            self.axes,
            plan,
            self.read,
            lambda name: _fp32(now(name)),
            [
                Part(ids, [next(streams) for _ in ids], shift)
                for ids, shift in zip(parts, known, strict=True)
            ],
            Schedule(rate, epochs, windows),
            self.machine,
        )

    def _parts(self, folds: int) -> list[torch.Tensor]:
        """Returns this process's share of each of so many parts; a window is one at the least."""
        every, world = torch.from_numpy(self.windows.ids), self.machine.world
        count = min(folds, len(every))
        note = f"{count} calibration windows can't be {folds} parts: each is a part by itself"
        if count < folds and note not in self.notes:
            self.notes.append(note)
        return [world.share(part) for part in every.tensor_split(count)]

    def _masking(self, plan: Plan) -> tuple[Mask, Change | None]:
        """Returns what masks parameters, and normalisers that see kept channels only."""
        selection = Selection(self.axes, plan)
        silent = dropped(self.axes, plan)

        def mask(name: str, tensor: torch.Tensor) -> torch.Tensor:
            # A branch whose every parameter is zero adds nothing: that is what dropping it does.
            return torch.zeros_like(tensor) if name in silent else masked(selection, name, tensor)

        return mask, lambda where: kept_only(self.axes, selection, where)


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
