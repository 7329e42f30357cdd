"""The same from Python: `surgeon.prune` and what it returns."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import surgeon
from surgeon.errors import Code, SurgeonError
from tests import models
from tests.command import checkpoint, weights_of

pytestmark = pytest.mark.slow

ROLES = ("ffn", "kv_heads", "q_per_kv", "v", "qk", "hidden")


def refusal(code: Code, text: str = "") -> Any:
    return pytest.raises(SurgeonError, match=rf"(?s)^\[{code.value}\].*{re.escape(text)}")


class Net(nn.Module):
    """A network of no library: two matrices around a nonlinearity, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.up = nn.Linear(16, 40)
        self.down = nn.Linear(40, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + self.down(torch.nn.functional.relu(self.up(x)))
        return self.head(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


# --- Transformers models -------------------------------------------------------------------------


def test_the_model_passed_in_is_not_modified() -> None:
    model = models.build("Llama")
    model.train()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    pointers = {name: t.data_ptr() for name, t in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    attributes = set(vars(model.config))
    small = surgeon.prune(model, ratio=0.3, roles={"hidden": 0.125}).model
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)  # nothing is shared either
    assert model.training
    assert model.config.to_dict() == config and set(vars(model.config)) == attributes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.data_ptr() == pointers[name]


def test_the_result_is_a_smaller_model_of_the_same_class() -> None:
    model = models.tiny("Llama")
    pruned = surgeon.prune(model, roles={"ffn": 0.25})
    small: Any = pruned.model
    assert type(small) is type(model) and not small.training
    assert small.config.intermediate_size == 60 and model.config.intermediate_size == 80
    assert small is pruned.model
    state, full = small.state_dict(), model.state_dict()
    for cut in pruned.plan.cuts:
        mlp, kept = cut.axis.removesuffix("/ffn"), torch.from_numpy(cut.array)
        for name in ("gate_proj", "up_proj"):
            name = f"{mlp}.{name}.weight"
            assert torch.equal(state[name], full[name][kept])
        name = f"{mlp}.down_proj.weight"
        assert torch.equal(state[name], full[name][:, kept])
    ids = models.tokens(101)
    assert small(ids).logits.shape == (2, 12, 101)


def test_a_saved_result_is_the_model_in_memory(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pruned = surgeon.prune(models.tiny("Llama"), ratio=0.2)
    report = pruned.save(tmp_path / "o")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    state = pruned.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[n]) for n, t in loaded.state_dict().items())
    assert report.to_json() == (tmp_path / "o" / "surgeon.json").read_text()
    assert report.verification is not None and report.verification["largest"] <= 1e-4


def test_a_plan_from_a_model_replays_on_its_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path / "m", models.tiny("Llama", tie_word_embeddings=True))
    model = AutoModelForCausalLM.from_pretrained(folder)
    from_model = surgeon.prune(model, ratio=0.2)
    from_folder = surgeon.prune(folder, ratio=0.2)
    assert from_model.plan.cuts == from_folder.plan.cuts
    fingerprints = [dict(p.plan.source)["fingerprint"] for p in (from_model, from_folder)]
    assert fingerprints[0] == fingerprints[1]
    from_model.save(tmp_path / "o")
    assert surgeon.verify(tmp_path / "o", source=folder).largest <= 1e-4
    assert surgeon.verify(tmp_path / "o").largest <= 1e-4  # the model says where it came from
    shards = checkpoint(tmp_path / "shards", model, max_shard_size="60KB")
    surgeon.prune(shards, plan=from_model.plan).save(tmp_path / "p")
    assert (tmp_path / "o/model.safetensors").read_bytes() == (
        tmp_path / "p/model.safetensors"
    ).read_bytes()


def test_a_plan_of_other_weights_is_refused() -> None:
    plan = surgeon.prune(models.tiny("Llama"), ratio=0.2).plan
    other = models.build("Llama", seed=1)
    with refusal(Code.PLAN_MISMATCH, "source"):
        surgeon.prune(other, plan=plan)
    anyhow = dataclasses.replace(plan, source=())
    assert surgeon.prune(other, plan=anyhow).plan.cuts == plan.cuts


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = surgeon.prune(models.tiny("Llama"), ratio=0.3, roles={"q_per_kv": 0.5}).plan
    assert surgeon.Plan.from_json(plan.to_json()) == plan
    assert any(cut.outer for cut in plan.cuts)  # each group has its own choice


