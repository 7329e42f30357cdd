"""Lazy weights: a parameter's name gives its tensor, its shape without reading it, its bytes."""

from __future__ import annotations

import hashlib
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import torch

from surgeon.capture.blocks import Buffers, Span, extent, spans, whole
from surgeon.capture.safetensors_header import Entry, bad_checkpoint, header, opened, truncated
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Param

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

BLOCK = 2**24
"""Bytes that are read at once where two tensors are compared."""

HEAD = 64
"""How many bytes of each tensor go into a fingerprint."""


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by parameter name, read when they are asked for.

    What is returned may be the source's own memory: it must not be written to.

    Args:
        stored: the names that the source has.
        aliases: further names, each with the name that it is tied to. Whichever of a tied
            group the source has, all of the group can be asked for.
    """

    def __init__(self, stored: Iterable[str], aliases: Mapping[str, str] | None = None) -> None:
        self._names = tuple(stored)
        self._own = {name: name for name in self._names}
        self._leader = dict(aliases or {})
        self._tied: dict[str, list[str]] = {}
        for alias, name in (aliases or {}).items():
            self._tied.setdefault(name, [name]).append(alias)
        for group in self._tied.values():
            found = next((name for name in group if name in self._own), None)
            if found is not None:
                for name in group:
                    self._own.setdefault(name, found)

    @abstractmethod
    def _read(self, name: str) -> torch.Tensor:
        """The tensor of a stored name."""

    @abstractmethod
    def _meta(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Element type and shape of a stored name, without its values."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Returns a SHA-256 that tells these weights from others without reading all of them.

        It covers names, element types, shapes and the first bytes of each tensor. A model and
        the checkpoint it was loaded from have the same one, however that is split into files.
        """

    def _fingerprint(self, heads: Iterable[tuple[str, object, tuple[int, ...], bytes]]) -> str:
        """Returns the digest of stored names, element types, shapes and first bytes."""
        found = {self._leader.get(n, n): (str(t), tuple(s), head) for n, t, s, head in heads}
        return digest(sorted(found.items()))

    def _read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._read(name)[start:stop]

    def names(self) -> tuple[str, ...]:
        """The names that the source has, in its order, without aliases."""
        return self._names

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(self._stored(name))

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a tensor, or `default` where there is none of that name."""
        if key not in self:
            return default
        return self[key]

    # A mapping's own comparison would read every tensor of both.
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns rows `start` to `stop` of a tensor, the others unread where the source can."""
        return self._read_rows(self._stored(name), start, stop)

    def blocks(
        self, name: str, wanted: Sequence[Span], buffers: Buffers
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields rows of a tensor, span by span, each with the number of its first row.

        Where the source can, they are read into the buffers, the others unread.
        """
        yield from self._blocks(self._stored(name), wanted, buffers)

    def _blocks(
        self, name: str, wanted: Sequence[Span], buffers: Buffers
    ) -> Iterator[tuple[int, torch.Tensor]]:
        return whole(self, name, wanted)

    def place(self, name: str) -> tuple[str, int]:
        """Returns what sorts tensors as they lie in the source: file and offset, or a number."""
        return "", self._order[self._stored(name)]

    @cached_property
    def _order(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self._names)}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._meta(self._stored(name))[1]

    def dtype(self, name: str) -> torch.dtype:
        """The element type of a tensor, without reading it."""
        return self._meta(self._stored(name))[0]

    def nbytes(self, name: str) -> int:
        """The bytes of a tensor's values, without reading it."""
        dtype, shape = self._meta(self._stored(name))
        return dtype.itemsize * math.prod(shape)

    def _stored(self, name: str) -> str:
        if name not in self._own:
            raise bad_checkpoint(
                f"there is no tensor {name}",
                at=self.where,
                why=f"it has {len(self)} tensors, such as {', '.join(self._names[:3])}",
                try_="check that the weights belong to this model",
            )
        return self._own[name]

    @property
    def where(self) -> str:
        """Where the weights come from, for a message."""
        return type(self).__name__

    def check(self, params: Iterable[Param]) -> None:
        """Returns if these are the weights of a program with `params`.

        Every `parameter` and `buffer` must be there with its shape, as numbers that can be
        computed with; tied names must agree.

        Raises:
            SurgeonError: `bad-checkpoint`, naming the first few tensors at fault.
        """
        missing: list[str] = []
        wrong: list[str] = []
        for param in params:
            if param.kind not in ("parameter", "buffer"):
                continue
            held = [n for n in (param.name, *param.aliases) if n in self]
            if not held:
                missing.append(param.name)
                continue
            for name in dict.fromkeys(self._own[n] for n in held):
                dtype, shape = self._meta(name)
                if shape != param.type.shape:
                    wrong.append(f"{name} is {list(shape)} and should be {list(param.type.shape)}")
                elif param.kind == "parameter" and not dtype.is_floating_point:
                    wrong.append(f"{name} holds {dtype}, which is a packed or quantised form")
            self._check_tie(list(dict.fromkeys(self._own[n] for n in held)))
        if missing:
            self._misfit(f"{len(missing)} tensors that the model needs are missing", missing)
        if wrong:
            self._misfit(f"{len(wrong)} tensors are not what the model needs", wrong)

    def _check_tie(self, names: list[str]) -> None:
        for other in names[1:]:
            if self.shape(names[0]) == self.shape(other) and not self._same(names[0], other):
                raise bad_checkpoint(
                    f"{names[0]} and {other} are tied and stored with different values",
                    at=self.where,
                    why="the config makes them one parameter, the checkpoint two",
                    try_='set "tie_word_embeddings": false in config.json if they are two',
                )

    def _same(self, name: str, other: str) -> bool:
        """Whether two tensors of one shape hold the same values; they are read in blocks."""
        rows = spans(*extent(self.shape(name), self.dtype(name).itemsize), BLOCK)
        left, right = (self.blocks(n, rows, Buffers(1, BLOCK)) for n in (name, other))
        return all(same_bits(a, b) for (_, a), (_, b) in zip(left, right, strict=True))

    def _misfit(self, what: str, faults: list[str]) -> NoReturn:
        more = f", and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise bad_checkpoint(
            what,
            at=self.where,
            why="; ".join(faults[:4]) + more,
            try_="check that config.json and the weights belong together",
            data={"tensors": faults},
        )


