"""Weights in a GGUF file, under the names and in the layout that Transformers gives them."""

from __future__ import annotations

import copy
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgeon.capture.weights import HEAD, Weights, bad_checkpoint, digest

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the metadata types that have a fixed size."""

_UINT32, _STRING, _ARRAY = 4, 8, 9
_FLOATS = frozenset(["F64", "F32", "F16", "BF16"])


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies in a GGUF file, and how its values are packed."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class _Scan:
    """Walks a GGUF header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.at += length
        if self.at > len(self.data):
            raise ValueError("a string goes on beyond the end of the file")
        return self.data[self.at - length : self.at].decode()

    def skip(self, kind: int) -> None:
        if kind == _STRING:
            length = self.number("Q")  # moves self.at, so not within the sum
            self.at += length
        elif kind == _ARRAY:
            of, count = self.number("I"), self.number("Q")
            if of in _SCALARS:
                self.at += count * _SCALARS[of]
            else:
                for _ in range(count):
                    self.skip(of)
        else:
            self.at += _SCALARS[kind]


class GGUFHeader:
    """A GGUF file's architecture and table of tensors; the file is known to be whole.

    Transformers reads these files too, but in seconds, for it unpacks the whole vocabulary.

    Raises:
        SurgeonError: `bad-checkpoint` where the file is truncated or no GGUF file.

    Reference:
        ggml, docs/gguf.md, "File structure".
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        self.architecture = ""
        self.tensors: tuple[GGUFTensor, ...] = ()
        try:
            with (
                path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                self._scan(_Scan(data))
        except (ValueError, LookupError, ArithmeticError, RecursionError, struct.error) as error:
            raise bad_checkpoint(
                f"{path.name} is truncated or no GGUF file",
                at=str(path),
                why=f"its {self.size} bytes can't be read as GGUF: {error}",
                try_="fetch this file again",
            ) from error
        expected = max((t.start + t.nbytes for t in self.tensors), default=0)
        if expected > self.size:
            raise bad_checkpoint(
                f"{path.name} is truncated",
                at=str(path),
                why=f"{expected} bytes expected, {self.size} found",
                try_="fetch this file again",
                data={"expected_bytes": expected, "found_bytes": self.size},
            )

    def _scan(self, scan: _Scan) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if scan.data[:4] != b"GGUF":
            raise ValueError("it doesn't begin with GGUF")
        scan.at = 4
        version = scan.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        tensors, fields = scan.number("Q"), scan.number("Q")
        alignment = 32
        for _ in range(fields):
            key, kind = scan.text(), scan.number("I")
            if key == "general.architecture" and kind == _STRING:
                self.architecture = scan.text()
            elif key == "general.alignment" and kind == _UINT32:
                alignment = scan.number("I")
            else:
                scan.skip(kind)
        table: list[tuple[str, str, tuple[int, ...], int, int]] = []
        for _ in range(tensors):
            name = scan.text()
            shape = tuple(scan.number("Q") for _ in range(scan.number("I")))
            kind, offset = GGMLQuantizationType(scan.number("I")), scan.number("Q")
            values, packed = GGML_QUANT_SIZES[kind]
            table.append((name, kind.name, shape, offset, math.prod(shape) // values * packed))
        begin = -(-scan.at // alignment) * alignment
        self.tensors = tuple(
            GGUFTensor(name, kind, shape, begin + offset, nbytes)
            for name, kind, shape, offset, nbytes in table
        )

    @cached_property
    def quantised(self) -> str | None:
        """The type that most of the values are packed in, None where they are plain floats."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.kind] = counts.get(tensor.kind, 0) + math.prod(tensor.shape)
        most = max(counts, key=lambda kind: counts[kind], default="F32")
        return None if most in _FLOATS else most

    def fingerprint(self) -> str:
        """Returns a SHA-256 over the file's size and each tensor's metadata and first bytes."""
        with self.path.open("rb") as file:

            def first(tensor: GGUFTensor) -> bytes:
                file.seek(tensor.start)
                return file.read(min(HEAD, tensor.nbytes))

            tensors = sorted(self.tensors, key=lambda t: t.name)
            return digest([self.size, *((t.name, t.kind, t.shape, first(t)) for t in tensors)])


class GGUFWeights(Weights):
    """The tensors of a GGUF file, unpacked to fp32.

    Transformers' own loader makes them, all at once when the first is asked for: it knows each
    architecture's names and undoes what the format's converters did to queries and keys.

    Args:
        header: the file.
        model: the model on the meta device, which has the names and shapes.
        aliases: tied names, as for `Weights`.
    """

    def __init__(
        self, header: GGUFHeader, model: nn.Module, aliases: Mapping[str, str] | None = None
    ) -> None:
        self.header = header
        self._class: Any = type(model)
        self._config: Any = copy.deepcopy(model.config)
        if hasattr(self._config, "quantization_config"):  # as a model read from GGUF has it
            del self._config.quantization_config
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        self._shapes = {n: s for n, s in shapes.items() if n not in (aliases or {})}
        super().__init__(self._shapes, aliases)

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        path = self.header.path
        model, info = self._class.from_pretrained(
            str(path.parent),
            config=self._config,  # without it the header is parsed once more
            gguf_file=path.name,
            dtype=torch.float32,
            output_loading_info=True,
        )
        lacking = sorted({*info["missing_keys"]} & {*self._names})
        if lacking:
            raise bad_checkpoint(
                f"{path.name} lacks {len(lacking)} tensors that the model needs",
                at=str(path),
                why=f"it has no {', '.join(lacking[:4])}",
                try_="convert the model to GGUF again, or prune its safetensors checkpoint",
                data={"tensors": lacking},
            )
        return {name: t.detach() for name, t in model.state_dict().items()}

    def _read(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def _meta(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        return torch.float32, self._shapes[name]

    @property
    def where(self) -> str:
        """Where the weights come from, for a message."""
        return str(self.header.path)

    def fingerprint(self) -> str:
        """Returns a SHA-256 over the file's size and each tensor's metadata and first bytes."""
        return self.header.fingerprint()
