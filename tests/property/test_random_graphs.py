"""On random modules, every removal that the analysis calls exact is masking."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.export import Dim

from surgeon.axes import Axes, Axis, analyse
from surgeon.axes.plan import Cut, Plan, cut
from surgeon.capture.model import capture_module
from surgeon.ir import parse, to_text
from tests.exactness import Subject, difference, prunable, random_cut, some
from tests.property.graphs import graphs
from tests.property.modules import Graph, Module, example

TOLERANCE = 1e-9
CASES: Counter[str] = Counter()
MANY = int(os.environ.get("SURGEON_RANDOM_GRAPHS", "150"))


@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints, at the end of the run, how much was tried."""
    CASES.clear()
    yield
    manager: Any = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print("\nrandom graphs: " + ", ".join(f"{n} {what}" for what, n in CASES.items()))


def subject(graph: Graph) -> Subject:
    """The module of a graph, captured through torch.export."""
    module = Module(graph).eval()
    x = example(graph)
    shapes = ({0: Dim("batch", min=2)},) if graph.dynamic else None
    captured, exported = capture_module(module, (x,), dynamic_shapes=shapes)
    weights = {**exported.state_dict, **captured.constants}
    found = {name: t.detach() for name, t in weights.items()}
    return Subject(analyse(captured.program), found, (x,))


def sound(subject: Subject, plan: Plan, what: str) -> None:
    """Asserts that removal is masking, in a program that really is smaller."""
    CASES[what] += 1
    program, weights = subject.small(plan)
    after = subject.run(program, weights)
    found = difference(after, subject.masked(plan))
    assert found <= TOLERANCE, f"{what}: masked and removed differ by {found:.1e} for {plan}"
    for c in plan.cuts:
        for member in subject.axes.by_name[c.axis].members:
            if member.param in program.param and c.count < c.size:
                before = subject.axes.program.param[member.param].type.shape[member.dim]
                assert program.param[member.param].type.shape[member.dim] < before
    assert parse(to_text(program)) == program


def sizes(program: Any) -> list[Any]:
    return [t.shape for _, t in sorted(program.types.items())]


def counterpart(axis: Axis, axes: Axes) -> Axis | None:
    """The axis of another analysis that the same parameters carry."""
    found = [a for a in axes.axes if a.members == axis.members and a.size == axis.size]
    return found[0] if len(found) == 1 and found[0].prunable else None


def one_after_the_other(subject: Subject, first: Cut, second: Cut) -> None:
    """Asserts that cutting one axis and then, analysed anew, another equals cutting both."""
    axes = subject.axes
    program, weights = subject.small(Plan((first,)))
    again = Subject(analyse(program), weights, subject.inputs)
    same = counterpart(axes.get(second.axis), again.axes)
    if same is None:
        CASES["not compared one after the other"] += 1
        return
    CASES["one after the other"] += 1
    then = again.removed(Plan((cut(same, second.array),)))
    both = subject.removed(Plan((first, second)))
    assert difference(then, both) <= TOLERANCE


def examine(graph: Graph, seed: int) -> None:
    """Asserts everything that must hold for one random module."""
    rng = np.random.default_rng(seed)
    made = subject(graph)
    top = max(float(out.abs().max()) for out in made.original)
    assume(np.isfinite(top) and 1e-6 < top < 1e9)
    CASES["modules"] += 1
    axes = made.axes
    free = prunable(axes)
    whole = Plan(tuple(cut(a, range(a.size)) for a in free))
    program, weights = made.small(whole)
    for a, b in zip(made.run(program, weights), made.original, strict=True):
        assert torch.equal(a, b)
    exact = [a for a in free if a.exact]
    for axis in exact * 2:
        keep = int(rng.integers(1, axis.size))
        sound(made, Plan((random_cut(axes, axis, rng, keep=keep),)), "single removals")
        if axis.outer:
            CASES["of these, free in each enclosing index"] += 1
            sound(
                made, Plan((random_cut(axes, axis, rng, keep=keep, free=False),)), "single removals"
            )
            part = axis.outer[-1:]
            shape = [axes.get(name).size for name in part]
            rows = [some(axis.size, rng, keep) for _ in range(shape[0])]
            sound(made, Plan((cut(axis, np.array(rows), part),)), "single removals")
    for _ in range(2 if len(exact) > 1 else 0):
        chosen = [a for a in exact if rng.random() < 0.7]
        cuts = [random_cut(axes, a, rng, keep=int(rng.integers(1, a.size))) for a in chosen]
        sound(made, Plan(tuple(cuts)), "joint removals")
    for axis in free:
        if not axis.exact:
            CASES["inexact removals that run"] += 1
            made.removed(Plan((random_cut(axes, axis, rng),)))
    if len(exact) > 1:
        a, b = (exact[int(i)] for i in rng.permutation(len(exact))[:2])
        one_after_the_other(
            made,
            random_cut(axes, a, rng, keep=a.size - 1, free=False),
            random_cut(axes, b, rng, keep=b.size - 1, free=False),
        )


def run(count: int, steps: int) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize="SURGEON_RANDOM_GRAPHS" not in os.environ,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(graphs(steps), st.integers(0, 9))
    def body(graph: Graph, seed: int) -> None:
        examine(graph, seed)

    body()


def test_what_is_removed_was_masked_in_a_few_modules():
    run(20, 8)


@pytest.mark.slow
def test_what_is_removed_was_masked_in_many_modules():
    run(MANY, 14)
