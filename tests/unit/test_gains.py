"""Gains: learnt from the dense model, folded into weights; and the target that the stream sets."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import surgeon
from passes.compensate.gains import Gains
from passes.compensate.least_squares import LeastSquares
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.axes.surgery import operate
from surgeon.calibrate import distil
from surgeon.calibrate.data import Piece, Recipe, Windows
from surgeon.calibrate.distil import (
    _divergence,
    _folded,
    _gains,
    _pieces,
    _predictions,
    _turns,
    scales,
    streams_of,
    trained,
)
from surgeon.calibrate.gathered import Gathered
from surgeon.calibrate.loss import ROWS
from surgeon.calibrate.running import Machine
from surgeon.calibrate.segments import segments
from surgeon.calibrate.sequential import closing
from surgeon.opening import Model, open_model
from surgeon.plugin import Context
from surgeon.recipes import load_recipe
from surgeon.runtime.apply import masked
from surgeon.runtime.lower import lower
from tests import models
from tests.masking import masked_logits

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "exact")]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a processor has products of bf16, steps would differ by more than fp32 rounds."""
    monkeypatch.setattr(distil, "rounded_products", nullcontext)


@pytest.fixture(scope="module")
def llama() -> Model:
    return open_model(models.tiny("Llama"))


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return models.tokens(100, 12, 16)


@pytest.fixture
def data(llama: Model, ids: torch.Tensor) -> Gathered:
    return Gathered(llama.axes, llama.read, Windows(ids.numpy()))


@pytest.fixture(scope="module")
def halved(llama: Model) -> Plan:
    return Plan(tuple(cut(a, range(0, 80, 2)) for a in llama.axes.of_role("ffn")))