def computable(dtype: torch.dtype) -> bool:
    """Whether a parameter of this type holds its values themselves, not a packed form."""
    return dtype.is_floating_point and dtype.itemsize > 1


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors have the same type, shape and bits, 8-bit floats included."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.dtype.is_floating_point and left.dtype.itemsize == 1:
        return torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    return torch.equal(left, right)


def digest(entries: Iterable[object]) -> str:
    """Returns the SHA-256 of a sequence of plain values."""
    out = hashlib.sha256()
    for entry in entries:
        out.update(repr(entry).encode())
        out.update(b"\n")
    return out.hexdigest()


def _first_bytes(tensor: torch.Tensor) -> bytes:
    count = min(tensor.numel(), -(-HEAD // tensor.element_size()))
    flat = tensor.detach()
    while count and flat.ndim > 1 and flat[:1].numel() >= count:  # so that nothing large is copied
        flat = flat[0]
    flat = flat.reshape(-1)[:count].cpu().contiguous()
    return bytes(flat.view(torch.uint8).tolist())[:HEAD]


class StateDictWeights(Weights):
    """The tensors of a mapping, such as a model's state dict. They are referred to, not copied."""

    def __init__(
        self, tensors: Mapping[str, torch.Tensor], aliases: Mapping[str, str] | None = None
    ) -> None:
        self._tensors = dict(tensors)
        super().__init__(self._tensors, aliases)

    def _read(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach().cpu()

    def _meta(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        tensor = self._tensors[name]
        return tensor.dtype, tuple(tensor.shape)

    @property
    def where(self) -> str:
        """Where the weights come from, for a message."""
        return "the model's state dict"

    def fingerprint(self) -> str:
        """Returns a SHA-256 over names, element types, shapes and the first bytes of each."""
        return self._fingerprint(
            (name, t.dtype, tuple(t.shape), _first_bytes(t)) for name, t in self._tensors.items()
        )


class SafetensorsWeights(Weights):
    """The tensors of a checkpoint folder, in one safetensors file or in shards with an index.

    Args:
        folder: the checkpoint folder. Headers are read and checked now, values later.
        aliases: tied names, as for `Weights`.
        rename: from the stored names to those of the model, for those that differ.

    Raises:
        SurgeonError: `missing-file` for a shard or index that isn't there, `bad-checkpoint`
            for a file that is truncated or no safetensors file.
    """

    def __init__(
        self,
        folder: Path,
        aliases: Mapping[str, str] | None = None,
        rename: Callable[[Collection[str]], Mapping[str, str]] | None = None,
    ) -> None:
        self.folder = folder
        found = _entries(folder)
        names = dict(rename(found.keys())) if rename is not None else {}
        self._entries = {names.get(key, key): entry for key, entry in found.items()}
        super().__init__(self._entries, aliases)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        return tuple(sorted({entry.file for entry in self._entries.values()}))

    def _read(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        return _values(entry, entry.start, entry.shape)

    def _blocks(
        self, name: str, wanted: Sequence[Span], buffers: Buffers
    ) -> Iterator[tuple[int, torch.Tensor]]:
        entry = self._entries[name]
        _, row = extent(entry.shape, entry.dtype.itemsize)
        with opened(entry) as file:
            for start, stop in wanted:
                data = buffers.take((stop - start) * row)
                values: Any = data.numpy()
                _fill(file, entry.file, entry.start + start * row, memoryview(values))
                shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
                yield start, data.view(entry.dtype).reshape(shape)

    def place(self, name: str) -> tuple[str, int]:
        """Returns file and offset."""
        entry = self._entries[self._stored(name)]
        return str(entry.file), entry.start

    def _read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        entry = self._entries[name]
        rows, *inner = entry.shape
        start, stop, _ = slice(start, stop).indices(rows)
        width = math.prod(inner) * entry.dtype.itemsize
        shape = (max(0, stop - start), *inner)
        return _values(entry, entry.start + start * width, shape)

    def _meta(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        entry = self._entries[name]
        return entry.dtype, entry.shape

    @property
    def where(self) -> str:
        """Where the weights come from, for a message."""
        return str(self.folder)

    def fingerprint(self) -> str:
        """Returns a SHA-256 over names, element types, shapes and the first bytes of each."""
        return self._fingerprint(file_heads(self._entries))


class _FileWeights(SafetensorsWeights):
    """The tensors of one file."""

    def __init__(self, path: Path) -> None:
        self.folder = path
        self._entries = header(path)
        Weights.__init__(self, self._entries)


def _values(entry: Entry, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Reads values from a file. It is not mapped: pages of a mapping stay in memory for long."""
    size = math.prod(shape) * entry.dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=entry.dtype)
    data = bytearray(size)
    with opened(entry) as file:
        _fill(file, entry.file, start, memoryview(data))
    return torch.frombuffer(data, dtype=torch.uint8).view(entry.dtype).reshape(shape)


def _fill(file: FileIO, path: Path, start: int, left: memoryview) -> None:
    """Reads bytes from `start` on until the memory is full."""
    end = start + len(left)
    file.seek(start)
    while left:
        count = file.readinto(left)
        if not count:
            raise truncated(path, end, end - len(left))
        left = left[count:]


def file_heads(
    entries: Mapping[str, Entry],
) -> Iterator[tuple[str, object, tuple[int, ...], bytes]]:
    """Metadata and first bytes of tensors, each file opened once."""
    held: tuple[Path, Any] | None = None
    try:
        for name, e in sorted(entries.items(), key=lambda item: (item[1].file, item[1].start)):
            if held is None or held[0] != e.file:
                if held is not None:
                    held[1].close()
                held = e.file, e.file.open("rb")
            held[1].seek(e.start)
            yield name, e.dtype, e.shape, held[1].read(min(HEAD, e.stop - e.start))
    finally:
        if held is not None:
            held[1].close()


def stored_tensors(path: Path) -> Weights:
    """Returns the tensors of one safetensors file, under the names that they have there.

    Raises:
        SurgeonError: `missing-file`, or `bad-checkpoint` for a damaged file.
    """
    return _FileWeights(path)


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds a safetensors checkpoint, perhaps an incomplete one."""
    return any(folder.glob("model*.safetensors")) or (folder / INDEX).is_file()


def _entries(folder: Path) -> dict[str, Entry]:
    if (folder / SINGLE).is_file():  # before an index, as Transformers does
        return header(folder / SINGLE)
    index = folder / INDEX
    if not index.is_file():
        shards = sorted(p.name for p in folder.glob("*.safetensors"))
        raise SurgeonError(
            Code.MISSING_FILE,
            f"there is neither {SINGLE} nor {INDEX}",
            at=str(folder),
            why=f"it has {', '.join(shards)} without an index" if shards else "it has no weights",
            try_="fetch the checkpoint again, its index included",
        )
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {key: folder / file for key, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise bad_checkpoint(
            "the index of the shards can't be read",
            at=str(index),
            why=f"{type(error).__name__}: {error}",
            try_="fetch this file again",
        ) from error
    # The name alone: `..` as a last part has the folder itself for its parent.
    outside = [f for f in files.values() if f.parent != folder or f.name in ("", "..")]
    if outside:
        raise bad_checkpoint(
            "the index names files outside the folder",
            at=str(index),
            why=f"it names {outside[0]}",
            try_="don't use this checkpoint: a well-made index names plain files",
        )
    # Not asked of each name: the system refuses to look for one that is too long.
    there = {f.name for f in folder.iterdir() if f.is_file()}
    missing = sorted({f.name for f in files.values()} - there)
    if missing:
        raise SurgeonError(
            Code.MISSING_FILE,
            f"{len(missing)} of {len(set(files.values()))} shards are missing",
            at=str(folder),
            why=f"{INDEX} names {', '.join(missing[:4])}",
            try_="fetch the missing files; a checkpoint is read as a whole",
            data={"files": missing},
        )
    headers = {file: header(file) for file in dict.fromkeys(files.values())}
    absent = [key for key, file in files.items() if key not in headers[file]]
    if absent:
        raise bad_checkpoint(
            "the index and the shards disagree",
            at=str(folder),
            why=f"{files[absent[0]].name} should hold {absent[0]} and doesn't",
            try_="fetch index and shards again, from one version of the model",
        )
    return {key: headers[file][key] for key, file in files.items()}
