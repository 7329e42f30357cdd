"""Products that may round their factors, for as long as that is asked for."""

from __future__ import annotations

import pytest
import torch

from surgeon.runtime.precision import rounded_products


def test_the_precision_is_afterwards_what_it_was() -> None:
    before = torch.get_float32_matmul_precision()
    with rounded_products():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match="on the way"), rounded_products():
        raise ValueError("on the way")
    assert torch.get_float32_matmul_precision() == before
