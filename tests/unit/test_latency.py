"""Timings by width: what is timed, what lies between, and budgets of measured time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import surgeon
from passes.select.budgeted import Budgeted
from surgeon.axes import Axes, analyse
from surgeon.axes.budget import Budget, allowed, decoder_params
from surgeon.axes.clock import Clock, Grid, Piece, Table
from surgeon.axes.meter import after
from surgeon.axes.plan import Plan, check, counts, cut
from surgeon.axes.surgery import operate
from surgeon.capture.model import capture_model
from surgeon.cli import app
from surgeon.errors import Code, SurgeonError
from surgeon.plugin import Context, GetScores
from surgeon.runtime import latency
from surgeon.runtime.latency import Settings, measure
from tests import models

pytestmark = pytest.mark.slow

NANO = 1e-9


@cache
def axes_of(name: str) -> Axes:
    return analyse(capture_model(models.tiny(name)).program)


def _elements(call: Callable[[], Any], loops: int, device: str) -> float:
    """A machine on which each weight that is read takes a nanosecond."""
    run = call.__defaults__[0]  # type: ignore[attr-defined]
    call()  # it does run, whatever it is cut to
    return NANO * sum(prod(p.type.shape) for p in run.program.params if p.kind == "parameter")


@cache
def table_of(name: str) -> Table:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_once", _elements)
        return measure(axes_of(name), Settings(tokens=3, points=3))


def plans(axes: Axes) -> list[Plan]:
    """Cuts to widths that were timed and to others, with all sets of branches dropped."""
    names = [n for p in table_of(axes_name(axes)).pieces for names, _ in p.places for n in names]
    found = [axes.by_name[name] for name in names]
    cuts = [
        tuple(cut(a, range(max(1, round(share * a.size)))) for a in found)
        for share in (0.01, 0.3, 0.77)
    ]
    branches = [b.name for b in axes.branches]
    dropped = [
        tuple(n for n, gone in zip(branches, chosen, strict=True) if gone)
        for chosen in product([False, True], repeat=len(branches))
    ]
    return [Plan(c, d) for c in ((), *cuts) for d in dropped]


def axes_name(axes: Axes) -> str:
    return next(name for name in FAMILIES if axes_of(name) is axes)


FAMILIES = ("Llama", "GPTNeoX")
"""One with a branch to a piece, and one whose two branches make one."""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_takes_what_its_pieces_do_at_any_width(name: str) -> None:
    """Weights are products of widths: on such a machine what lies between timings is exact."""
    axes = axes_of(name)
    trained = [p.name for p in axes.program.params if p.kind == "parameter"]
    clock = table_of(name).clock(axes)
    for plan in plans(axes):
        assert after(clock, plan) == pytest.approx(NANO * counts(axes, plan, trained)[1]), plan


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_of_equal_shape_share_their_timings(name: str) -> None:
    table = table_of(name)
    assert len(table.pieces) == (2 if name == "Llama" else 1)
    assert all(len(piece.places) == 2 for piece in table.pieces)
    ffn = next(p for p in table.pieces if any("ffn" in n for n in p.places[0][0]))
    assert 1 in ffn.grids[0].counts[-1] and ffn.sizes[-1] in ffn.grids[0].counts[-1]


def test_layers_that_differ_don_t_share_timings() -> None:
    axes = axes_of("Gemma2")  # every second layer attends to a window
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "_once", _elements)
        table = measure(axes, Settings(tokens=3, points=2))
    attention = [p for p in table.pieces if any("attention" in b for b in p.places[0][1])]
    assert [len(p.places) for p in attention] == [1, 1]


def test_between_two_timings_it_is_a_line_along_each_width() -> None:
    grid = Grid((), (0, 1), ((1, 5), (2, 4, 8)), (1.0, 2.0, 4.0, 5.0, 6.0, 8.0))
    assert grid.at([1, 2]) == 1.0 and grid.at([5, 8]) == 8.0
    assert grid.at([3, 2]) == pytest.approx(3.0)
    assert grid.at([1, 6]) == pytest.approx(3.0)
    assert grid.at([3, 6]) == pytest.approx(5.0)
    many = grid.at([np.array([[1], [5]]), np.array([[2, 4, 8]])])
    assert many.tolist() == [[1.0, 2.0, 4.0], [5.0, 6.0, 8.0]]


def test_real_timings_are_taken_in_turns_and_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def once(call: Callable[[], Any], loops: int, device: str) -> float:
        order.append(id(call))
        return float(len(order))

    monkeypatch.setattr(latency, "_once", once)
    axes = axes_of("Llama")
    pieces = [p.segment for p in latency._places(axes, ("ffn",)) if p.axes]  # pyright: ignore[reportPrivateUsage]
    found = latency._timed(pieces, Settings(tokens=2))  # pyright: ignore[reportPrivateUsage]
    assert order == order[:2] * 6 and order[0] != order[1]
    assert found == [7.0, 8.0]  # of 3, 5, 7, 9, 11 and of 4, 6, 8, 10, 12; the first turn warms up


def test_a_table_is_given_back_as_it_was(tmp_path: Path) -> None:
    table = table_of("Llama")
    path = tmp_path / "table.json"
    path.write_text(table.to_json())
    assert Table.read(path) == table


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("rest"),
        lambda d: d.update(rest=0),
        lambda d: d.update(version=2),
        lambda d: d["pieces"][0]["grids"][0]["seconds"].pop(),
        lambda d: d["pieces"][0]["grids"][0]["seconds"].__setitem__(0, float("nan")),
        lambda d: d["pieces"][0]["grids"][0]["seconds"].__setitem__(0, "1"),
    ],
)
def test_what_is_no_table_is_refused(damage: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(table_of("Llama").to_json())
    damage(data)
    with pytest.raises(SurgeonError) as caught:
        Table.from_json(json.dumps(data))
    assert caught.value.code == Code.BAD_TEXT_INPUT


def test_a_table_that_isn_t_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SurgeonError) as caught:
        Table.read(tmp_path / "absent.json")
    assert caught.value.code == Code.MISSING_FILE


def test_the_table_of_another_model_is_refused() -> None:
    with pytest.raises(SurgeonError) as caught:
        table_of("GPTNeoX").clock(axes_of("Llama"))
    assert caught.value.code == Code.BAD_OPTION and "another model" in caught.value.what


def test_what_is_left_of_a_model_needs_no_table_of_its_own() -> None:
    """Another round of pruning goes by the table of the first."""
    axes = axes_of("Llama")
    clock = table_of("Llama").clock(axes)
    plan = Plan(
        (cut(axes.by_name["model.layers.0.mlp/ffn"], range(30)),), ("model.layers.1/attention",)
    )
    left = analyse(operate(axes, plan))
    found = table_of("Llama").clock(left)
    assert found.whole == pytest.approx(after(clock, plan))
    mlp = {"model.layers.1.mlp/ffn": 7}
    assert found.left(mlp) == pytest.approx(
        clock.left({"model.layers.0.mlp/ffn": 30, **mlp}, plan.branches)
    )
    table = table_of("Llama")
    with pytest.raises(SurgeonError) as caught:
        replace(table, others={**table.others, "hidden": 47}).clock(axes)
    assert caught.value.at == "hidden"
    with pytest.raises(SurgeonError):
        replace(table, pieces=table.pieces[1:]).clock(axes)


def test_an_axis_that_was_not_timed_can_t_be_counted() -> None:
    axes = axes_of("Llama")
    clock = table_of("Llama").clock(axes)
    assert clock.left({"hidden": axes.by_name["hidden"].size}) == clock.whole
    with pytest.raises(SurgeonError) as caught:
        clock.left({"hidden": 40})
    assert caught.value.code == Code.BAD_OPTION and caught.value.data == {"axis": "hidden"}


@pytest.mark.parametrize("wrong", [{"repeat": 4}, {"points": 1}, {"tokens": 0}, {"batch": 0}])
def test_settings_that_measure_nothing_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(SurgeonError) as caught:
        Settings(**wrong)
    assert caught.value.at == f"--{next(iter(wrong))}"


def test_roles_that_no_layer_has_are_refused() -> None:
    with pytest.raises(SurgeonError) as caught:
        measure(axes_of("Llama"), Settings(roles=("hidden",)))
    assert caught.value.code == Code.BAD_OPTION and "ffn" in caught.value.why


# --- budgets of time -----------------------------------------------------------------------------


def select(clock: Callable[[Axes], Clock], ratio: float, **options: Any) -> Plan:
    axes = axes_of("Llama")
    cuttable, branches = allowed(axes, [], [])
    rng = np.random.default_rng(0)

    def scores(names: Iterable[str]) -> dict[str, Any]:
        found = [axes.by_name[n] for n in names]
        shape = {a.name: (*(axes.by_name[o].size for o in a.outer), a.size) for a in found}
        return {name: rng.random(s) for name, s in shape.items()}

    budget = Budget(
        ratio, {}, decoder_params(axes), cuttable, branches, measure="latency", clock=clock
    )
    context = Context(axes, lambda name: None)
    return check(axes, Budgeted(**options).select(context, GetScores(scores, "loss"), budget))


def test_a_share_of_the_time_is_removed() -> None:
    clock = table_of("Llama").clock(axes_of("Llama"))
    plan = select(table_of("Llama").clock, 0.2)
    assert 1 - after(clock, plan) / clock.whole == pytest.approx(0.2, abs=0.003)


def test_what_takes_no_time_is_left_alone() -> None:
    """Of two pieces as large as each other, one doesn't get faster when it is cut."""
    table = table_of("Llama")
    pieces: list[Piece] = []
    for piece in table.pieces:
        flat = tuple(
            Grid(g.dropped, g.dims, g.counts, tuple(max(g.seconds) for _ in g.seconds))
            for g in piece.grids
        )
        mlp = "mlp" in piece.places[0][1][0]
        pieces.append(piece if mlp else Piece(piece.places, piece.sizes, flat))
    other = replace(table, pieces=tuple(pieces))
    plan = select(other.clock, 0.2)
    assert {axes_of("Llama").get(c.axis).role for c in plan.cuts} == {"ffn"}


