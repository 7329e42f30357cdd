"""What passes may ask of calibration data: against the whole program run at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgeon.axes.consumers import consumers
from surgeon.axes.contractions import contractions
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.calibrate import gathered as module
from surgeon.calibrate.data import Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.calibrate.loss import summed
from surgeon.calibrate.running import placed
from surgeon.calibrate.similarity import spans
from surgeon.calibrate.smaller import TRIAL_WINDOWS
from surgeon.calibrate.taps import Taps
from surgeon.errors import Code, SurgeonError
from surgeon.opening import Model, open_model
from surgeon.runtime.apply import kept_only, masked
from surgeon.runtime.lower import lower
from tests.calibrated import data, ids, origin, run

pytestmark = pytest.mark.slow

FFN, DOWN = "model.layers.0.mlp/ffn", "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"


def mean_loss(logits: torch.Tensor) -> float:
    return float(summed(logits, ids())) / ids()[:, 1:].numel()


# --- moments -------------------------------------------------------------------------------------


def test_norms_are_a_cheaper_question_with_an_answer_of_their_own() -> None:
    found = data()
    norms = found.moments([DOWN], full=False)[DOWN]
    assert norms.second is None
    whole = found.moments([DOWN])[DOWN]
    assert whole.second is not None
    torch.testing.assert_close(norms.square, whole.second.diagonal(), rtol=1e-4, atol=1e-5)
    assert found.moments([DOWN], full=False)[DOWN] is whole  # what is known answers both


def test_what_a_map_makes_and_what_a_normaliser_reads() -> None:
    found = origin()
    (place,) = [c for c in contractions(found.program) if c.param == UP]
    stream = spans(found.program, found.axes.branches)["model.layers.0/mlp"].before
    assert stream is not None
    made, read = run(found, (place.out, stream))
    gathered = data()
    for moments, x in (
        (gathered.outputs([UP])[UP], made),
        (gathered.values([stream], full=True)[stream], read),
    ):
        rows = x.reshape(-1, x.shape[-1]).double()
        assert moments.count == len(rows)
        torch.testing.assert_close(moments.mean.double(), rows.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            moments.variance.double(), rows.var(0, correction=0), rtol=1e-3, atol=1e-4
        )
        norm = rows.square().mean(0).sqrt()
        torch.testing.assert_close(moments.norm.double(), norm, rtol=1e-4, atol=1e-5)


def test_names_that_nothing_is_known_of_are_refused() -> None:
    found = data()
    for call in (
        lambda: found.moments(["nothing"]),
        lambda: found.fisher(["nothing"]),
        lambda: found.values(["nothing"]),
        lambda: found.similarity(["model.layers.9/mlp"]),
    ):
        with pytest.raises(SurgeonError) as caught:
            call()
        assert caught.value.code is Code.BAD_OPTION and caught.value.at in str(caught.value)


def test_channels_that_are_always_zero_are_fine() -> None:
    found = origin()

    def get(name: str) -> torch.Tensor:
        tensor = found.read(name)
        return tensor * (torch.arange(len(tensor)) > 0)[:, None] if name == UP else tensor

    gathered = Gathered(found.axes, get, Windows(ids().numpy()))
    moments = gathered.moments([DOWN])[DOWN]
    assert moments.second is not None and not moments.second[0].any() and moments.square[1] > 0
    assert torch.isfinite(gathered.fisher([DOWN])[DOWN].second).all()


@pytest.mark.parametrize("asked", ["moments", "fisher", "similarity", "loss", "sequential"])
@pytest.mark.parametrize("factor", [float("nan"), 1e38])
def test_values_that_are_no_numbers_are_refused_whatever_is_asked_for(
    asked: str, factor: float
) -> None:
    found = origin()
    broken = "model.layers.1.mlp.up_proj.weight"

    def get(name: str) -> torch.Tensor:
        tensor = found.read(name)
        return tensor * factor if name == broken else tensor

    gathered = Gathered(found.axes, get, Windows(ids().numpy()))
    calls: Mapping[str, Any] = {
        "moments": lambda: gathered.moments([UP], full=False),
        "fisher": lambda: gathered.fisher([UP]),
        "similarity": lambda: gathered.similarity(["model.layers.0/mlp"]),
        "loss": lambda: gathered.loss(Plan()),
        "sequential": lambda: gathered.sequential(Plan(), ["lm_head.weight"], lambda n, p: get(n)),
    }
    with pytest.raises(SurgeonError) as caught:
        calls[asked]()
    assert caught.value.code is Code.BAD_TEXT_INPUT
    assert caught.value.at.startswith("model.layers.1.mlp")


def test_too_few_tokens_for_a_second_moment_are_told_of() -> None:
    notes: list[str] = []
    found = origin()
    few = Gathered(found.axes, found.read, Windows(ids()[:1].numpy()), notes=notes)
    few.moments([DOWN], full=False)
    assert notes == []
    few.moments([DOWN])
    assert len(notes) == 1 and "11 tokens" in notes[0] and "80 channels" in notes[0]


# --- similarity ----------------------------------------------------------------------------------


def test_no_stretch_is_held_longer_than_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a time one layer is open, whatever the number of layers; at the end nothing is held."""
    held, add = list[int](), Taps.add

    def counted(self: Taps, batch: int, found: Any) -> None:
        add(self, batch, found)
        held.append(len({name for name, _ in self._held}))

    monkeypatch.setattr(Taps, "add", counted)
    data("Llama").similarity([b.name for b in origin("Llama").axes.branches])
    assert max(held) == 1 and held[-1] == 0


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPTNeoX"])
def test_similarity_is_the_cosine_of_the_stream_before_and_after(name: str) -> None:
    """In GPT-NeoX attention and MLP are added side by side: before is the sum without one."""
    found = origin(name)
    branches = found.axes.branches
    stream = [found.program.ops[b.add].outputs[0] for b in branches]
    parts = [found.program.ops[b.add].arg(b.operand).name for b in branches]  # type: ignore[union-attr]
    values = dict(zip(stream + parts, run(found, tuple(stream + parts)), strict=True))
    got = data(name, tokens=11).similarity([b.name for b in branches])
    layers = list(dict.fromkeys(b.layer for b in branches))
    ends: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in layers:
        own = [i for i, b in enumerate(branches) if b.layer == layer]
        whole = [values[stream[i]] for i in own]
        if name == "GPTNeoX":
            hidden = spans(found.program, branches)[layer]
            (before,), (after,) = run(found, (str(hidden.before),)), run(found, (hidden.after,))
            added = sum(values[parts[i]] for i in own)
            torch.testing.assert_close(after - before, added, rtol=1e-4, atol=1e-4)
            ends |= {branches[i].name: (after - values[parts[i]], after) for i in own}
        else:
            before, after = whole[0] - values[parts[own[0]]], whole[-1]
            ends |= {
                branches[i].name: (values[stream[i]] - values[parts[i]], values[stream[i]])
                for i in own
            }
        ends[layer] = before, after
    got |= data(name).similarity(layers)
    for key, (before, after) in ends.items():
        cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
        assert got[key] == pytest.approx(float(cosine.mean()), abs=1e-5)