def divergence(origin: Model, change: Any, plan: Plan, ids: torch.Tensor) -> float:
    wanted = masked_logits(origin, {}, Plan(), ids).flatten(0, 1).log_softmax(-1)
    found = masked_logits(origin, change, plan, ids).flatten(0, 1).log_softmax(-1)
    return float(torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean"))


# --- gains ---------------------------------------------------------------------------------------


def test_they_bring_the_predictions_nearer(
    data: Gathered, llama: Model, ids: torch.Tensor, halved: Plan
) -> None:
    context = Context(llama.axes, llama.read, calibration=data)
    found = Gains(rate=0.02, epochs=4, windows=4).compensate(context, halved)
    before, after = (divergence(llama, c, halved, ids) for c in ({}, found))
    assert after < 0.8 * before
    assert "gains: divergence" in context.notes[0]


def test_every_map_gets_factors_of_its_kept_rows_and_columns_and_nothing_else(
    data: Gathered, llama: Model, halved: Plan
) -> None:
    found, steps = data.distilled(halved, rate=0.02, epochs=1, windows=4)
    assert len(steps) == 3
    selection = Selection(llama.axes, halved)
    assert found.keys() == {"model.norm.weight", *(c.param for c in trained(llama.program))}
    for name, tensor in found.items():
        old = llama.read(name)
        if old.dim() == 1:
            continue  # any factors of a vector are what gains can be
        ratio = torch.where(old == 0, torch.ones_like(old), tensor / old).double()
        # An outer product of two factors has rank one.
        assert torch.linalg.matrix_rank(ratio, rtol=1e-4) == 1
        for dim, kept in enumerate(selection.kept(name)):
            if kept is not None:
                gone = np.setdiff1d(np.arange(old.shape[dim]), kept)
                same = tensor.index_select(dim, torch.from_numpy(gone)) / old.index_select(
                    dim, torch.from_numpy(gone)
                )
                # The factor of a removed index is one: what varies is the other dimension's.
                assert torch.allclose(same, same.mean(dim, keepdim=True), rtol=1e-3)


def test_nothing_removed_leaves_nothing_to_learn(
    data: Gathered, llama: Model, ids: torch.Tensor
) -> None:
    found, steps = data.distilled(Plan(), rate=1e-3, epochs=0.5, windows=2)
    # Adam takes a step whatever the size of a gradient, which here is rounding alone.
    assert steps[0] < 1e-6 and max(steps) < 1e-4
    assert divergence(llama, found, Plan(), ids) < 1e-3


def test_the_slope_of_the_divergence_is_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    found, wanted = torch.randn(2, 2, ROWS // 2 + 3, 11, generator=generator)
    found.requires_grad_()
    rows = (x.flatten(0, 1).log_softmax(-1) for x in (found, wanted))
    whole = functional.kl_div(*rows, log_target=True, reduction="batchmean")
    (slope,) = torch.autograd.grad(whole, found)
    total, own = _divergence(found.detach(), wanted)
    assert total == pytest.approx(float(whole.detach()), rel=1e-5)
    torch.testing.assert_close(own, slope)


def test_a_tied_table_gets_none() -> None:
    tied = open_model(models.tiny("Gemma2", tie_word_embeddings=True))
    names = {c.param for c in trained(tied.program)}
    assert names and not any("embed" in name or "head" in name for name in names)


@pytest.mark.parametrize(
    ("name", "found"),
    [("Llama", ["model.norm.weight"]), ("Gemma2", []), ("GPT2", [])],
    ids=["a vector", "one more than a vector", "a norm's own"],
)
def test_what_a_head_without_gains_reads_is_scaled_where_a_vector_can(
    name: str, found: list[str]
) -> None:
    program = open_model(models.tiny(name, tie_word_embeddings=True)).program
    assert list(scales(program).values()) == found


def test_pieces_with_gains_are_the_program_with_factors_in_its_weights(
    llama: Model, halved: Plan, ids: torch.Tensor
) -> None:
    program, selection = operate(llama.axes, halved), Selection(llama.axes, halved)
    gains, change = _gains(program, selection, "cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for found in gains.values():
            for gain in found.values():
                gain += 0.3 * torch.randn(len(gain), generator=generator)
    whole = _folded(program, selection, llama.read, gains)
    pieces = _pieces(program, selection, llama.read, [], change, "cpu")
    wanted = masked_logits(llama, whole, halved, ids[:2])
    found = _predictions(pieces, ids[:2])
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=1e-5)
    # What is not kept on the way there is there on the way back.
    weights = torch.randn(found.shape, generator=generator)
    found.backward(weights)
    gain = gains[DOWN[0]][0]
    step = torch.zeros_like(gain)
    step[5] = 1e-2
    moved: list[float] = []
    for sign in (1, -1):
        with torch.no_grad():
            other = gain.detach() + sign * step
        changed = {**gains, DOWN[0]: {**gains[DOWN[0]], 0: other}}
        logits = masked_logits(
            llama, _folded(program, selection, llama.read, changed), halved, ids[:2]
        )
        moved.append(float((logits.double() * weights.double()).sum()))
    assert gain.grad is not None
    assert float(gain.grad[5]) == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=1e-2)


def test_the_callers_tensors_are_not_written_to(data: Gathered, llama: Model, halved: Plan) -> None:
    """Of a map that is solved for but not cut the smaller model has the very tensor."""
    queries = "model.layers.1.self_attn.q_proj.weight"
    data.expect(["activations: distillation"])
    whole = data.sequential(halved, [queries, *DOWN], solving(llama), folds=2)
    before = {name: tensor.clone() for name, tensor in whole.items()}
    seen = data.with_rewrites(whole, dense=False)
    seen.distilled(halved, rate=1e-2, epochs=1, windows=1, folds=2)
    for name, tensor in before.items():
        assert torch.equal(tensor, whole[name])


def test_what_an_earlier_pass_replaced_is_what_gains_multiply(
    data: Gathered, llama: Model, halved: Plan
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    twice = llama.read(name) * 2
    seen = data.with_rewrites({name: twice}, dense=False)
    found, _ = seen.distilled(halved, rate=1e-6, epochs=0.1, windows=1)
    torch.testing.assert_close(found[name], twice, rtol=1e-4, atol=1e-6)


def test_streams_are_what_the_head_reads(llama: Model, ids: torch.Tensor, data: Gathered) -> None:
    streams = streams_of(llama.program, llama.read, ids, Machine(tokens=32))
    head = lower(segments(llama.program)[-1].program, llama.read)
    positions = torch.arange(16)[None]
    for row, stream in zip(ids, streams, strict=True):
        with torch.no_grad():
            found = head(row[None], torch.ones_like(row[None]), positions, stream[None])
        torch.testing.assert_close(found, masked_logits(llama, {}, Plan(), row[None]))


def test_sequential_calibration_leaves_the_streams_that_gains_need(
    data: Gathered, llama: Model, halved: Plan, ids: torch.Tensor
) -> None:
    params = ["model.layers.0.mlp.down_proj.weight"]
    data.sequential(halved, params, lambda name, pair: llama.read(name))
    assert not data._streams  # nobody is going to ask for them
    data.expect(["activations: distillation"])
    data.sequential(halved, params, lambda name, pair: llama.read(name))
    kept = data._streams[1]
    for one, two in zip(kept, streams_of(llama.program, llama.read, ids, Machine()), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def solving(origin: Model) -> Any:
    """Any solution that depends on the windows."""

    def solve(name: str, pair: Any) -> torch.Tensor:
        old = origin.read(name)
        return old + 3e-2 * (pair.cross - pair.pruned).float()[: len(old)]

    return solve


DOWN = ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"]


def gathered(origin: Model, rows: torch.Tensor) -> Gathered:
    made = Gathered(origin.axes, origin.read, Windows(rows.numpy()))
    made.expect(["activations: distillation"])
    return made


def test_what_is_solved_for_in_parts_is_the_mean_of_what_each_comes_to(
    llama: Model, halved: Plan, ids: torch.Tensor
) -> None:
    solve = solving(llama)
    whole = gathered(llama, ids).sequential(halved, DOWN, solve, folds=3)
    parts = [gathered(llama, p).sequential(halved, DOWN, solve) for p in ids.tensor_split(3)]
    for name in DOWN:
        assert not torch.equal(parts[0][name], parts[1][name])
        torch.testing.assert_close(whole[name], torch.stack([p[name] for p in parts]).mean(0))


@pytest.mark.parametrize("folds", [2, 3])
def test_gains_learn_on_each_part_in_what_was_solved_for_on_the_others(
    llama: Model, halved: Plan, ids: torch.Tensor, folds: int
) -> None:
    """The first step is taken on the first window of each part."""
    both, solve, parts = gathered(llama, ids), solving(llama), ids.tensor_split(folds)
    whole = both.sequential(halved, DOWN, solve, folds=folds)
    alone = [gathered(llama, part).sequential(halved, DOWN, solve) for part in parts]

    def first(model: Gathered, change: Any, folds: int, windows: int = 1) -> float:
        seen = model.with_rewrites(change, dense=False)
        return seen.distilled(halved, rate=1e-9, epochs=1, windows=windows, folds=folds)[1][0]

    def means(own: bool) -> float:
        total = 0.0
        for number, part in enumerate(parts):
            used = [s for k, s in enumerate(alone) if (k == number) == own]
            mean = {n: torch.stack([s[n] for s in used]).mean(0) for n in DOWN}
            total += first(gathered(llama, part[:1]), mean, 1) / folds
        return total

    found = first(both, whole, folds, windows=folds)
    assert found == pytest.approx(means(own=False), rel=1e-5)
    assert found != pytest.approx(means(own=True), rel=1e-3)


def test_what_other_passes_changed_since_does_not_learn(
    llama: Model, halved: Plan, ids: torch.Tensor
) -> None:
    data = gathered(llama, ids)
    whole = data.sequential(halved, DOWN, solving(llama), folds=2)
    queries = "model.layers.0.self_attn.q_proj.weight"
    changed = {**whole, queries: llama.read(queries) * 1.1}

    def steps(start: Gathered, plan: Plan = halved) -> tuple[float, ...]:
        seen = start.with_rewrites(changed, dense=False)
        return seen.distilled(plan, rate=1e-9, epochs=1, windows=2, folds=2)[1]

    after = data.with_rewrites(whole, dense=False)
    assert steps(after) == steps(gathered(llama, ids))
    other = Plan(halved.cuts[:1])
    learnt = after.distilled(other, rate=1e-9, epochs=1, windows=2, folds=2)[1]
    fresh = gathered(llama, ids).with_rewrites(whole, dense=False)
    assert learnt == fresh.distilled(other, rate=1e-9, epochs=1, windows=2, folds=2)[1]


def test_gains_of_parts_are_put_into_the_mean(data: Gathered, llama: Model, halved: Plan) -> None:
    data.expect(["activations: distillation"])
    whole = data.sequential(halved, DOWN, solving(llama), folds=3)
    seen = data.with_rewrites(whole, dense=False)
    gains, steps = seen.distilled(halved, rate=1e-9, epochs=2, windows=4, folds=3)
    assert len(steps) == 6
    for name in DOWN:
        torch.testing.assert_close(gains[name], whole[name])


def test_parts_take_turns() -> None:
    assert _turns([2, 2]) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert _turns([3, 1]) == [(0, 0), (0, 1), (1, 0), (0, 2)]
    assert _turns([2, 0]) == [(0, 0), (0, 1)]


def test_the_default_recipe_learns_gains_on_what_least_squares_did_not_see() -> None:
    by_name = {step.name: step.options for step in load_recipe("default").passes}
    assert by_name["gains"]["folds"] == by_name["least_squares"]["folds"] > 1


def test_fewer_windows_than_parts_are_a_part_each(
    llama: Model, halved: Plan, ids: torch.Tensor
) -> None:
    def found(folds: int) -> tuple[dict[str, torch.Tensor], tuple[float, ...], list[str]]:
        data = gathered(llama, ids[:3])
        whole = data.sequential(halved, DOWN, solving(llama), folds=folds)
        seen = data.with_rewrites(whole, dense=False)
        gains, steps = seen.distilled(halved, rate=0.02, epochs=1, windows=1, folds=folds)
        return dict(gains), steps, data.notes

    three, eight = found(3), found(8)
    assert eight[1] == three[1]
    for name, tensor in three[0].items():
        assert torch.equal(tensor, eight[0][name])
    assert three[2] == []
    assert eight[2] == ["3 calibration windows can't be 8 parts: each is a part by itself"]


@pytest.mark.parametrize("made", [Gains, LeastSquares])
def test_no_parts_at_all(made: type[Gains] | type[LeastSquares]) -> None:
    with pytest.raises(ValueError, match="folds"):
        made(folds=0)


@pytest.mark.parametrize("option", ["rate", "epochs", "windows"])
def test_options_that_mean_nothing(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        Gains(**{option: 0})


# --- the stream's target -------------------------------------------------------------------------


def test_only_what_is_added_as_it_is_can_close_a_gap() -> None:
    def ends(name: str) -> set[str]:
        found = (closing(p) for p in segments(open_model(models.tiny(name)).program))
        return {c.param.split(".")[-2] for c in found if c is not None}

    assert ends("Llama") == {"o_proj", "down_proj"}
    assert ends("Gemma2") == set()  # a norm stands between the map and the sum
    assert ends("GPT2") == set()  # nor is a product that is reshaped before the sum


@pytest.mark.parametrize("name", ["Llama", "Starcoder2"])
def test_what_is_wanted_is_what_the_stream_lacks(name: str, ids: torch.Tensor) -> None:
    origin = open_model(models.tiny(name))
    data = Gathered(origin.axes, origin.read, Windows(ids.numpy()))
    axis = origin.axes.of_role("ffn")[0]
    plan = Plan((cut(axis, range(axis.size // 2)),))
    pieces = [p for p in segments(origin.program) if closing(p)]
    last = closing(pieces[-1])
    assert last is not None
    seen: dict[str, Any] = {}

    def solve(param: str, pair: Any) -> torch.Tensor:
        seen[param] = pair
        return origin.read(param)

    data.sequential(plan, [last.param], solve)
    selection = Selection(origin.axes, plan)

    def run(change: bool) -> tuple[torch.Tensor, ...]:
        """The stream before and after the last branch, and what its last map reads."""
        from dataclasses import replace

        piece = pieces[-1]
        program = replace(
            origin.program, outputs=(piece.given or "", piece.passed or "", last.value)
        ).without_dead_code()
        get = (lambda n: masked(selection, n, origin.read(n))) if change else origin.read
        positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
        with torch.no_grad():
            return lower(program, get)(ids, torch.ones_like(ids), positions)

    after, (before, _, p) = run(False)[1], run(True)
    bias = origin.read(last.bias) if last.bias else 0.0
    gap = (after - before - bias).flatten(0, 1).double()
    want = gap.T @ p.flatten(0, 1).double() / ids.numel()
    torch.testing.assert_close(seen[last.param].wanted, want, rtol=1e-3, atol=1e-5)


def test_the_stream_as_target_ends_nearer_to_the_dense_stream(
    llama: Model, ids: torch.Tensor, halved: Plan, data: Gathered
) -> None:
    context = Context(llama.axes, llama.read, calibration=data)

    def gap(towards: Any) -> float:
        found = LeastSquares(ridge=0.01, towards=towards).compensate(context, halved)
        dense, small = (masked_logits(llama, c, p, ids) for c, p in (({}, Plan()), (found, halved)))
        return float((dense - small).square().mean())

    assert gap("stream") < gap("branch")


TEXT = Recipe((Piece(list(np.random.default_rng(0).integers(3, 100, 400))),), 12, 16)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_the_default_recipe_runs_whole_and_is_verified(name: str) -> None:
    pruned = surgeon.prune(models.tiny(name), ratio=0.2, recipe="default", calibration=TEXT)
    assert [e["pass"] for e in pruned.report.recipe][1:] == [
        "transform/value_output",
        "score/obs",
        "select/budgeted",
        "compensate/least_squares",
        "compensate/gains",
    ]
    assert abs(pruned.report.ratio["removed"] - 0.2) < 0.02
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-4


def test_only_a_change_of_basis_looks_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[bool, bool]] = []
    real = Gathered.expect

    def expect(self: Gathered, needs: Any, *, brief: bool = False) -> None:
        heard.append((brief, "gradients: outputs" in needs))
        real(self, needs, brief=brief)

    monkeypatch.setattr(Gathered, "expect", expect)
    surgeon.prune(models.tiny("Llama"), ratio=0.2, recipe="default", calibration=TEXT, verify=False)
    assert heard == [(True, False), (False, True), (False, False), (False, False)]


@pytest.mark.parametrize("target", ["transformers", "pt2", "onnx"])
def test_what_the_default_recipe_makes_is_written_to_every_target(
    target: str, tmp_path: Path
) -> None:
    """Saving compares what was written with the masked model."""
    small = surgeon.prune(
        models.tiny("Mistral"), ratio=0.2, recipe="default", calibration=TEXT, target=target
    )
    report = small.save(tmp_path / "out")
    assert report.verification is not None and report.verification["largest"] <= 1e-4
