"""Weights made of other weights, still lazy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from surgeon.capture.blocks import Buffers, Span
from surgeon.capture.weights import StateDictWeights, Weights, digest
from surgeon.errors import Code, SurgeonError


class OverlayWeights(Weights):
    """Weights with further tensors on top, such as computed buffers and constants."""

    def __init__(self, base: Weights, extra: Mapping[str, torch.Tensor]) -> None:
        self._base, self._extra = base, StateDictWeights(extra)
        names = dict.fromkeys((*base.names(), *extra))
        aliases = {a: name for name, group in base._tied.items() for a in group[1:]}
        super().__init__(names, aliases)

    def _read(self, name: str) -> torch.Tensor:
        return (self._extra if name in self._extra else self._base)[name]

    def _read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return (self._extra if name in self._extra else self._base).rows(name, start, stop)

    def _blocks(
        self, name: str, wanted: Sequence[Span], buffers: Buffers
    ) -> Iterator[tuple[int, torch.Tensor]]:
        source = self._extra if name in self._extra else self._base
        return source.blocks(name, wanted, buffers)

    def _meta(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        source = self._extra if name in self._extra else self._base
        return source.dtype(name), source.shape(name)

    @property
    def where(self) -> str:
        """Where the weights come from, for a message."""
        return self._base.where

    def fingerprint(self) -> str:
        """Returns a SHA-256 over both fingerprints."""
        return digest(["overlay", self._base.fingerprint(), self._extra.fingerprint()])


class RewrittenWeights(Weights):
    """Weights of which every tensor passes through a function when it is read.

    Args:
        base: what is rewritten.
        rewrite: from a stored name and its tensor to the new tensor.
        key: tells one rewrite from another in the fingerprint, such as a plan's hash.
        shapes: the shapes that change, by stored name.
        dtypes: the element types that change, by stored name.
    """

    def __init__(
        self,
        base: Weights,
        rewrite: Callable[[str, torch.Tensor], torch.Tensor],
        *,
        key: str,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._base, self._rewrite, self._key = base, rewrite, key
        self._shapes, self._dtypes = dict(shapes or {}), dict(dtypes or {})
        aliases = {a: name for name, group in base._tied.items() for a in group[1:]}
        super().__init__(base.names(), aliases)

    def _meta(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        dtype = self._dtypes[name] if name in self._dtypes else self._base.dtype(name)
        return dtype, self._shapes[name] if name in self._shapes else self._base.shape(name)

    def _read(self, name: str) -> torch.Tensor:
        out = self._rewrite(name, self._base[name])
        if (out.dtype, tuple(out.shape)) != self._meta(name):
            raise SurgeonError(
                Code.PLAN_MISMATCH,
                "a rewritten tensor is not what was announced",
                at=f"{name}, from {self.where}",
                why=f"{self._meta(name)} announced, {(out.dtype, tuple(out.shape))} made",
                try_="check that the plan was made for this very model",
            )
        return out

    @property
    def where(self) -> str:
        """Where the weights come from, for a message."""
        return self._base.where

    def fingerprint(self) -> str:
        """Returns a SHA-256 over the base's fingerprint, the key, and what changes shape."""
        changes = sorted((n, *map(str, self._meta(n))) for n in {*self._shapes, *self._dtypes})
        return digest(["rewritten", self._key, self._base.fingerprint(), changes])
