"""Safetensors files and their shards, written tensor by tensor."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.ahead import ahead
from surgeon.emit.unbuffered import UnbufferedFile
from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000

LARGE_BYTES = 2**28
"""From this size on a file is written past the page cache; a smaller one may soon be read."""

SAFETENSORS_NAMES: dict[str, tuple[str, int]] = {
    "bool": ("BOOL", 1),
    "u8": ("U8", 1),
    "i8": ("I8", 1),
    "f8e5m2": ("F8_E5M2", 1),
    "f8e4m3": ("F8_E4M3", 1),
    "i16": ("I16", 2),
    "f16": ("F16", 2),
    "bf16": ("BF16", 2),
    "i32": ("I32", 4),
    "f32": ("F32", 4),
    "c64": ("C64", 8),
    "f64": ("F64", 8),
    "i64": ("I64", 8),
}
"""Element types by the program's short names: the format's name, and bytes an element.

In the format's own order, of which its files are sorted by the reverse.
"""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its metadata now, its values when they are asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]
    pieces: Callable[[], Iterable[torch.Tensor]] | None = None
    """The same values in blocks of rows, in order, for what should not be held as a whole."""

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return SAFETENSORS_NAMES[self.dtype][1] * math.prod(self.shape)


# --- outputs -----------------------------------------------------------------------------------


def write_safetensors(
    folder: str | os.PathLike[str],
    tensors: Iterable[TensorSpec],
    *,
    max_shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> tuple[Path, ...]:
    """Writes tensors one at a time and returns the files: one, or shards with their index.

    File names, the split and the index are those of Transformers. At no time are more than three
    tensors held, or blocks of them: what is written next is made in another thread.

    Args:
        folder: an existing folder, best the one that `output_folder` yields.
        tensors: what to write. Values are asked for in the order of the file.
        max_shard_bytes: a tensor larger than this has a shard of its own.
        metadata: the header's text entries; None means `{"format": "pt"}`.

    Raises:
        SurgeonError: `plan-mismatch` where a tensor is not what its spec announced, or a name
            comes twice.
    """
    folder = Path(folder)
    shards = _shards(list(tensors), max_shard_bytes)
    header = dict(metadata) if metadata is not None else {"format": "pt"}
    if len(shards) == 1:
        path = folder / "model.safetensors"
        write_safetensors_file(path, shards[0], metadata=header)
        return (path,)
    files: list[Path] = []
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        path = folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors_file(path, shard, metadata=header)
        files.append(path)
        weight_map.update({spec.name: path.name for spec in shard})
    everything = [spec for shard in shards for spec in shard]
    index = {
        "metadata": {
            "total_parameters": sum(math.prod(spec.shape) for spec in everything),
            "total_size": sum(spec.nbytes for spec in everything),
        },
        "weight_map": weight_map,
    }
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return (*files, path)


def _shards(specs: list[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    """Greedy, in the given order; what exceeds the limit alone is alone."""
    _check_names(specs)
    shards: list[list[TensorSpec]] = []
    current: list[TensorSpec] = []
    size = 0
    for spec in specs:
        if spec.nbytes > limit:
            shards.append([spec])
            continue
        if size + spec.nbytes > limit:
            shards.append(current)
            current, size = [], 0
        current.append(spec)
        size += spec.nbytes
    if current or not shards:
        shards.append(current)
    return shards


def _check_names(specs: Iterable[TensorSpec]) -> None:
    seen: set[str] = set()
    for spec in specs:
        if spec.name in seen:
            raise _unannounced(spec, "the name comes twice")
        seen.add(spec.name)


def write_safetensors_file(
    path: str | os.PathLike[str],
    tensors: Iterable[TensorSpec],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes one safetensors file, tensor by tensor, without a temporary name of its own.

    Raises:
        SurgeonError: `plan-mismatch`, as for `write_safetensors`.

    Reference:
        The format's own description (huggingface/safetensors, README, "Format"): 8 bytes of
        header length, a JSON header padded to 8 bytes, the values without gaps.
    """
    # The widest elements first keeps every tensor aligned although there may be no gaps.
    order = list(SAFETENSORS_NAMES)
    specs = sorted(tensors, key=lambda spec: (-order.index(spec.dtype), spec.name))
    _check_names(specs)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    large = at >= LARGE_BYTES
    with UnbufferedFile(path) if large else Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # Closed here whatever happens, so that no thread goes on reading after a full disk.
        with closing(ahead(value for spec in specs for value in _values(spec))) as every:
            for values in every:
                file.write(values)


def _values(spec: TensorSpec) -> Iterator[memoryview]:
    """Yields the bytes of a tensor, checked against what was announced."""
    import torch

    from surgeon.capture.exported import DTYPES

    rows = 0
    for tensor in (spec.load(),) if spec.pieces is None else spec.pieces():
        shape = tuple(tensor.shape)
        rows += shape[0] if shape else 1
        name = DTYPES.get(tensor.dtype)
        whole = spec.pieces is None and shape != spec.shape
        if name != spec.dtype or whole or shape[1:] != spec.shape[1:]:
            raise _unlike(spec, f"{name} {list(shape)}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            values: Any = flat.view(torch.uint8).numpy()
            yield memoryview(values)
    if spec.pieces is not None and rows != (spec.shape[0] if spec.shape else 1):
        raise _unlike(spec, f"{rows} rows")


def _unlike(spec: TensorSpec, made: str) -> SurgeonError:
    return _unannounced(spec, f"announced as {spec.dtype} {list(spec.shape)}, made as {made}")


def _unannounced(spec: TensorSpec, why: str) -> SurgeonError:
    return SurgeonError(
        Code.PLAN_MISMATCH,
        "a tensor is not what the plan announced",
        at=spec.name,
        why=why,
        try_="check that the plan was made for this very model",
    )
