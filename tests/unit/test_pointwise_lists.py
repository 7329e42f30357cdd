"""The lists of elementwise maps say of each what torch computes."""

from __future__ import annotations

import pytest
import torch

from surgeon.ops import pointwise as p

X = torch.tensor([-0.7, -0.2, 0.4, 0.9], dtype=torch.float64)


def call(name: str, x: torch.Tensor) -> torch.Tensor:
    return getattr(torch.ops.aten, name).default(x)


@pytest.mark.parametrize("name", p.ODD)
def test_odd_maps_commute_with_signs(name: str) -> None:
    torch.testing.assert_close(call(name, -X), -call(name, X))


@pytest.mark.parametrize("name", (*p.ODD, *p.ZERO_KEEPING))
def test_maps_that_keep_zero(name: str) -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(call(name, zero), zero)


@pytest.mark.parametrize("name", ["cos", "exp", "sigmoid", "softplus"])
def test_maps_that_do_not(name: str) -> None:
    assert name in p.NOT_ZERO_KEEPING
    assert call(name, torch.zeros(1)).item() != 0


@pytest.mark.parametrize("name", p.INFINITE_AT_ZERO)
def test_maps_that_are_infinite_at_zero(name: str) -> None:
    assert call(name, torch.zeros(1)).isinf().all()