@pytest.mark.parametrize("ratio", [0.03, 0.1, 0.2, 0.37, 0.5, 0.7])
@pytest.mark.parametrize("name", ["Llama", "GPTNeoX"])
def test_a_ratio_is_met_within_half_a_step(name: str, ratio: float) -> None:
    model = models.tiny(name)
    try:
        report = surgeon.prune(model, ratio=ratio, verify=False).report
    except SurgeonError as error:
        assert name == "GPTNeoX" and error.code is Code.BAD_RATIO
        assert error.data["reachable"] < ratio
        return
    (note,) = [n for n in report.notes if "selection step" in n]
    found = re.search(r"is ([\d,]+) parameters", note)
    assert found is not None
    step = int(found[1].replace(",", ""))
    decoder = report.parameters["decoder"]
    inside = sum(t.numel() for n, t in model.state_dict().items() if ".layers." in n)
    assert decoder["before"] == inside
    assert abs(decoder["before"] - decoder["after"] - ratio * decoder["before"]) <= step / 2
    assert report.ratio["removed"] == 1 - decoder["after"] / decoder["before"]


@pytest.mark.parametrize("role", ROLES)
def test_a_share_of_a_role_is_taken_from_each_of_its_axes(role: str) -> None:
    share = 0.5
    pruned = surgeon.prune(models.tiny("Llama"), roles={role: share})
    own = "rotary" if role == "qk" else role
    for axis in pruned.report.axes:
        gone = round(share * axis["before"]) if axis["role"] == own else 0
        assert axis["after"] == axis["before"] - gone, axis["name"]
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-4


def test_whole_layers_go() -> None:
    pruned = surgeon.prune(models.tiny("Llama", num_hidden_layers=4), roles={"layers": 0.5})
    small: Any = pruned.model
    assert len(pruned.plan.branches) == 4 and len(small.model.layers) == 2
    assert small.config.num_hidden_layers == 2
    assert pruned.report.ratio["removed"] == 0.5


def test_any_roles_go_together() -> None:
    shares = {"ffn": 0.25, "kv_heads": 1 / 3, "q_per_kv": 0.5, "v": 0.25, "qk": 0.25,
              "hidden": 0.125, "layers": 0.25}  # fmt: skip
    pruned = surgeon.prune(models.tiny("Llama", num_hidden_layers=4), roles=shares)
    sizes = {a["role"]: a["after"] for a in pruned.report.axes}
    assert sizes == {"vocab": 101, "hidden": 42, "kv_heads": 2, "q_per_kv": 1, "rotary": 3,
                     "v": 6, "ffn": 60} | {"ffn": sizes["ffn"]}  # fmt: skip
    assert pruned.report.verification is not None
    assert pruned.report.verification["largest"] <= 1e-4


def test_freeze_and_only_from_python() -> None:
    pruned = surgeon.prune(models.tiny("Llama"), ratio=0.1, freeze=["model.layers.0"])
    assert [c.axis for c in pruned.plan.cuts] == ["model.layers.1.mlp/ffn"]
    pruned = surgeon.prune(models.tiny("Llama"), ratio=0.1, only=["hidden"])
    assert [c.axis for c in pruned.plan.cuts] == ["hidden"]


def test_tied_weights_stay_tied() -> None:
    model = models.tiny("Llama", tie_word_embeddings=True)
    small: Any = surgeon.prune(model, ratio=0.3, roles={"hidden": 0.125}).model
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert small.config.tie_word_embeddings


