"""A pruned model's checkpoint, written: tensors block by block, and what describes them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from surgeon.axes.plan import Selection
from surgeon.capture.blocks import Reader
from surgeon.capture.weights import computable
from surgeon.emit.huggingface import Emission
from surgeon.emit.pieces import Room, full_shape, pieces
from surgeon.emit.safetensors_file import TensorSpec, write_safetensors
from surgeon.runtime.apply import Get, removed

PIECE = 2**22
"""Bytes that are read, sliced and written at a time at most: what was read is then still in the
processor's cache when it is written (a quarter faster than with 32 MiB).
"""

MODELLING = Path(__file__).with_name("modeling_surgeon_pruned.py")


def final(
    emission: Emission, selection: Selection, get: Get, name: str, dtype: torch.dtype
) -> torch.Tensor:
    """Returns a parameter as the checkpoint stores it: sliced, folded, then rounded once."""
    tensor = removed(selection, name, get(name))
    for scale in emission.scales.get(name, ()):
        tensor = scale.apply(tensor)
    return tensor.to(dtype).contiguous()


def write(
    folder: Path,
    emission: Emission,
    selection: Selection,
    get: Get,
    dtype_of: Callable[[str], torch.dtype],
    *,
    read: Reader | None = None,
    block: int = 2**24,
    tokenizer_files: tuple[Path, ...] = (),
    tokenizer: Any = None,
    generation_config: Any = None,
) -> None:
    """Writes the checkpoint into an existing folder, in blocks of rows where these can be read.

    Args:
        folder: where to.
        emission: names, and what is folded into which parameter.
        selection: the plan's arithmetic.
        get: reads a parameter in full size, rewrites applied, as fp32.
        dtype_of: the element type that a parameter is stored in.
        read: reads rows of the same tensors, in the source's element type.
        block: bytes that are read, sliced and written at a time.
        tokenizer_files: as for `describe`, like what follows.
        tokenizer: likewise.
        generation_config: likewise.
    """
    write_tensors(folder, emission, selection, get, dtype_of, read=read, block=block)
    describe(
        folder,
        emission,
        tokenizer_files=tokenizer_files,
        tokenizer=tokenizer,
        generation_config=generation_config,
    )


def write_tensors(
    folder: Path,
    emission: Emission,
    selection: Selection,
    get: Get,
    dtype_of: Callable[[str], torch.dtype],
    *,
    read: Reader | None = None,
    block: int = 2**24,
) -> None:
    """Writes a checkpoint's tensors into an existing folder; see `write`."""
    from surgeon.capture.exported import DTYPES

    room = Room(min(block, PIECE))

    def load(name: str) -> torch.Tensor:
        return final(emission, selection, get, name, dtype_of(name))

    def parts(name: str) -> Iterator[torch.Tensor]:
        assert read is not None
        scales, full = emission.scales.get(name, ()), full_shape(selection, name)
        return pieces(selection, scales, read, name, dtype_of(name), full, room)

    specs = [
        TensorSpec(
            new,
            DTYPES[dtype_of(old)],
            selection.shape(old),
            lambda old=old: load(old),
            None if read is None else lambda old=old: parts(old),
        )
        for old, new in emission.names.items()
    ]
    write_safetensors(folder, specs)


def describe(
    folder: Path,
    emission: Emission,
    *,
    tokenizer_files: tuple[Path, ...] = (),
    tokenizer: Any = None,
    generation_config: Any = None,
    quantization: Mapping[str, Any] | None = None,
) -> None:
    """Writes what a checkpoint has beside its tensors: configuration, code and tokenizer.

    Args:
        folder: an existing folder.
        emission: what the tensors are of.
        tokenizer_files: of the source.
        tokenizer: of the source, where it has no files.
        generation_config: of the source.
        quantization: the configuration's `quantization_config`.
    """
    more = {} if quantization is None else {"quantization_config": quantization}
    if emission.config_json is not None:
        text = json.dumps({**emission.config_json, **more}, indent=2, default=str) + "\n"
        (folder / "config.json").write_text(text)
        shutil.copyfile(MODELLING, folder / MODELLING.name)
    else:
        config = copy.deepcopy(emission.candidate.config)
        config.architectures = [emission.architecture]
        config.update(more)
        config.save_pretrained(folder)
    carry(folder, tokenizer_files, tokenizer)
    if generation_config is not None:
        generation_config.save_pretrained(folder)


def carry(folder: Path, tokenizer_files: tuple[Path, ...], tokenizer: Any) -> None:
    """Puts the source's tokenizer into a folder: its files, or one that had to be converted."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for file in tokenizer_files:
        shutil.copyfile(file, folder / file.name)


def with_dtype(emission: Emission, dtype: torch.dtype) -> Emission:
    """Returns the emission with the element type that loading should give."""
    name = str(dtype).removeprefix("torch.")
    if emission.config_json is not None:
        return replace(emission, config_json={**emission.config_json, "dtype": name})
    emission.candidate.config.dtype = dtype
    return emission


def main_dtype(
    emission: Emission, selection: Selection, dtype_of: Callable[[str], torch.dtype]
) -> torch.dtype:
    """Returns the element type that most weights have, of those that can be computed in.

    It is what the configuration says: weights in 8-bit floats are widened when they are loaded.
    """
    weight: dict[torch.dtype, int] = {}
    for name in emission.names:
        dtype = dtype_of(name)
        if computable(dtype):
            weight[dtype] = weight.get(dtype, 0) + prod(selection.shape(name))
    return max(weight, key=lambda d: weight[d]) if weight else torch.float32