# --- the loss ------------------------------------------------------------------------------------


def plans(found: Model) -> list[Plan]:
    cuts = [cut(a, range(0, a.size, 2)) for a in found.axes.axes if a.role in ("ffn", "hidden")]
    return [Plan(), Plan(tuple(cuts)), Plan((), (found.axes.branches[1].name,))]


@pytest.mark.parametrize("name", ["Llama", "GPT2", "OLMo2"])
def test_the_loss_is_that_of_the_masked_model(name: str) -> None:
    """LayerNorm sees kept channels only, as in the model that is written."""
    found = origin({"OLMo2": "Olmo2"}.get(name, name))
    gathered = Gathered(found.axes, found.read, Windows(ids().numpy()), tokens=22)
    for plan in plans(found):
        selection = Selection(found.axes, plan)
        silent = set(found.axes.branches[1].params) if plan.branches else set()

        def get(key: str, s: Any = selection, z: Any = silent) -> torch.Tensor:
            return masked(s, key, found.read(key)) * (key not in z)

        change = kept_only(found.axes, selection, found.program.producer)
        (logits,) = run(found, get=get, change=change)
        assert gathered.loss(plan) == pytest.approx(mean_loss(logits), rel=1e-5)


def test_the_loss_may_be_taken_over_fewer_windows_and_with_other_tensors() -> None:
    found = origin()
    (logits,) = run(found)
    few = mean_loss(logits) * 0
    few += float(summed(logits[:2], ids()[:2])) / ids()[:2, 1:].numel()
    assert data(loss_windows=2).loss(Plan()) == pytest.approx(few, rel=1e-5)
    other = found.read(DOWN) * 3
    (logits,) = run(found, get=lambda n: other if n == DOWN else found.read(n))
    assert data().loss(Plan(), {DOWN: other}) == pytest.approx(mean_loss(logits), rel=1e-5)