def test_untied_weights_stay_untied() -> None:
    small: Any = surgeon.prune(models.tiny("Llama"), roles={"hidden": 0.125}).model
    assert small.lm_head.weight is not small.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_rounding_of_the_plan(tmp_path: Path, dtype: torch.dtype) -> None:
    model = models.build("Llama").to(dtype)
    wide = models.build("Llama").to(dtype).float()
    folder = checkpoint(tmp_path / "m", model)
    kept = surgeon.prune(folder, ratio=0.2, roles={"hidden": 0.125})
    report = kept.save(tmp_path / "o")
    plan = dataclasses.replace(kept.plan, source=())
    exact = surgeon.prune(wide, plan=plan).model.state_dict()
    stored = weights_of(tmp_path / "o")
    assert stored and all(t.dtype == dtype for t in stored.values())
    for name, tensor in stored.items():
        assert torch.equal(tensor, exact[name].to(dtype)), name
    assert json.loads((tmp_path / "o/config.json").read_text())["dtype"] == str(dtype)[6:]
    assert report.verification is not None
    assert report.verification["largest"] <= 1e-4 < report.verification["cast"] < 0.5
    assert report.verification["rounded"] is True


def test_mixed_element_types_are_kept(tmp_path: Path) -> None:
    model = models.build("Llama").to(torch.bfloat16)
    model.model.norm.float()
    folder = checkpoint(tmp_path / "m", model)
    surgeon.prune(folder, ratio=0.2).save(tmp_path / "o")
    stored = weights_of(tmp_path / "o")
    assert {n for n, t in stored.items() if t.dtype == torch.float32} == {"model.norm.weight"}
    for source in (folder, model):
        small = surgeon.prune(source, ratio=0.2).model
        state = small.state_dict()
        assert {n: t.dtype for n, t in state.items()} == {n: t.dtype for n, t in stored.items()}
        assert all(torch.equal(t, stored[n]) for n, t in state.items())
        assert {b.dtype for b in small.buffers()} == {torch.float32}  # the rotary frequencies


def test_nothing_to_do_is_no_error() -> None:
    model = models.tiny("Llama")
    same = surgeon.prune(model, plan=surgeon.Plan()).model
    ids = models.tokens(101)
    with torch.no_grad():
        assert torch.equal(same(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({}, Code.BAD_RATIO),
        ({"ratio": float("nan")}, Code.BAD_RATIO),
        ({"ratio": 0}, Code.BAD_RATIO),
        ({"ratio": 1.0}, Code.BAD_RATIO),
        ({"roles": {"ffn": -0.5}}, Code.BAD_RATIO),
        ({"roles": {"wings": 0.5}}, Code.NO_SUCH_ROLE),
        ({"ratio": 0.2, "score": "nothing"}, Code.NO_SUCH_PASS),
        ({"ratio": 0.2, "score_options": {"q": 1}}, Code.BAD_OPTION),
        ({"ratio": 0.2, "only": ["nothing"]}, Code.NO_SUCH_AXIS),
    ],
)
def test_refusals_from_python(options: dict[str, Any], code: Code) -> None:
    with refusal(code):
        surgeon.prune(models.tiny("Llama"), **options)


class Listed(transformers.LlamaForCausalLM):
    def forward(self, **inputs: Any) -> Any:
        out = super().forward(**inputs)
        out.logits = out.logits[..., [*range(50), *range(51, 101), 50]]
        return out


def test_a_literal_whose_values_are_lost_is_refused() -> None:
    with refusal(Code.CAPTURE_FAILED, "are not known"):
        surgeon.prune(Listed(models.config("Llama")).eval(), roles={"ffn": 0.25})


def test_a_config_alone_has_no_model(tmp_path: Path) -> None:
    models.config("Llama").save_pretrained(tmp_path)
    pruned = surgeon.prune(tmp_path / "config.json", ratio=0.2, score="random")
    assert pruned.report.parameters["decoder"]["after"] > 0
    with refusal(Code.MISSING_FILE, "no weights"):
        _ = pruned.model
    with refusal(Code.MISSING_FILE, "no weights"):
        pruned.save(tmp_path / "o")
    assert not (tmp_path / "o").exists()
    # Its plan has sizes and no fingerprint, so it fits any weights.
    full = surgeon.prune(models.tiny("Llama"), plan=pruned.plan)
    assert full.plan.cuts == pruned.plan.cuts


