"""Checkpoints that store apart what the model holds as one tensor: each expert by itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from surgeon.capture.blocks import Buffers, Span
from surgeon.capture.weights import HEAD, SafetensorsWeights, Weights, file_heads

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Fused:
    """How one tensor is made of stored ones: those of a list stacked, the lists joined.

    Attributes:
        parts: stored names, of each list by its number.
        dim: the dimension, after stacking, that the lists are joined along.
    """

    parts: tuple[tuple[str, ...], ...]
    dim: int

    @property
    def names(self) -> tuple[str, ...]:
        """Every stored name that it takes."""
        return tuple(name for part in self.parts for name in part)


class FusedWeights(SafetensorsWeights):
    """The tensors of a checkpoint folder under the model's names, some made of several.

    Args:
        folder: the checkpoint folder.
        aliases: tied names, as for `Weights`.
        rename: from the stored names to those of the model, for those that differ.
        fuse: from all names to what is made of several of them.
    """

    def __init__(
        self,
        folder: Path,
        aliases: Mapping[str, str] | None,
        rename: Callable[[Collection[str]], Mapping[str, str]],
        fuse: Callable[[Collection[str]], Mapping[str, Fused]],
    ) -> None:
        super().__init__(folder, aliases, rename)
        self._fused = {
            name: found for name, found in fuse(self._entries.keys()).items() if self._alike(found)
        }
        taken = {part for found in self._fused.values() for part in found.names}
        own = [name for name in self._entries if name not in taken]
        Weights.__init__(self, (*own, *self._fused), aliases)

    def _alike(self, found: Fused) -> bool:
        """Whether all parts have one type, and those of a list one shape."""
        kinds = {self._entries[n].dtype for n in found.names}
        shapes = [{self._entries[n].shape for n in part} for part in found.parts]
        counts = {len(part) for part in found.parts}
        return len(kinds) == len(counts) == 1 and all(len(s) == 1 for s in shapes)

    def _meta(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        found = self._fused.get(name)
        if found is None:
            return super()._meta(name)
        shapes = [[len(p), *self._entries[p[0]].shape] for p in found.parts]
        out = shapes[0]
        out[found.dim] = sum(shape[found.dim] for shape in shapes)
        return self._entries[found.parts[0][0]].dtype, tuple(out)

    def _read(self, name: str) -> torch.Tensor:
        if name not in self._fused:
            return super()._read(name)
        return self._read_rows(name, 0, self._meta(name)[1][0])

    def _read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        found = self._fused.get(name)
        if found is None:
            return super()._read_rows(name, start, stop)
        dtype, shape = self._meta(name)
        start, stop, _ = slice(start, stop).indices(shape[0])
        out = torch.empty((max(0, stop - start), *shape[1:]), dtype=dtype)
        at = 0
        for part in found.parts:
            width = self._entries[part[0]].shape[found.dim - 1]
            for row in range(start, stop):
                out[row - start].narrow(found.dim - 1, at, width).copy_(super()._read(part[row]))
            at += width
        return out

    def _blocks(
        self, name: str, wanted: Sequence[Span], buffers: Buffers
    ) -> Iterator[tuple[int, torch.Tensor]]:
        if name not in self._fused:
            yield from super()._blocks(name, wanted, buffers)
            return
        for start, stop in wanted:
            yield start, self._read_rows(name, start, stop)

    def place(self, name: str) -> tuple[str, int]:
        """Returns file and offset, of the first part where there are several."""
        found = self._fused.get(self._stored(name))
        if found is None:
            return super().place(name)
        first = self._entries[found.names[0]]
        return str(first.file), first.start

    def fingerprint(self) -> str:
        """Returns a SHA-256 over names, element types, shapes and the first bytes of each."""
        return self._fingerprint(self._heads())

    def _heads(self) -> Iterator[tuple[str, object, tuple[int, ...], bytes]]:
        first = {found.parts[0][0]: name for name, found in self._fused.items()}
        taken = {part for found in self._fused.values() for part in found.names}
        for name, dtype, shape, head in file_heads(self._entries):
            if name in first:
                # A first part shorter than a head is followed by the next.
                size = dtype.itemsize  # type: ignore[attr-defined]
                if len(head) < HEAD:
                    row = self.rows(first[name], 0, 1).reshape(-1)[: -(-HEAD // size)]
                    head = bytes(row.contiguous().view(torch.uint8).tolist())[:HEAD]
                yield first[name], dtype, self._meta(first[name])[1], head
            elif name not in taken:
                yield name, dtype, shape, head


def fusions(stored: Collection[str], model: nn.Module) -> dict[str, Fused]:
    """Returns what a model holds as one tensor and a checkpoint as several.

    The rules are those that Transformers loads by. Of them, lists that are stacked, and perhaps
    joined, are followed; a tensor that takes anything else will be missed.
    """
    wanted = model.state_dict().keys()
    unknown = [key for key in stored if key not in wanted]
    if not unknown:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

    rules = get_model_conversion_mapping(cast(Any, model))
    renames = [r for r in rules if not isinstance(r, WeightConverter)]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    lists: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    for key in unknown:
        name = key
        for rule in renames:
            name = rule.rename_source_key(name)[0]
        for rule in rules:
            if not isinstance(rule, WeightConverter):
                continue
            new, pattern = rule.rename_source_key(name)
            new = next(
                (n for n in (new, prefix + new, new.removeprefix(prefix)) if n in wanted), ""
            )
            if pattern is not None and new:
                lists.setdefault(new, (rule, {}))[1].setdefault(pattern, []).append(key)
                break
    out: dict[str, Fused] = {}
    for new, (rule, parts) in lists.items():
        steps = rule.operations
        if not isinstance(steps[0], MergeModulelist) or steps[0].dim != 0 or len(steps) > 2:
            continue
        joins = steps[1:]
        if any(not isinstance(step, Concatenate) for step in joins):
            continue
        if set(parts) != set(rule.source_patterns) or len(joins) != (len(parts) > 1):
            continue
        dim = cast(Any, joins[0]).dim if joins else 1
        if dim < 1:
            continue
        out[new] = Fused(
            tuple(tuple(sorted(parts[p], key=_numbers)) for p in rule.source_patterns), dim
        )
    return out


def _numbers(name: str) -> list[int]:
    return [int(n) for n in _NUMBER.findall(name)]
