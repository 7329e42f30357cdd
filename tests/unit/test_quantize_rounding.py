"""Weights as integers with a scale: what the bytes stand for is near to what they were."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from surgeon.emit.quantize import rounding
from surgeon.emit.quantize.rounding import restore, round_blocks, round_columns, sizes
from surgeon.emit.quantize.scheme import ROUNDINGS, Grid, Scheme
from surgeon.errors import Code, SurgeonError


def drawn(rows: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


@pytest.mark.parametrize("method", ROUNDINGS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block"), [(64, 32), (96, 32), (80, 32), (36, 16), (20, 256)])
def test_no_weight_moves_by_more_than_a_level(
    method: str, bits: int, width: int, block: int
) -> None:
    matrix, grid = drawn(9, width), Grid(bits, block, method)
    blocks = round_blocks(matrix, grid)
    assert {n: v.shape for n, v in vars(blocks).items()} == dict(sizes(9, width, grid))
    apart = np.abs(restore(blocks, width, grid) - matrix)
    levels = np.repeat(blocks.scales, block, 1)[:, :width]
    # Searched scales are smaller than the range needs: the outermost weight is cut.
    assert (apart <= levels * (0.51 if method == "nearest" else 2)).all()
    assert apart.max() > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_searching_is_never_worse_than_rounding_to_the_nearest(bits: int) -> None:
    matrix = drawn(20, 64)
    matrix[3], matrix[4], matrix[5] = 0.0, 0.3, matrix[5] + 10
    matrix[6] = -np.abs(matrix[6]) - 5
    errors: list[NDArray[Any]] = []
    for method in ("k-quant", "nearest"):
        grid = Grid(bits, 32, method)
        apart = restore(round_blocks(matrix, grid), 64, grid) - matrix
        errors.append(np.square(apart).reshape(20, 2, 32).sum(-1))
    searched, nearest = errors
    assert (searched <= nearest * (1 + 1e-5)).all()
    assert searched.sum() < nearest.sum()
    assert searched[3:5].max() < 1e-9


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, grid = drawn(50, 48), Grid(4)
    whole, columns = round_blocks(matrix, grid), round_columns(matrix)
    monkeypatch.setattr(rounding, "PIECE", 200)
    for name, value in vars(round_blocks(matrix, grid)).items():
        assert np.array_equal(value, getattr(whole, name))
    for value, wanted in zip(round_columns(matrix), columns, strict=True):
        assert np.array_equal(value, wanted)


def test_columns_have_a_scale_each() -> None:
    matrix = drawn(48, 30) * np.logspace(-3, 3, 30, dtype=np.float32)
    matrix[:, 7] = 0
    codes, scales, zeros = round_columns(matrix)
    assert codes.dtype == zeros.dtype == np.uint8 and scales.shape == (30,)
    assert (np.abs((codes.astype(np.float32) - zeros) * scales - matrix) <= scales * 0.51).all()
    assert (zeros == 128).all()  # so that activations of either sign lose the same


def test_the_root_logger_is_left_as_it_was() -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level
    for method in ROUNDINGS:
        round_blocks(drawn(2, 32), Grid(4, 32, method))
    assert (list(root.handlers), root.level) == before


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "int3"}, "did you mean int8, int4?"),
        ({"name": "int4", "block_size": 24}, "--block-size 16"),
        ({"name": "int4", "block_size": 512}, "--block-size 256"),
        ({"name": "int4", "rounding": "k_quant"}, "did you mean k-quant?"),
    ],
)
def test_what_does_not_exist(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SurgeonError) as caught:
        Scheme(**options)
    assert caught.value.code is Code.BAD_OPTION
    assert text in caught.value.try_