def test_probes_fit_small_models(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from surgeon.report.verify import probes

    few = models.build("GPT2", n_positions=16, vocab_size=50)
    folder = checkpoint(tmp_path / "m", few, tiny_tokenizer)  # with more tokens than the model
    surgeon.prune(folder, ratio=0.1).save(tmp_path / "o")
    for probe in probes(50, tiny_tokenizer, positions=16):
        assert probe.ids.shape[1] <= 16 and int(probe.ids.max()) < 50


# --- modules and exported programs ---------------------------------------------------------------


@pytest.mark.parametrize("exported", [False, True])
def test_any_module_gives_a_smaller_graph_module(net: Net, exported: bool) -> None:
    x = torch.randn(5, 6)
    if exported:
        pruned = surgeon.prune(torch.export.export(net, (x,)), ratio=0.3)
    else:
        pruned = surgeon.prune(net, ratio=0.3, example_inputs=(x,))
    small = pruned.model
    assert isinstance(small, torch.fx.GraphModule)
    count = [sum(p.numel() for p in m.state_dict().values()) for m in (net, small)]
    assert 0.65 < count[1] / count[0] < 0.75
    assert pruned.report.parameters["total"] == {"before": count[0], "after": count[1]}
    assert pruned.report.verification is not None
    with torch.no_grad():
        got, want = small(x), pruned.masked(x)
        assert not torch.allclose(want, net(x), atol=1e-3)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_masked_module_is_the_original_with_zeros(net: Net) -> None:
    x = torch.randn(5, 6)
    pruned = surgeon.prune(net, roles={"ffn": 0.5}, example_inputs=(x,))
    (cut,) = pruned.plan.cuts
    gone = [i for i in range(40) if i not in cut.kept]
    other = copy.deepcopy(net)
    with torch.no_grad():
        for tensor in (other.up.weight, other.up.bias):
            tensor[gone] = 0
        other.down.weight[:, gone] = 0
        torch.testing.assert_close(pruned.model(x), other(x), rtol=1e-5, atol=1e-5)


def test_a_module_is_not_modified(net: Net) -> None:
    before = {n: t.clone() for n, t in net.state_dict().items()}
    small = surgeon.prune(net, ratio=0.3, example_inputs=(torch.randn(5, 6),)).model
    with torch.no_grad():
        for tensor in small.state_dict().values():
            tensor.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@pytest.mark.slow
def test_a_pruned_module_is_saved_as_a_program(net: Net, tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    pruned = surgeon.prune(net, ratio=0.3, example_inputs=(x,))
    report = pruned.save(tmp_path / "o")
    assert {p.name for p in (tmp_path / "o").iterdir()} == {
        "model.pt2",
        "plan.json",
        "report.html",
        "surgeon.json",
    }
    assert report.target["name"] == "pt2"
    loaded = torch.export.load(tmp_path / "o" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), pruned.model(x), rtol=1e-5, atol=1e-6)
    with refusal(Code.BAD_OUTPUT):
        pruned.save(tmp_path / "o")


def test_a_module_without_inputs_is_refused(net: Net) -> None:
    with refusal(Code.NOT_A_MODEL, "example inputs"):
        surgeon.prune(net, ratio=0.3)


@pytest.mark.parametrize("source", [None, 3, {"a": 1}, [1], object()])
def test_what_is_no_model_is_refused(source: object) -> None:
    with refusal(Code.NOT_A_MODEL):
        surgeon.prune(source, ratio=0.3)


# --- the other entry points ----------------------------------------------------------------------


def test_capture_and_analyse() -> None:
    program = surgeon.capture(models.tiny("Llama"))
    axes = surgeon.analyse(program)
    opened = surgeon.open_model(models.tiny("Llama"))
    assert opened.program == program
    assert [a.name for a in axes.axes] == [a.name for a in opened.axes.axes]


def test_one_capture_serves_many_plans() -> None:
    opened = surgeon.open_model(models.tiny("Llama"))
    few, many = (surgeon.prune(opened, ratio=r) for r in (0.1, 0.3))
    assert few.origin is many.origin is opened
    assert few.report.ratio["removed"] < many.report.ratio["removed"]


def test_every_public_name_is_there() -> None:
    assert set(surgeon.__all__) <= set(dir(surgeon))
    assert all(getattr(surgeon, name) is not None for name in surgeon.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        surgeon.nothing  # noqa: B018
