"""Losses of a training, against what one computes by hand."""

from __future__ import annotations

import math

import pytest
import torch

from surgeon.recovery.losses import hidden_loss, label_loss, logits_loss, together


def test_the_label_loss_is_the_mean_over_predicted_tokens() -> None:
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [1.0, 1.0, 1.0]]]))
    ids = torch.tensor([[2, 0, 2]])  # the first is given, and nothing follows the last
    assert float(label_loss(logits, ids)) == pytest.approx(-(math.log(0.5) + math.log(0.7)) / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_logits_loss_is_the_divergence_at_a_temperature_times_its_square(
    temperature: float,
) -> None:
    found, wanted = torch.tensor([[[0.0, 1.0], [2.0, -1.0]]]), torch.tensor([[[1.0, 0.0], [2, 0]]])
    total = 0.0
    for own, other in zip(found[0].tolist(), wanted[0].tolist(), strict=True):
        p, q = (
            [math.exp(x / temperature) / sum(math.exp(y / temperature) for y in row) for x in row]
            for row in (other, own)
        )
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = temperature**2 * total / 2
    assert float(logits_loss(found, wanted, temperature)) == pytest.approx(expected, rel=1e-5)


def test_the_hidden_loss_compares_directions_in_the_channels_that_are_left() -> None:
    whole = torch.tensor([[[3.0, 100.0, 4.0]]])
    kept = torch.tensor([0, 2])
    size = math.sqrt((9 + 16) / 2)
    own = torch.tensor([[[4.0, 3.0]]])
    expected = ((4 / size - 3 / size) ** 2 + (3 / size - 4 / size) ** 2) / 2
    assert float(hidden_loss([own], [whole], [kept])) == pytest.approx(expected, rel=1e-5)
    # A scale that is folded into the stream says nothing.
    assert float(hidden_loss([7 * own], [whole], [kept])) == pytest.approx(expected, rel=1e-5)
    # Several layers count alike, however large their streams are.
    both = hidden_loss([own, 9 * whole], [whole, whole], [kept, None])
    assert float(both) == pytest.approx(expected / 2, rel=1e-5)


def test_the_teacher_has_its_share() -> None:
    one, two, three = (torch.tensor(x) for x in (1.0, 2.0, 4.0))
    assert float(together({"label": one}, 1.0)) == 1.0
    assert float(together({"label": one, "logits": two}, 0.75)) == 1.75
    assert float(together({"label": one, "logits": two, "hidden": three}, 1.0)) == 6.0
