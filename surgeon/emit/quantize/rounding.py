"""Weights as integers with a scale, rounded by ONNX Runtime's own functions."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.emit.quantize.scheme import Grid

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

PIECE = 1 << 20
"""Weights that are rounded at once: rounding takes some twenty times their memory."""


@dataclass(frozen=True)
class Blocks:
    """A matrix [N, K] in blocks along K: weight = (code − zero) · scale.

    Attributes:
        codes: [N, blocks, bytes of a block]; of two codes in a byte the first is the lower half.
        scales: [N, blocks].
        zeros: [N, bytes of the zero points of a row], packed as the codes are.
    """

    codes: Bytes
    scales: Floats
    zeros: Bytes


def sizes(rows: int, width: int, grid: Grid) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of the fields of `Blocks` for a matrix of this size."""
    count = -(-width // grid.block_size)
    return {
        "codes": (rows, count, grid.block_size * grid.bits // 8),
        "scales": (rows, count),
        "zeros": (rows, -(-count * grid.bits // 8)),
    }


def round_blocks(matrix: NDArray[Any], grid: Grid) -> Blocks:
    """Returns a matrix [N, K] in blocks.

    Args:
        matrix: in any floating type; it may be a transposed view.
        grid: bits, block size and rounding.
    """
    rows, width = matrix.shape
    shapes = sizes(rows, width, grid)
    found = Blocks(
        np.empty(shapes["codes"], np.uint8),
        np.empty(shapes["scales"], np.float32),
        np.empty(shapes["zeros"], np.uint8),
    )
    step = max(1, PIECE // max(1, width))
    for start in range(0, rows, step):
        piece = np.asarray(matrix[start : start + step], dtype=np.float32)
        part = _rounded(piece, grid)
        found.codes[start : start + step] = part.codes
        found.scales[start : start + step] = part.scales
        found.zeros[start : start + step] = part.zeros
    return found


def restore(blocks: Blocks, width: int, grid: Grid) -> Floats:
    """Returns the matrix [N, K] that the blocks stand for."""
    rows, count = blocks.scales.shape
    codes = unpack(blocks.codes, grid.bits).astype(np.float32)
    zeros = unpack(blocks.zeros, grid.bits)[:, :count, None].astype(np.float32)
    found = (codes - zeros) * blocks.scales[..., None]
    return found.reshape(rows, -1)[:, :width]


def pack(codes: Bytes, bits: int) -> Bytes:
    """Returns codes along the last dimension in as few bytes as they fit in."""
    if bits == 8:
        return codes
    if codes.shape[-1] % 2:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, 1)])
    high: Bytes = np.left_shift(codes[..., 1::2], 4, dtype=np.uint8)
    return codes[..., ::2] | high


def unpack(packed: Bytes, bits: int) -> Bytes:
    """Returns codes along the last dimension, one in a byte."""
    if bits == 8:
        return packed
    low: Bytes = np.bitwise_and(packed, 15, dtype=np.uint8)
    high: Bytes = np.right_shift(packed, 4, dtype=np.uint8)
    return np.stack([low, high], -1).reshape(*packed.shape[:-1], -1)


def round_columns(matrix: NDArray[Any]) -> tuple[Bytes, Floats, Bytes]:
    """Returns a matrix [K, N] in 8 bits with a scale [N] and a zero point [N] for every column.

    Unsigned, though around 128: products of unsigned with signed bytes overflow in the 16-bit sums
    of x86 processors before VNNI.

    Reference: ONNX Runtime, "Quantize ONNX models", on U8S8 and `reduce_range`.
    """
    width, columns = matrix.shape
    codes = np.empty((width, columns), np.uint8)
    scales = np.empty(columns, np.float32)
    zeros = np.empty(columns, np.uint8)
    step = max(1, PIECE // max(1, width))
    with _quiet():
        from onnx import TensorProto
        from onnxruntime.quantization import quant_utils

        tools: Any = quant_utils
        for start in range(0, columns, step):
            at = slice(start, start + step)
            piece = np.asarray(matrix[:, at], dtype=np.float32)
            zero, scale = tools.compute_scale_zp_blocked(
                piece, TensorProto.UINT8, 0, width, symmetric=True
            )
            codes[:, at] = tools.quantize_nparray(TensorProto.UINT8, piece, scale, zero)
            scales[at], zeros[at] = scale[0], zero[0]
    return codes, scales, zeros


# --- ONNX Runtime's functions --------------------------------------------------------------------


def _rounded(piece: Floats, grid: Grid) -> Blocks:
    found = _nearest(piece, grid)
    if grid.rounding == "nearest":
        return found
    other = _k_quant(piece, grid)
    # Its zero point is cut to what 4 or 8 bits hold, which ruins a block of one sign.
    better = _error(other, piece, grid) < _error(found, piece, grid)
    count, bits = found.scales.shape[1], grid.bits
    zeros = np.where(
        better, unpack(other.zeros, bits)[:, :count], unpack(found.zeros, bits)[:, :count]
    )
    return Blocks(
        np.where(better[..., None], other.codes, found.codes),
        np.where(better, other.scales, found.scales),
        pack(zeros, bits),
    )


def _error(blocks: Blocks, piece: Floats, grid: Grid) -> Floats:
    """Returns the sum of squared errors of every block, [N, blocks]."""
    apart = _filled(restore(blocks, piece.shape[1], grid) - piece, grid)
    error = np.square(apart).reshape(*blocks.scales.shape, -1).sum(-1)
    return np.where(np.isfinite(error), error, np.inf)


def _filled(piece: Floats, grid: Grid) -> Floats:
    """Returns rows filled up with zeros to whole blocks."""
    missing = -piece.shape[1] % grid.block_size
    return np.pad(piece, ((0, 0), (0, missing))) if missing else piece


def _nearest(piece: Floats, grid: Grid) -> Blocks:
    with _quiet():
        from onnxruntime.quantization import matmul_nbits_quantizer as tools

    settings = tools.DefaultWeightOnlyQuantConfig(block_size=grid.block_size, bits=grid.bits)
    quantizer: Any = tools.DefaultWeightOnlyQuantizer(settings)
    codes, scales, zeros = quantizer.qbits_block_quant(np.ascontiguousarray(piece.T))
    return Blocks(codes, scales, zeros)


def _k_quant(piece: Floats, grid: Grid) -> Blocks:
    with _quiet():
        from onnxruntime.quantization.neural_compressor import weight_only

    tools: Any = weight_only
    filled = _filled(piece, grid)
    # Blocks without any difference have no scale: the division by zero is told by what it gives.
    with np.errstate(divide="ignore", invalid="ignore"):
        codes, scales, zeros = tools.quant_tensor_k_quant_cpu(
            filled, num_bits=grid.bits, group_size=grid.block_size
        )
    shape = (len(piece), filled.shape[1] // grid.block_size)
    with np.errstate(invalid="ignore"):
        codes = codes.astype(np.uint8).reshape(*shape, -1)
    return Blocks(
        pack(codes, grid.bits),
        scales.astype(np.float32).reshape(shape),
        pack(zeros.reshape(shape), grid.bits),
    )


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Leaves the root logger as it was: the quantiser's module sets it up for itself."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
