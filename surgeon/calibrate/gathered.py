"""What passes ask of calibration data: gathered when it is asked for, and once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan, Selection, dropped
from surgeon.calibrate.data import Windows
from surgeon.calibrate.sequential import Solve, sequential
from surgeon.calibrate.statistics import Get, Moments, observe
from surgeon.runtime.apply import masked


class Gathered:
    """A model on calibration windows, as the protocol `Calibration` describes it.

    Args:
        axes: of the model.
        get: its weights in fp32.
        windows: token ids [samples, length].
    """

    def __init__(self, axes: Axes, get: Get, windows: Windows) -> None:
        self.axes, self.get, self.windows = axes, get, windows
        self.ids = torch.from_numpy(windows.ids)
        self._known: dict[str, Moments] = {}

    def moments(self, params: Sequence[str]) -> Mapping[str, Moments]:
        """Returns the second moments of these parameters' inputs in the dense model."""
        if any(name not in self._known for name in params):
            # One pass gives all: a caller that asks for one layer will ask for the next.
            wanted = self._like(params)
            for part in observe(self.axes.program, self.get, self.ids, params=wanted):
                self._known.update(part.moments)
        return {name: self._known[name] for name in params}

    def _like(self, params: Sequence[str]) -> list[str]:
        """Returns every parameter that is summed over an axis of the same role as one of these."""
        from surgeon.axes.consumers import consumers

        roles: dict[str, set[str]] = {}
        for axis in self.axes.axes:
            for consumer in consumers(self.axes, axis):
                roles.setdefault(axis.role, set()).add(consumer.param)
        found = [names for names in roles.values() if names & set(params)]
        return list(dict.fromkeys([*params, *(n for names in found for n in sorted(names))]))

    def sequential(self, plan: Plan, params: Sequence[str], solve: Solve) -> Mapping[str, Any]:
        """Returns the parameters solved for, each on what those before it produce."""
        selection = Selection(self.axes, plan)
        program = self.axes.program
        silent = dropped(self.axes, plan)

        def mask(name: str, tensor: torch.Tensor) -> torch.Tensor:
            # A branch whose every parameter is zero adds nothing: that is what dropping it does.
            return torch.zeros_like(tensor) if name in silent else masked(selection, name, tensor)

        return sequential(program, self.get, mask, self.ids, params, solve)
