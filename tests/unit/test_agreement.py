"""Agreement with a reference whose logits waited on disk, against sums written out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from surgeon.errors import Code, SurgeonError
from surgeon.report import agreement as a


def logits(seed: int, window: int = 300, vocab: int = 17) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, window, vocab)).astype(np.float32) * 3


def by_hand(reference: np.ndarray, model: np.ndarray) -> tuple[float, float]:
    same, total = 0, 0.0
    for p_row, q_row in zip(reference[0, :-1].tolist(), model[0, :-1].tolist(), strict=True):
        p = [math.exp(x) / sum(map(math.exp, p_row)) for x in p_row]
        q = [math.exp(x) / sum(map(math.exp, q_row)) for x in q_row]
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        same += p.index(max(p)) == q.index(max(q))
    return same / len(reference[0, :-1]), total / len(reference[0, :-1])


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_it_is_what_the_sums_give(tmp_path: Path, kind: str):
    kept, differences = a.Kept(tmp_path), a.Differences()
    pairs = [(logits(n), logits(n) + logits(n + 9) * 0.3) for n in (0, 1)]
    for window, (reference, _) in enumerate(pairs):
        kept.keep(3, window, torch.from_numpy(reference) if kind == "torch" else reference)
    for window, (_, model) in enumerate(pairs):
        given = torch.from_numpy(model) if kind == "torch" else model
        differences.add(kept.load(3, window), given)
    found = differences.result()
    top1, kl = np.mean([by_hand(*pair) for pair in pairs], axis=0)
    assert found.tokens == 2 * 299
    assert found.top1 == pytest.approx(top1) and 0.5 < top1 < 1
    assert found.kl == pytest.approx(kl, rel=1e-6)


def test_a_model_agrees_with_itself_exactly(tmp_path: Path):
    kept, differences = a.Kept(tmp_path), a.Differences()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = torch.from_numpy(logits(1)).to(dtype)
        kept.keep(0, 0, given)
        differences.add(kept.load(0, 0), given)
    assert differences.result() == a.Agreement(1.0, 0.0, 3 * 299)


def test_an_offset_of_all_logits_changes_nothing():
    given = torch.from_numpy(logits(2)[0])
    assert a.divergence(given, given + 5) == pytest.approx(0, abs=1e-5)


def test_tokens_that_are_ruled_out_count_on_one_side_only():
    even, one = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]])
    assert a.divergence(one, even) == pytest.approx(math.log(2))
    assert a.divergence(even, one) == math.inf


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(a.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SurgeonError) as caught:
        a.Kept(tmp_path).keep(0, 0, logits(0))
    assert caught.value.code is Code.DISK_FULL and "--agreement-windows" in caught.value.try_
    assert not list(tmp_path.iterdir())
