"""Four-bit levels: the nearest one, found again where weights are on them already, and GPTQ's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from passes.transform.gptq import Gptq
from surgeon.axes.budget import Budget
from surgeon.axes.plan import Plan, cut
from surgeon.emit.lowbit.grid import group_for, rounded, step_of
from surgeon.errors import SurgeonError
from surgeon.plugin import Context
from tests import calibrated


def weights(rows: int = 12, width: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_a_weight_is_half_a_step_or_less_from_its_level() -> None:
    found = rounded(weights(), 16)
    steps = found.steps.repeat_interleave(16, dim=1)
    assert ((found.values - weights()).abs() <= steps / 2 * (1 + 1e-6)).all()
    assert not found.found
    assert found.levels.min() == -8 and found.levels.max() == 7


def test_a_step_has_eight_bits_so_that_its_multiples_are_exact() -> None:
    steps = step_of(weights().unflatten(1, (-1, 16)))
    assert torch.equal(steps.bfloat16().float(), steps)
    assert torch.equal((steps * 7).double(), steps.double() * 7)


def test_levels_are_found_again_bit_for_bit_even_where_the_largest_is_missing() -> None:
    levels = torch.randint(-5, 4, (12, 64), generator=torch.Generator().manual_seed(1))
    steps = step_of(weights().unflatten(1, (-1, 16)))
    on = levels * steps.repeat_interleave(16, dim=1)
    found = rounded(on, 16)
    assert found.found
    assert torch.equal(found.values, on)


def test_levels_of_larger_groups_are_levels_of_smaller_ones() -> None:
    on = rounded(weights(), 32).values
    assert torch.equal(rounded(on, 16).values, on)


def test_a_scaled_grid_is_found_to_the_rounding_of_fp32() -> None:
    on = rounded(weights(), 16).values * 1.0371
    found = rounded(on, 16)
    assert found.found
    torch.testing.assert_close(found.values, on, rtol=1e-6, atol=0)


def test_zeros_stay_zero() -> None:
    found = rounded(torch.zeros(2, 32), 16)
    assert found.found and not found.values.any() and not found.steps.any()


@pytest.mark.parametrize(
    ("width", "asked", "group"),
    [(64, 32, 32), (72, 32, 24), (40, 32, 20), (16, 32, 16), (7, 32, None), (31, 30, None)],
)
def test_the_largest_group_that_divides_a_row_is_taken(
    width: int, asked: int, group: int | None
) -> None:
    assert group_for(width, asked) == group


def context(plan: Plan | None = None) -> Context:
    origin, data = calibrated.origin(), calibrated.data()
    return Context(origin.axes, origin.read, calibration=data, plan=plan or Plan())


def error(found: dict[str, Any]) -> float:
    origin = calibrated.origin()

    def read(name: str) -> torch.Tensor:
        return found.get(name, origin.read(name))

    (want,), (got,) = calibrated.run(origin), calibrated.run(origin, get=read)
    return float((want - got).square().mean())


def test_gptq_gives_weights_on_levels_that_do_less_harm_than_the_nearest() -> None:
    origin = calibrated.origin()
    made = dict(Gptq(group=16, damping=0.05).transform(context()))
    assert len(made) == 14  # seven maps in each of two layers; neither the embedding nor the head
    for name, tensor in made.items():
        assert rounded(tensor, 16).found, name
        assert torch.equal(rounded(tensor, 16).values, tensor)
    nearest = {name: rounded(origin.read(name), 16).values for name in made}
    assert error(made) < 0.8 * error(nearest)


def test_after_a_cut_the_columns_that_are_left_are_on_levels() -> None:
    axes = calibrated.origin().axes
    (first, *_) = axes.of_role("ffn")
    plan = Plan((cut(first, range(0, first.size, 2)),))
    down = next(m.param for m in first.members if "down" in m.param)
    made = Gptq(group=20).transform(context(plan))
    assert rounded(made[down][:, ::2], 20).found
    assert not rounded(made[down], 20).found


def test_before_a_selection_it_is_refused() -> None:
    before = replace(context(), budget=Budget(ratio=0.2))
    with pytest.raises(SurgeonError, match="put it last"):
        Gptq().transform(before)


@pytest.mark.parametrize("options", [{"group": 4}, {"damping": 0.0}, {"block": 0}])
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Gptq(**options)