def test_more_than_there_is_can_t_be_saved() -> None:
    with pytest.raises(SurgeonError) as caught:
        select(table_of("Llama").clock, 0.9)
    assert caught.value.code == Code.BAD_RATIO and 0 < caught.value.data["reachable"] < 0.9


def test_a_prune_takes_a_table(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(table_of("Llama").to_json())
    common: dict[str, Any] = {"ratio": 0.2, "score": "random", "select": "budgeted"}
    asked: dict[str, Any] = {**common, "compensate": [], "verify": False, "recipe": "random"}
    pruned = surgeon.prune(models.tiny("Llama"), latency=path, **asked)
    clock = table_of("Llama").clock(pruned.axes)
    assert 1 - after(clock, pruned.plan) / clock.whole == pytest.approx(0.2, abs=0.003)
    with pytest.raises(SurgeonError) as caught:
        surgeon.prune(models.tiny("Llama"), latency=path, measure="flops", **asked)
    assert caught.value.code == Code.BAD_OPTION and "--latency" in caught.value.at


def test_the_command_times_a_model_and_writes_the_table(tmp_path: Path) -> None:
    source, out = tmp_path / "config", tmp_path / "table.json"
    models.config("Llama").save_pretrained(source)
    arguments = ["latency", str(source), "-o", str(out), "--tokens", "4", "--points", "2"]
    run = CliRunner().invoke(app, [*arguments, "--role", "ffn", "--device", "cpu"])
    assert run.exit_code == 0, run.output
    table = Table.read(out)
    assert [len(p.places) for p in table.pieces] == [2, 2] and table.tokens == 4
    assert table.clock(axes_of("Llama")).whole > 0
    again = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert isinstance(again.exception, SurgeonError)
    assert again.exception.code == Code.BAD_OUTPUT
