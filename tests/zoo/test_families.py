"""Decoders that need more of the capture than the recorded ones do."""

from __future__ import annotations

import pytest
import transformers

from surgeon.axes import analyse
from surgeon.capture.model import capture_model
from surgeon.ir import to_text
from surgeon.opening import open_model
from surgeon.pipeline import prune
from tests import families
from tools.conformance.measure import GRAPH, PINNED, measure

pytestmark = pytest.mark.zoo


def test_layers_that_return_several_values_and_mask_by_themselves_are_captured_and_repeated():
    model = families.decoder("Bloom")
    captured = capture_model(model, dynamic=False)
    whole = capture_model(model, dynamic=False, repeat=False)
    assert to_text(captured.program) == to_text(whole.program)
    axes = analyse(captured.program)
    # Biases that grow with distance have a slope for each head, which goes with the head.
    (table,) = (p.name for p in captured.program.params if p.kind == "constant")
    heads = [a for a in axes.axes if (table, 0) in axes.carriers(a) or a.role == "kv_heads"]
    assert heads and all(a.prunable for a in heads)
    assert {"hidden", "kv_heads", "qk", "ffn"} <= {a.role for a in axes.axes if a.prunable}


def test_sizes_that_a_model_compares_while_it_runs_are_computed():
    """MPT cuts its biases at `max(0, longest - seq)`."""
    line = measure("Mpt", graphs=False)
    assert {cell.state for cell in line.cells.values()} == {GRAPH, PINNED}


def test_a_width_of_heads_that_a_configuration_computes_is_not_set():
    falcon = open_model(families.decoder("FalconAlibi"))
    made = prune(falcon, roles={"hidden": 0.25}, score="random", verify=False)
    assert [c.kept for c in made.plan.cuts if len(c.kept) == 36]


def test_a_sum_over_everything_reaches_no_residual():
    """DiffLlama weighs two attentions by sums of products of vectors."""
    config = transformers.DiffLlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=101,
    )
    found = open_model(transformers.DiffLlamaForCausalLM(config).eval()).axes
    assert {"hidden", "ffn"} <= {a.role for a in found.axes}
