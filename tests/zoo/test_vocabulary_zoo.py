"""Every architecture loses tokens: embedding, head, biases and configuration follow the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import surgeon as api
from surgeon.vocabulary.rewrite import config_ids
from surgeon.vocabulary.trim import plan_of
from tests import models

pytestmark = [pytest.mark.zoo, pytest.mark.slow]


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_tokens_go_and_the_others_keep_their_logits(name: str) -> None:
    full = models.tiny(name)
    origin = api.open_model(full)
    kept = sorted({*range(4, 101, 3), *config_ids(full.config.to_dict(), 101)})
    pruned = api.prune(origin, plan=plan_of(origin.axes, kept))
    small: Any = pruned.model
    assert type(small) is type(full) and small.config.vocab_size == len(kept)
    old = torch.tensor(kept)
    new = models.tokens(len(kept))
    with torch.no_grad():
        wanted, found = full(old[new]).logits[..., old], small(new).logits
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))
    # The padding row of a table that lost rows would be some other token's.
    table = next(op for op in pruned.program.ops if op.target == "aten.embedding.default")
    assert len(table.args) == 2 and not table.kwarg("padding_idx")
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-5
