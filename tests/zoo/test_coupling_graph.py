"""The coupling graph's components are the axes, and its shortest paths are proofs."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest

from surgeon.axes import analyse
from surgeon.axes.graph import Place, proof
from surgeon.capture.model import capture_model
from tests.models import ARCHITECTURES, tiny


@pytest.mark.zoo
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_connected_components_are_the_axes(name: str) -> None:
    axes = analyse(capture_model(tiny(name)).program)
    by_axis: dict[int, set[Place]] = {}
    for place, axis in axes.graph.nodes(data="axis"):
        by_axis.setdefault(axis, set()).add(place)
    components = {frozenset(found) for found in nx.connected_components(axes.graph)}
    assert components == {frozenset(found) for found in by_axis.values()}


def test_a_proof_names_the_operations_between_two_weights() -> None:
    axes = analyse(capture_model(tiny("Llama")).program)
    gate = Place("$model.layers.0.mlp.gate_proj.weight", 0, 0)
    down = Place("$model.layers.0.mlp.down_proj.weight", 1, 0)
    steps = proof(axes.graph, gate, down)
    assert steps is not None
    targets = [axes.program.ops[step.op].target for step in steps]
    assert targets == ["aten.linear.default", "aten.silu.default", "aten.mul.Tensor"] + [
        "aten.linear.default"
    ]
    assert (steps[0].left, steps[-1].right) == (gate, down)
    assert all(a.right == b.left for a, b in itertools.pairwise(steps))


def test_there_is_no_proof_between_two_mlps() -> None:
    axes = analyse(capture_model(tiny("Llama")).program)
    first, second = (Place(f"$model.layers.{i}.mlp.gate_proj.weight", 0, 0) for i in (0, 1))
    assert proof(axes.graph, first, second) is None
