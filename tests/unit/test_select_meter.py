"""What selections count with: measures under any counts, and the counts that a budget allows."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import nan

import numpy as np
import pytest

from surgeon.axes import Axes, analyse
from surgeon.axes.budget import MEASURES, Budget, decoder_params
from surgeon.axes.costs import Costs
from surgeon.axes.meter import after, meter
from surgeon.axes.plan import Plan, counts, cut
from surgeon.capture.model import capture_model
from surgeon.errors import Code, SurgeonError
from tests import models

pytestmark = pytest.mark.slow

FAMILIES = ("Llama", "GPTNeoX", "Gemma2")


@cache
def axes_of(name: str) -> Axes:
    return analyse(capture_model(models.tiny(name)).program)


def plans(axes: Axes) -> list[Plan]:
    """Each axis alone, all of them, and each set of dropped branches with and without cuts."""
    cuttable = [a for a in axes.axes if a.prunable and a.size > 1]
    cuts = tuple(cut(a, np.arange((a.size + 1) // 2)) for a in cuttable)
    names = [b.name for b in axes.branches]
    several = [
        tuple(n for n, gone in zip(names, chosen, strict=True) if gone)
        for chosen in product([False, True], repeat=len(names))
    ]
    alone = [Plan((found,)) for found in cuts]
    return [Plan(), *alone, *(Plan(c, b) for b in several for c in ((), cuts))]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_measure_is_what_costs_and_counts_say_of_any_plan(name: str) -> None:
    axes = axes_of(name)
    counted = decoder_params(axes)
    meters = {m: meter(axes, m, counted) for m in MEASURES if m != "latency"}
    costs = Costs(axes)
    for plan in plans(axes):
        under = costs.under(plan)
        assert after(meters["parameters"], plan) == counts(axes, plan, counted)[1]
        for measure in ("flops", "bytes", "cache_bytes"):
            assert after(meters[measure], plan) == getattr(under, measure), (measure, plan)
    assert meters["flops"].whole == costs.whole.flops


def test_parts_add_up_to_what_the_whole_loses() -> None:
    axes = axes_of("Llama")
    whole = meter(axes, "parameters", decoder_params(axes))
    names = [a.name for a in axes.axes if a.role in ("ffn", "kv_heads", "q_per_kv", "v")]
    branches = [b.name for b in axes.branches]
    parts = whole.parts(names, branches, {"hidden": 30})
    assert sorted(len(p.axes) for p in parts) == [1, 1, 3, 3]
    assert all(len(p.branches) == 1 for p in parts)
    kept = {name: axes.by_name[name].size - 1 for name in names}
    dropped = branches[:1]
    lost = sum(p.left({}) - p.left(kept, dropped) for p in parts)
    assert lost == whole.left({"hidden": 30}) - whole.left({**kept, "hidden": 30}, dropped)


def test_counts_may_be_arrays() -> None:
    axes = axes_of("Llama")
    whole = meter(axes, "parameters", decoder_params(axes))
    kv, ffn = axes.of_role("kv_heads")[0], axes.of_role("ffn")[1]
    grid = whole.left({kv.name: np.array([[1], [2]]), ffn.name: np.array([[5, 6, 7]])})
    assert grid.shape == (2, 3)
    assert grid[1, 2] == whole.left({kv.name: 2, ffn.name: 7})


# --- what may be kept ----------------------------------------------------------------------------


def axis(role: str, layer: int = 0):
    return axes_of("Llama").of_role(role)[layer]


def test_without_wishes_any_count_but_none_may_be_kept() -> None:
    assert Budget().kept(axis("ffn")).tolist() == list(range(80, 0, -1))
    assert Budget().kept(axis("kv_heads"), 0.67).tolist() == [3, 2, 1]
    assert Budget().kept(axis("kv_heads"), 0.66).tolist() == [3, 2]


def test_multiples_by_role_and_by_axis_hold_together() -> None:
    ffn = axis("ffn")
    budget = Budget(multiple_of={"ffn": 6, ffn.name: 4})
    assert budget.multiple(ffn) == 12
    assert budget.kept(ffn).tolist() == [80, 72, 60, 48, 36, 24, 12]
    assert budget.multiple(axis("ffn", 1)) == 6
    assert budget.multiple(axis("kv_heads")) == 1


def test_the_smallest_limit_that_matches_holds() -> None:
    budget = Budget(limits={"ffn": 0.5, "*layers.0*": 0.05, "kv_heads": 0})
    assert budget.kept(axis("ffn")).tolist() == [80, 79, 78, 77, 76]
    assert budget.kept(axis("ffn", 1))[-1] == 40
    assert budget.kept(axis("ffn", 1), 0.25)[-1] == 60
    assert budget.kept(axis("kv_heads", 1)).tolist() == [3]


def test_tensor_parallel_axes_are_divided_evenly() -> None:
    budget = Budget(tensor_parallel=2, multiple_of={"ffn": 5})
    assert budget.kept(axis("ffn")).tolist() == list(range(80, 0, -10))
    assert budget.kept(axis("kv_heads")).tolist() == [2]  # three can't be dealt out
    assert budget.kept(axis("v")).tolist() == list(range(8, 0, -1))
    with pytest.raises(SurgeonError) as caught:
        Budget(tensor_parallel=2, limits={"kv_heads": 0.3}).kept(axis("kv_heads"))
    assert caught.value.code == Code.BAD_OPTION and caught.value.data["least"] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"limits": {"ffn": 1.1}},
        {"limits": {"ffn": nan}},
        {"multiple_of": {"ffn": 0}},
        {"tensor_parallel": 0},
        {"measure": "parameter"},
    ],
)
def test_numbers_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SurgeonError) as caught:
        Budget(**wrong)  # type: ignore[arg-type]
    assert caught.value.code == Code.BAD_OPTION


def test_latency_takes_a_table() -> None:
    with pytest.raises(SurgeonError) as caught:
        Budget(measure="latency").meter(axes_of("Llama"))
    assert "surgeon latency" in caught.value.try_
