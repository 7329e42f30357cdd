"""How a graph is quantised: the schemes, and what goes together with what."""

from __future__ import annotations

from dataclasses import dataclass

from surgeon.errors import Code, SurgeonError, near

SCHEMES = {"int4": 4, "w8": 8, "int8": 8}
"""Bits of a weight, by scheme."""

BLOCKS = (16, 32, 64, 128, 256)
"""Weights that may share a scale: what ONNX Runtime's MatMulNBits has kernels for."""

BLOCK_SIZE = 32

ROUNDINGS = ("nearest", "k-quant")
"""ONNX Runtime's, without those that can't serve here: HQQ's zero points are floats, with which the
CPU kernel takes sixty times as long and a lookup has no kernel; GPTQ (in 1.31) passes errors on
through the lower half of an upper triangular factor, which is zero, and so rounds to the nearest.
"""


@dataclass(frozen=True)
class Grid:
    """Bits of a weight, weights that share a scale, and how they are rounded."""

    bits: int
    block_size: int = BLOCK_SIZE
    rounding: str = "nearest"


@dataclass(frozen=True)
class Scheme:
    """How weights are stored.

    Attributes:
        name: `int4` and `w8` store weights in 4 or 8 bits and compute in the graph's element type,
            on a CPU in 8 bits with a scale for every block of an activation; `int8` computes in 8
            bits with one scale for a whole activation, and on a CPU only.
        block_size: neighbouring weights of a row that share a scale and a zero point. Where a row
            is no multiple of it, the last block is filled up with zeros.
        rounding: `nearest` spreads the levels from the smallest to the largest weight of a block;
            `k-quant` searches for the scale and zero point of the least error, in twenty times
            the time. Neither needs data.
        table_bits: bits of the embedding and of a head that shares its table, which are worth
            more than the layers'.
    """

    name: str
    block_size: int = BLOCK_SIZE
    rounding: str = "nearest"
    table_bits: int = 8

    def __post_init__(self) -> None:
        """Refuses what doesn't exist."""
        _check("--quantize", "scheme", self.name, tuple(SCHEMES))
        _check("--rounding", "rounding", self.rounding, ROUNDINGS)
        if self.block_size not in BLOCKS:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"blocks can't have {self.block_size} weights",
                at="--block-size",
                why="ONNX Runtime's kernel has the sizes " + ", ".join(map(str, BLOCKS)),
                try_=f"--block-size {min(BLOCKS, key=lambda b: abs(b - self.block_size))}",
            )

    @property
    def bits(self) -> int:
        """Bits of a weight in a layer."""
        return SCHEMES[self.name]

    @property
    def grid(self) -> Grid:
        """Of weights in a layer."""
        return Grid(self.bits, self.block_size, self.rounding)

    @property
    def table_grid(self) -> Grid:
        """Of the embedding, and of a head that shares its table."""
        return Grid(self.table_bits, self.block_size, self.rounding)

    def check(self, style: str, dtype: str) -> None:
        """Refuses a graph that the scheme has no kernels for."""
        if style == "generic":
            raise SurgeonError(
                Code.BAD_OPTION,
                "a graph of the generic style isn't quantised",
                at=f"--quantize {self.name} --style generic",
                why="torch's exporter decides what becomes of the weights there",
                try_="--style ort or --style standard",
            )
        if self.name == "int8" and dtype != "fp32":
            raise SurgeonError(
                Code.BAD_OPTION,
                f"int8 can't be had in {dtype}",
                at=f"--quantize int8 --dtype {dtype}",
                why="ONNX rounds activations to 8 bits from fp32 only (DynamicQuantizeLinear)",
                try_="--dtype fp32, or --quantize w8",
            )


def _check(option: str, what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"there is no {what} {value!r}",
            at=option,
            why=f"the {what}s are {', '.join(known)}",
            try_=near(value, known),
        )
