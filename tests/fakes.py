"""Calibration data made up at random, sample by sample, so that a test can add it up by hand."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from surgeon.axes import Axes
from surgeon.axes.contractions import contractions


class Drawn:
    """Inputs, output gradients and weight gradients of every map, each a list of samples.

    Samples of `inputs` and `slopes` are those of single tokens, of `windows` those of windows. The
    maps that read one value have the same inputs.
    """

    def __init__(self, axes: Axes, samples: int = 20) -> None:
        self.axes, self.samples = axes, samples
        self.maps = {found.param: found for found in contractions(axes.program)}

    def _draw(self, what: str, *shape: int) -> torch.Tensor:
        seed = torch.Generator().manual_seed(zlib.crc32(what.encode()))
        mixed = torch.randn(*shape, generator=seed) + 0.3 * torch.randn(shape[-1], generator=seed)
        return mixed.double()

    def inputs(self, param: str) -> torch.Tensor:
        """Samples [tokens, d] of what a parameter is multiplied with."""
        found = self.maps[param]
        width = int(self.axes.program.param[param].type.shape[found.dim])
        drawn = self._draw("x" + found.value, self.samples, width)
        return drawn @ self._draw("mix" + found.value, width, width) / width**0.5

    def slopes(self, param: str) -> torch.Tensor:
        """Samples [tokens, out] of the loss's gradient at what a parameter makes."""
        found = self.maps[param]
        width = int(self.axes.program.param[param].type.shape[1 - found.dim])
        return self._draw("g" + param, self.samples + 5, width)

    def windows(self, param: str) -> torch.Tensor:
        """Samples [windows, *shape] of the loss's gradient with respect to a parameter."""
        return self._draw("w" + param, 3, *map(int, self.axes.program.param[param].type.shape))

    def moments(self, params: Sequence[str], *, full: bool = True) -> Mapping[str, Any]:
        out: dict[str, Any] = {}
        for param in params:
            x = self.inputs(param)
            second = x.T @ x / len(x)
            out[param] = SimpleNamespace(
                count=len(x),
                mean=x.mean(0),
                square=second.diagonal(),
                second=second if full else None,
            )
        return out

    def gradients(self, params: Sequence[str]) -> Mapping[str, Any]:
        found = {param: self.windows(param) for param in params}
        return {
            param: SimpleNamespace(count=len(g), mean=g.mean(0), square=g.square().mean(0))
            for param, g in found.items()
        }

    def fisher(self, params: Sequence[str]) -> Mapping[str, Any]:
        found = {param: self.slopes(param) for param in params}
        return {
            param: SimpleNamespace(count=len(g), second=g.T @ g / len(g))
            for param, g in found.items()
        }

    def similarity(self, branches: Sequence[str]) -> Mapping[str, float]:
        return {name: zlib.crc32(name.encode()) % 100 / 100 for name in branches}

    def loss(self, plan: Any, rewrites: Any = None) -> float:
        raise AssertionError("nothing here has a loss")

    def sequential(
        self, plan: Any, params: Any, solve: Any, *, cross: bool = True
    ) -> Mapping[str, Any]:
        raise AssertionError("nothing here runs layer after layer")