# --- rewrites of earlier passes ------------------------------------------------------------------


def pairs(gathered: Gathered, plan: Plan, param: str) -> Any:
    """What a compensation is told of a parameter's inputs."""
    found: list[Any] = []

    def solve(name: str, pair: Any) -> torch.Tensor:
        found.append(pair)
        return gathered.read(name)

    gathered.sequential(plan, [param], solve)
    return found[0]


def products(found: Model, param: str, dense: Any, pruned: Any) -> tuple[Any, Any]:
    value = next(c.value for c in contractions(found.program) if c.param == param)
    x, p = (run(found, (value,), get)[0].reshape(-1, 80).double() for get in (dense, pruned))
    return p.T @ p / len(p), x.T @ p / len(p)


@pytest.mark.parametrize("dense", [False, True])
def test_compensations_go_on_from_those_before_them(dense: bool) -> None:
    """A change of basis holds in both models; a compensation in the pruned one alone."""
    found = origin()
    plan = Plan((cut(found.axes.get(FFN), range(40)),))
    selection = Selection(found.axes, plan)
    param = "model.layers.1.mlp.down_proj.weight"
    change = {DOWN: found.read(DOWN) * 2}

    def now(name: str) -> torch.Tensor:
        return change[name] if name in change else found.read(name)

    gathered = data().with_rewrites(change, dense=dense)
    pair = pairs(gathered, plan, param)
    expected = products(
        found, param, now if dense else found.read, lambda n: masked(selection, n, now(n))
    )
    for got, want in zip((pair.pruned, pair.cross), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    (logits,) = run(found, get=now)
    assert gathered.loss(Plan()) == pytest.approx(mean_loss(logits), rel=1e-5)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_later_maps_see_what_those_solved_for_before_them_make(name: str) -> None:
    """The pruned model goes on from what was tapped, or runs the piece again."""
    found, gathered = origin(name), data(name)
    axes = [a for a in found.axes.axes if a.role == "ffn"]
    plan = Plan(tuple(cut(a, range(0, a.size, 2)) for a in axes))
    maps = [consumers(found.axes, a)[0] for a in axes]
    new = {maps[0].param: found.read(maps[0].param) * 0.5}
    seen: dict[str, Any] = {}

    def solve(param: str, pair: Any) -> torch.Tensor:
        seen[param] = pair
        return new.get(param, found.read(param))

    gathered.sequential(plan, [c.param for c in maps], solve)
    selection = Selection(found.axes, plan)

    def small(param: str) -> torch.Tensor:
        return masked(selection, param, new.get(param, found.read(param)))

    pair = seen[maps[-1].param]
    (place,) = [c for c in contractions(found.program) if c.param == maps[-1].param]
    (x,) = run(found, (place.value,), small)
    rows = x.reshape(-1, x.shape[-1]).double()
    torch.testing.assert_close(pair.pruned, rows.T @ rows / len(rows), rtol=1e-3, atol=1e-6)


def test_statistics_stay_valid_until_the_dense_model_changes() -> None:
    found, last = data(), "model.layers.1.mlp.down_proj.weight"
    before = found.moments([last])[last]
    change = {DOWN: found.read(DOWN) * 2}
    assert found.with_rewrites(change, dense=False).moments([last])[last] is before
    assert found.with_rewrites({}, dense=True).moments([last])[last] is before
    after = found.with_rewrites(change, dense=True).moments([last])[last]
    assert not torch.allclose(after.square, before.square, rtol=1e-3)
    assert found.moments([last])[last] is before


def test_what_is_let_go_soon_is_gathered_on_few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second moment wants so many tokens a channel; only those alike are gathered with it."""
    found, (samples, length) = data(), ids().shape
    width = origin().axes.get(FFN).size
    monkeypatch.setattr(module, "TOKENS_A_CHANNEL", 1.5 * length / width)
    found.expect(["activations: second moment"], brief=True)
    assert found.moments([DOWN])[DOWN].count == 2 * length
    # One walk answers for the other layer, and gathers nothing of another role.
    assert len(found._known.second) == len(origin().axes.of_role("ffn"))
    found.expect(["activations: second moment"])
    assert found.moments([UP])[UP].count == samples * length
    assert len(found._known.second) > 2


def test_statistics_have_not_seen_the_windows_of_trials() -> None:
    for needs, unseen in ((["loss: divergence"], TRIAL_WINDOWS), ([], 0)):
        found = data()
        found.expect(["activations: second moment", *needs])
        length = found.windows.ids.shape[1]
        assert found.moments([DOWN])[DOWN].count == found.windows.ids.size - unseen * length


# --- where it runs and what is kept --------------------------------------------------------------


def test_states_on_a_disk_change_nothing_and_leave_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    one, two = data(tokens=22), data(tokens=22, offload=folder)
    plan = Plan((cut(origin().axes.get(FFN), range(40)),))
    names = [DOWN, "model.layers.1.mlp.down_proj.weight"]
    for name in names:
        assert torch.equal(one.moments(names)[name].second, two.moments(names)[name].second)  # type: ignore[arg-type]
        assert torch.equal(one.fisher(names)[name].second, two.fisher(names)[name].second)
        assert torch.equal(one.gradients(names)[name].square, two.gradients(names)[name].square)
    layers = ["model.layers.0", "model.layers.1/mlp"]
    assert one.similarity(layers) == two.similarity(layers)
    assert one.loss(plan) == two.loss(plan)
    assert torch.equal(pairs(one, plan, names[1]).cross, pairs(two, plan, names[1]).cross)
    assert list(folder.iterdir()) == []


def test_a_folder_that_can_not_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SurgeonError) as caught:
        data(offload=tmp_path / "file").moments([DOWN])
    assert caught.value.code is Code.BAD_OUTPUT


def test_one_walk_answers_for_every_layer_and_role(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Any] = []
    real = module.walk
    monkeypatch.setattr(module, "walk", lambda *a: walks.append(a) or real(*a))
    found = data()
    found.expect(["activations: second moment", "activations: similarity"])
    found.moments([DOWN])
    found.moments([c.param for c in contractions(origin().program)])
    found.similarity([b.name for b in origin().axes.branches])
    assert len(walks) == 1


def test_who_asks_for_all_of_a_role_at_once_gets_nothing_else() -> None:
    found, names = data(), [DOWN, "model.layers.1.mlp.down_proj.weight"]
    found.moments(names)
    found.fisher(names)
    values = {c.value for c in contractions(origin().program) if c.param in names}
    made = {c.out for c in contractions(origin().program) if c.param in names}
    assert found._known.second.keys() == values and found._known.fisher.keys() == made
    one = data()
    one.moments(names[:1])
    one.fisher(names[:1])
    assert one._known.second.keys() > values and one._known.fisher.keys() > made


def test_what_no_pass_is_going_to_ask_for_is_let_go() -> None:
    found = data()
    found.expect(["activations: second moment", "gradients: outputs", "gradients: weights"])
    before = found.fisher([DOWN])[DOWN], found.moments([DOWN])[DOWN], found.gradients([DOWN])[DOWN]
    found.expect(["activations: norms"])
    assert found._known.second and not found._known.fisher and not found._known.gradients
    found.expect(["activations: distillation"])
    assert not found._known.second
    found.expect(["activations: second moment", "gradients: outputs", "gradients: weights"])
    after = found.fisher([DOWN])[DOWN], found.moments([DOWN])[DOWN], found.gradients([DOWN])[DOWN]
    for one, two in zip(before, after, strict=True):
        assert one.count == two.count
    torch.testing.assert_close(after[0].second, before[0].second)


def test_a_device_is_chosen_by_name() -> None:
    assert data(device="auto").machine.world.device in ("cpu", "cuda")
    with pytest.raises(SurgeonError) as caught:
        data(device="tpu")
    assert caught.value.at == "--device"


def test_what_operations_make_from_nothing_is_made_on_the_device() -> None:
    found = origin("Llama")
    meta = placed(lower(found.program, found.read), "meta")
    row = ids().to("meta")
    positions = torch.arange(row.shape[1], device="meta").expand(len(row), -1)
    assert meta(row, torch.ones_like(row), positions).is_meta


def test_a_module_that_takes_no_tokens_can_not_be_calibrated() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))
    found = open_model(net, example_inputs=(torch.zeros(2, 4),))
    gathered = Gathered(found.axes, found.read, Windows(np.zeros((2, 4), dtype=np.int64)))
    with pytest.raises(SurgeonError) as caught:
        gathered.moments([found.program.params[0].name])
    assert caught.value.at == "--calibration"
