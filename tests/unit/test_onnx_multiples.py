"""What GroupQueryAttention wants of head sizes is offered to selection."""

from __future__ import annotations

import surgeon
from surgeon.emit.onnx_decoder import head_multiples
from surgeon.opening import open_model
from tests import models


def test_pairs_go_in_eights_where_heads_come_in_sixteens() -> None:
    wide = open_model(models.tiny("Llama", head_dim=64))
    assert list(head_multiples(wide.axes).values()) == [8]
    odd = open_model(models.tiny("Llama", head_dim=24))
    assert head_multiples(odd.axes) == {}
    learned = open_model(models.tiny("GPT2"))
    assert set(head_multiples(learned.axes).values()) == {8}


def test_what_is_left_still_turns_inside_the_attention() -> None:
    model = models.tiny("Llama", head_dim=64)
    shares = {"qk": 0.3, "v": 0.3}
    loose = surgeon.prune(model, roles=shares, target="pt2", verify=False)
    held = surgeon.prune(model, roles=shares, target="onnx", verify=False)
    (pairs,) = {c.count for c in loose.plan.cuts if "rotary" in c.axis}
    (eights,) = {c.count for c in held.plan.cuts if "rotary" in c.axis}
    assert pairs % 8 and eights % 8 == 0
