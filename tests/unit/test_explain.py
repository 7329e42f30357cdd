"""Names, proofs, what goes with a channel, and why an axis has to stay."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

import surgeon
from surgeon.axes import Axes, Member, analyse
from surgeon.axes.names import find, matching
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.errors import Code, SurgeonError
from surgeon.ir import parse
from surgeon.ops.rule import Context, OpRule, rules
from tests import models
from tests.command import surgeon as surgeon_command
from tests.refusals import refused as refused_command

pytestmark = pytest.mark.slow

BARRIER = """surgeon.program 1
symbol batch
input %x: f32[batch, 8]
parameter $a: f32[6, 8]
parameter $b: f32[5, 6]
parameter $c: f32[4, 5]
%1: f32[batch, 6] = aten.linear.default(%x, $a) @ "first" "net.py:10"
%2: f32[batch, 6] = aten.relu.default(%1) @ "act" "net.py:11"
%3: f32[batch, 6] = aten.roll.default(%2, [1], [1]) @ "mixer" "net.py:12"
%4: f32[batch, 5] = aten.linear.default(%3, $b) @ "second" "net.py:13"
%5: f32[batch, 4] = aten.linear.default(%4, $c) @ "third" "net.py:14"
return %5
"""
Q, K = (f"model.layers.0.self_attn.{x}_proj.weight:0" for x in "qk")


@pytest.fixture(scope="module")
def llama() -> Axes:
    return surgeon.analyse(models.tiny("Llama"))


@pytest.fixture(scope="module")
def barrier() -> Axes:
    return analyse(parse(BARRIER))


def refused(axes: Axes, *names: str, **options: int) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        axes.explain(*names, **options)
    return caught.value


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("model.layers.1.mlp/ffn", "model.layers.1.mlp/ffn"),
        ("1.mlp/ffn", "model.layers.1.mlp/ffn"),
        ("layers.1/ffn", "model.layers.1.mlp/ffn"),
        ("1/kv_heads", "model.layers.1.self_attn/kv_heads"),
        ("*.1.*/v", "model.layers.1.self_attn/v"),
        ("hidden", "hidden"),
        ("embed_tokens/vocab", "model.embed_tokens/vocab"),
    ],
)
def test_an_axis_is_found_by_what_says_which(llama: Axes, written: str, meant: str) -> None:
    assert llama.axis(written).name == meant
    assert llama.members(written) == llama.by_name[meant].members


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("model.layers.1.mlp.up_proj.weight:0", ("model.layers.1.mlp.up_proj.weight", 0)),
        ("1.mlp.up_proj.weight:-1", ("model.layers.1.mlp.up_proj.weight", 1)),
        ("layers.1.up_proj:1", ("model.layers.1.mlp.up_proj.weight", 1)),
        ("*.1.*up_proj*:1", ("model.layers.1.mlp.up_proj.weight", 1)),
        ("model.norm.weight", ("model.norm.weight", 0)),
    ],
)
def test_a_dimension_is_found_by_what_says_which(
    llama: Axes, written: str, meant: tuple[str, int]
) -> None:
    assert find(llama, written) == Member(*meant)


def test_a_number_is_a_whole_component() -> None:
    names = [f"model.layers.{i}.mlp/ffn" for i in (1, 11, 111)]
    assert matching("layers.1/ffn", names) == names[:1]
    assert matching("1.mlp/ffn", names) == names[:1]


def test_a_tied_parameter_answers_to_all_its_names() -> None:
    axes = surgeon.analyse(models.tiny("Llama", tie_word_embeddings=True))
    assert find(axes, "lm_head.weight:0") == find(axes, "embed_tokens.weight:0")


def test_an_ambiguous_name_lists_what_it_could_be(llama: Axes) -> None:
    error = refused(llama, "ffn")
    assert error.code is Code.NO_SUCH_AXIS
    assert error.data["matches"] == ["model.layers.0.mlp/ffn", "model.layers.1.mlp/ffn"]
    assert all(name in error.why for name in error.data["matches"])
    assert refused(llama, "k_proj.weight:0").data["matches"] == [
        f"model.layers.{i}.self_attn.k_proj.weight:0" for i in (0, 1)
    ]
    lacking = refused(llama, "model.layers.0.mlp.up_proj.weight")
    assert lacking.data["matches"] == [f"model.layers.0.mlp.up_proj.weight:{d}" for d in (0, 1)]


@pytest.mark.parametrize(
    ("written", "near"),
    [
        ("layers.0/fffn", "model.layers.0.mlp/ffn"),
        ("model.layers.0.mlp.gate_prj.weight:0", "model.layers.0.mlp.gate_proj.weight"),
        ("hiden", "hidden"),
        ("zzzzzz", "surgeon inspect"),
    ],
)
def test_a_wrong_name_suggests_near_ones(llama: Axes, written: str, near: str) -> None:
    error = refused(llama, written)
    assert error.code is Code.NO_SUCH_AXIS and near in error.try_
    assert written.partition(":")[0] in error.what


def test_a_dimension_that_is_not_there(llama: Axes) -> None:
    error = refused(llama, "layers.0.gate_proj:2")
    assert "no dimension 2" in error.what and "gate_proj.weight:1" in error.try_


# --- proofs --------------------------------------------------------------------------------------


def test_attention_ties_queries_to_keys(llama: Axes) -> None:
    found = llama.explain(Q, K)
    heads, rotary = found.chains
    assert found.coupled and (heads.size, rotary.size) == (3, 4)
    assert heads.axis == "model.layers.0.self_attn/kv_heads" and rotary.axis == "model/rotary"
    assert [link.target for link in heads.meeting] == ["surgeon.attention"]
    assert "modeling_llama.py:" in heads.meeting[0].where
    assert "uery heads are key/value heads times their repetition" in str(found)
    assert heads.links[0].left == f"rows of {Q[:-2]}" and heads.links[-1].right.endswith(K[:-2])


@pytest.mark.parametrize(
    ("a", "b"),
    [(Q, K), ("layers.0.gate_proj:0", "layers.0.down_proj:1"), ("lm_head.weight:1", "norm.weight")],
)
def test_a_chain_is_the_shortest_path_of_the_graph(llama: Axes, a: str, b: str) -> None:
    for chain in llama.explain(a, b).chains:
        places = [link.places for link in chain.links]
        assert all(x[1] == y[0] for x, y in itertools.pairwise(places))
        for link in chain.links:
            op = llama.program.ops[llama.graph.edges[link.places]["op"]]
            assert (link.target, link.source) == (op.target, op.source) and link.says
        shortest = nx.shortest_path_length(llama.graph, places[0][0], places[-1][1])
        number = llama.number[chain.axis]
        assert {llama.graph.nodes[p]["axis"] for pair in places for p in pair} == {number}
        assert len(chain.links) == shortest or len(llama.explain(a, b).chains) > 1


def test_a_dimension_and_an_axis(llama: Axes) -> None:
    for pair in (("layers.0.gate_proj:0", "layers.0/ffn"), ("layers.0/ffn", "layers.0/ffn")):
        (chain,) = llama.explain(*pair).chains
        assert chain.links and chain.axis == "model.layers.0.mlp/ffn"
    assert not llama.explain("layers.0.gate_proj:0", "layers.1/ffn").coupled
    (same,) = llama.explain("layers.0.gate_proj:0", "layers.0.gate_proj:0").chains
    assert same.links == () and "the same dimension" in str(llama.explain(Q, Q))


def test_what_is_not_coupled_says_so(llama: Axes) -> None:
    found = llama.explain("layers.0.gate_proj:0", "layers.1.gate_proj:0")
    assert not found.coupled and "not coupled" in str(found)
    assert any("model.layers.1.mlp/ffn" in note for note in found.notes)
    inside = llama.explain("layers.0/v", "layers.0/kv_heads")
    assert any("lies inside" in note for note in inside.notes)


# --- what goes -----------------------------------------------------------------------------------


def expanded(ranges: tuple[tuple[int, int], ...]) -> list[int]:
    return [i for first, last in ranges for i in range(first, last + 1)]


@pytest.mark.parametrize("name", ["Llama", "Phi3", "GPTNeoX", "Gemma2"])
def test_what_goes_is_what_a_plan_removes(name: str) -> None:
    axes = surgeon.analyse(models.tiny(name))
    for axis in axes.axes:
        index = axis.size - 1
        (about,) = axes.explain(axis.name, channel=index).about
        kept = Selection(axes, Plan((cut(axis, range(index)),)))
        assert {(x.param, x.dim) for x in about.removal.lost} == {
            (m.param, m.dim) for m in axis.members
        }
        for lost in about.removal.lost:
            left = kept.kept(lost.param)[lost.dim]
            assert left is not None
            gone = np.setdiff1d(np.arange(lost.size), left)
            assert expanded(lost.ranges) == gone.tolist() and lost.count == len(gone)


def test_rows_are_shown_as_ranges(llama: Axes) -> None:
    text = str(llama.explain("layers.1/kv_heads", channel=1))
    assert "q_proj.weight: rows 16–31 of 48" in text
    assert "o_proj.weight: columns 16–31 of 48" in text
    assert "inv_freq: entry 3 of 4" in str(llama.explain("rotary", channel=3))


def test_a_row_of_a_product_is_an_index_of_each_axis(llama: Axes) -> None:
    found = llama.explain("layers.1.k_proj:0", channel=11)  # 1 × 8 + (0 × 4 +) 3
    assert [(a.axis.role, a.removal.index) for a in found.about] == [("kv_heads", 1), ("rotary", 3)]
    second = llama.explain("layers.1.k_proj:0", channel=15)  # 3 again, of the other half
    assert [a.removal.index for a in second.about] == [1, 3]


@pytest.mark.parametrize("channel", [-1, 80, 1000])
def test_a_channel_that_is_not_there(llama: Axes, channel: int) -> None:
    error = refused(llama, "layers.0/ffn", channel=channel)
    assert error.code is Code.BAD_OPTION and error.try_ == "0 to 79"
    assert refused(llama, "layers.0.down_proj:1", channel=channel).code is Code.BAD_OPTION


def test_a_channel_goes_with_one_name(llama: Axes) -> None:
    assert refused(llama, "layers.0/ffn", "layers.1/ffn", channel=1).code is Code.BAD_OPTION


# --- why it stays --------------------------------------------------------------------------------


def test_the_vocabulary_is_pinned_by_lookups_and_by_the_output() -> None:
    axes = surgeon.analyse(models.tiny("Llama", tie_word_embeddings=True))
    (about,) = axes.explain("vocab").about
    lookup, output = about.pins
    assert lookup.links == () and "picked by numbers" in lookup.why
    assert "embedding" in lookup.where
    assert "model's output" in output.why and [x.short for x in output.links] == ["linear"]
    assert output.links[-1].right.startswith("dimension 2 of %")


def test_a_chain_leads_to_a_barrier(barrier: Axes) -> None:
    (about,) = barrier.explain("a:0").about
    (pin,) = about.pins
    assert pin.why == "no axis rule for aten.roll.default" and "net.py:12" in pin.where
    assert [link.target for link in pin.links] == ["aten.linear.default", "aten.relu.default"]
    assert pin.links[1].says == "Changes each channel by itself"
    text = str(barrier.explain("a:0"))
    assert "it can't be pruned" in text and "net.py:11" in text and "would take" in text
    (after,) = barrier.explain("b:1").about
    assert [link.target for link in after.pins[0].links] == ["aten.linear.default"]


def test_a_barrier_ties_nothing(barrier: Axes) -> None:
    assert not barrier.explain("a:0", "b:1").coupled
    assert barrier.explain("b:0", "c:1").coupled


def test_a_reason_about_an_axis_that_the_operation_made() -> None:
    """The pinned axis is no dimension of its own anywhere: the chain leads to its operation."""

    def couple(c: Context) -> None:
        inner = c.fresh(3, "inner")
        c.equate(c.dims(c.op.arg(0))[1], c.fresh(2, "outer") + inner)
        c.pin(inner, "for the sake of argument")

    program = parse(BARRIER.replace("roll", "my"))
    target = "aten.my.default"
    table = {**rules(), target: OpRule(target, couple, lambda f: frozenset())}
    outer, inner = analyse(program, table).explain("a:0").about
    (pin,) = inner.pins
    assert not outer.pins and pin.why == "for the sake of argument"
    assert [link.target for link in pin.links] == ["aten.linear.default", "aten.relu.default"]


@pytest.mark.parametrize("name", ["Gemma2", "OPT", "GPT2"])
def test_every_reason_is_reached(name: str) -> None:
    axes = surgeon.analyse(models.tiny(name))
    for axis in axes.axes:
        (about,) = axes.explain(axis.name).about
        assert [(p.why, p.where) for p in about.pins] == [(r.why, r.where) for r in axis.pins]


# --- forms ---------------------------------------------------------------------------------------


def test_explanations_are_data(llama: Axes) -> None:
    found = json.loads(json.dumps(llama.explain(Q, K).to_json()))
    assert found["coupled"] and found["chains"][0]["steps"][0]["op"] == "aten.linear.default"
    alone = json.loads(json.dumps(llama.explain("layers.0/ffn", channel=5).to_json()))
    (axis,) = alone["axes"]
    assert axis["lost"][0] == {
        "param": "model.layers.0.mlp.gate_proj.weight",
        "dim": 0,
        "size": 80,
        "ranges": [[5, 5]],
    }
    assert axis["saves"]["parameters"] == 3 * 48 and axis["channel"] == 5


def test_notebooks_get_tables(llama: Axes, barrier: Axes) -> None:
    for thing, text in (
        (llama, "model.layers.1.mlp/ffn"),
        (llama.axis("layers.1/ffn"), "gate_proj.weight:0"),
        (llama.explain(Q, K), "surgeon.attention".rpartition(".")[2]),
        (barrier.explain("a:0"), "no axis rule for aten.roll.default"),
    ):
        html = thing._repr_html_()
        assert "<table>" in html and text in html
        assert html.count("<table>") == html.count("</table>")


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    config = models.config("Llama")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return folder / "config.json"


def test_the_command_says_what_the_library_says(file: Path, llama: Axes) -> None:
    shown = surgeon_command("explain", file, Q, K)
    assert (shown.code, shown.err, shown.out) == (0, "", str(llama.explain(Q, K)) + "\n")
    data = surgeon_command("explain", file, "layers.0/ffn", "--channel", 5, "--json")
    assert json.loads(data.out) == llama.explain("layers.0/ffn", channel=5).to_json()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("layers.0/fffn",), "no-such-axis", "model.layers.0.mlp/ffn"),
        (("ffn",), "no-such-axis", "model.layers.1.mlp/ffn"),
        (("layers.0/ffn", "--channel", 80), "bad-option", "0 to 79"),
        (("layers.0/ffn", "nothing.weight:0"), "no-such-axis", "nothing.weight"),
        (("layers.0.gate_proj:7",), "no-such-axis", "no dimension 7"),
    ],
)
def test_mistakes_have_four_parts(
    file: Path, arguments: tuple[object, ...], code: str, text: str
) -> None:
    refused_command(surgeon_command("explain", file, *arguments), code, text)
