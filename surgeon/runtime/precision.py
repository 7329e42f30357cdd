"""How precisely products of matrices are taken."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def rounded_products() -> Generator[None]:
    """Lets factors of fp32 products be rounded to bf16 (or TF32) while it lasts.

    That happens where the processor multiplies them in hardware, some three times as fast; sums
    stay fp32. It is for what is learnt in noisy steps, not for what is solved for or compared.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
