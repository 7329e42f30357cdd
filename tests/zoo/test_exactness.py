"""Masked equals removed, for every role of every architecture, and each thing that takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import surgeon.axes.surgery
from passes.transform.rotate_hidden import RotateHidden
from passes.transform.value_output import ValueOutput
from surgeon.axes import Axis
from surgeon.axes.plan import Cut, Plan, cut
from surgeon.errors import SurgeonError
from surgeon.ir import ParamRef
from surgeon.plugin import Context
from tests import models
from tests.exactness import Subject, difference, left_padded, prunable, random_cut, subject_of
from tests.fakes import Drawn

pytestmark = pytest.mark.zoo
every = pytest.mark.parametrize("name", models.ARCHITECTURES)

TOLERANCE = 1e-5
LAYER_NORMS = ("GPT2", "GPTNeoX", "OPT", "StableLm", "Phi", "Starcoder2")
WORST: dict[str, tuple[float, str]] = defaultdict(lambda: (0.0, ""))

# The last linear map of each branch: what silences the branch in the model itself.
LAST = {
    "attention": ("o_proj", "attn.c_proj", "attention.dense", "self_attn.dense", "out_proj"),
    "mlp": ("down_proj", "mlp.c_proj", "dense_4h_to_h", "fc2"),
}


@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints, at the end of the run, the largest difference of each role."""
    WORST.clear()
    yield
    manager: Any = request.config.pluginmanager.getplugin("capturemanager")
    with manager.global_and_fixture_disabled():
        print("\nlargest difference of masked and removed, over the largest logit")
        for what, (worst, where) in WORST.items():
            print(f"  {what:12} {worst:.1e}  {where}")


@cache
def subject(name: str, **overrides: Any) -> Subject:
    return subject_of(models.tiny(name, **overrides))


def equal(made: Subject, plan: Plan, what: str, where: str) -> None:
    """Asserts that removal is masking, and that what is removed mattered."""
    found = made.masked(plan)
    assert difference(found, made.original) > 1e-3, "the cut is too small to show a mistake"
    error = difference(made.removed(plan), found)
    WORST[what] = max(WORST[what], (error, where))
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


def role_of(axis: Axis) -> str:
    return "qk" if axis.role == "rotary" else axis.role


def cuts(made: Subject, seed: int, *, free: bool = True, role: str | None = None) -> list[Cut]:
    rng = np.random.default_rng(seed)
    wanted = prunable(made.axes, lambda a: role in (None, role_of(a)))
    return [random_cut(made.axes, a, rng, free=free) for a in wanted]


@every
def test_each_axis_alone(name: str):
    made = subject(name)
    rng = np.random.default_rng(0)
    for axis in prunable(made.axes):
        equal(made, Plan((random_cut(made.axes, axis, rng),)), role_of(axis), f"{name} {axis.name}")
        if axis.size > 2:
            one = random_cut(made.axes, axis, rng, keep=1)
            equal(made, Plan((one,)), role_of(axis), f"{name} {axis.name}, one index left")


@every
def test_each_role_throughout_the_model(name: str):
    made = subject(name)
    for role in dict.fromkeys(role_of(a) for a in prunable(made.axes)):
        equal(made, Plan(tuple(cuts(made, 1, role=role))), role, name)
        equal(made, Plan(tuple(cuts(made, 2, role=role, free=False))), role, f"{name}, one choice")


@every
def test_every_index_of_the_enclosing_axes_has_its_own_choice(name: str):
    made = subject(name)
    free = [a for a in prunable(made.axes) if a.outer]
    assert {"v"} <= {a.role for a in free}
    for axis in free:
        sizes = [made.axes.get(o).size for o in axis.outer]
        places = np.arange(int(np.prod(sizes))).reshape(sizes)
        rolled = (places[..., None] + np.arange(max(1, axis.size // 2))) % axis.size
        plan = Plan((cut(axis, rolled, axis.outer),))
        assert len({tuple(row) for row in np.sort(rolled).reshape(-1, rolled.shape[-1])}) > 1
        equal(made, plan, role_of(axis), f"{name} {axis.name}, own choices")


@every
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_all_roles_and_a_branch_at_once(name: str, tied: bool):
    made = subject(name, tie_word_embeddings=tied)
    assert tied == any(
        "embed" in p.name or "wte" in p.name for p in made.axes.program.params if p.aliases
    )
    branch = made.axes.branches[1].name
    equal(made, Plan(tuple(cuts(made, 3)), (branch,)), "all at once", name)
    equal(made, Plan(tuple(cuts(made, 4, role="hidden"))), "hidden", f"{name}, tied: {tied}")


@every
def test_without_padding_and_with_padding_on_the_right(name: str):
    made = subject(name)
    ids, mask, _ = left_padded()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    whole = torch.ones_like(mask)
    plan = Plan(tuple(cuts(made, 5)))
    plain = replace(made, inputs=(ids, whole, positions), valid=whole.bool())
    equal(plain, plan, "all at once", f"{name}, no padding")
    right = replace(made, inputs=(ids, mask.flip(1), positions), valid=mask.flip(1).bool())
    equal(right, plan, "all at once", f"{name}, padding on the right")


def silenced(name: str, branches: tuple[Any, ...]) -> Any:
    """The Transformers model itself with the last maps of some branches at zero."""
    model = models.build(name)
    for branch in branches:
        found = [p for p in branch.params if p.rpartition(".")[0].endswith(LAST[branch.kind])]
        assert {p.rpartition(".")[2] for p in found} in ({"weight"}, {"weight", "bias"})
        for param in found:
            torch.nn.init.zeros_(model.get_parameter(param))
    return model


@every
def test_a_bypassed_branch_is_the_model_with_that_branch_silenced(name: str):
    made = subject(name)
    ids, mask, positions = made.inputs
    one = [(b,) for b in made.axes.branches]
    layers = {
        b.layer: tuple(c for c in made.axes.branches if c.layer == b.layer)
        for b in made.axes.branches
    }
    for several in (*one, *layers.values()):
        with torch.no_grad():
            model = silenced(name, several)
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        found = made.removed(Plan(branches=tuple(b.name for b in several)))
        assert difference(found, made.original) > 1e-3
        error = difference(found, (logits[mask.bool()],))
        WORST["layers"] = max(WORST["layers"], (error, f"{name} {several[0].name}"))
        assert error <= TOLERANCE
        gone = {p for b in several for p in b.params}
        program, _ = made.small(Plan(branches=tuple(b.name for b in several)))
        assert gone and gone.isdisjoint(p.name for p in program.params)


@every
def test_capture_computes_what_the_model_computes(name: str):
    made = subject(name)
    ids, mask, positions = made.inputs
    with torch.no_grad():
        logits = models.tiny(name)(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
    assert difference(made.original, (logits[mask.bool()],)) <= TOLERANCE


@every
def test_removing_nothing_changes_no_bit(name: str):
    made = subject(name)
    whole = Plan(tuple(cut(a, range(a.size)) for a in prunable(made.axes)))
    for a, b in zip(made.removed(whole), made.original, strict=True):
        assert torch.equal(a, b)


# --- what it takes: each is shown to matter by taking it out -------------------------------


def differs(made: Subject, plan: Plan) -> None:
    """Asserts that what was just taken out of removal was needed."""
    assert difference(made.removed(plan), made.masked(plan)) > 1e-3


def normalised(name: str, role: str) -> bool:
    """Whether some axes of a role are averaged over."""
    return any(a.normalisers for a in prunable(subject(name).axes) if role_of(a) == role)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *((n, "hidden") for n in ("Llama", "Mistral", "Qwen2", "Gemma", "Gemma2", "Granite")),
        *(("Qwen3", "hidden"), ("Qwen3", "qk"), ("Gemma3Text", "qk")),
        *(("Olmo2", "hidden"), ("Olmo2", "kv_heads"), ("Olmo2", "q_per_kv"), ("Olmo2", "qk")),
    ],
)
def test_without_the_share_of_kept_channels_an_average_is_wrong(
    name: str, role: str, monkeypatch: pytest.MonkeyPatch
):
    assert normalised(name, role)
    made = subject(name)
    plan = Plan(tuple(cuts(made, 1, role=role)))
    equal(made, plan, role, name)
    monkeypatch.setattr(surgeon.axes.surgery, "share_of", lambda *_: 1.0)
    differs(made, plan)


@pytest.mark.parametrize("name", ["Llama", "Gemma3Text", "Phi", "GPTNeoX"])
def test_without_the_rotary_table_cut_alongside_pairs_turn_at_the_wrong_speed(name: str):
    made = subject(name)
    pairs = [a for a in prunable(made.axes) if a.role == "rotary"]
    plan = Plan(tuple(cut(a, range((a.size + 1) // 2, a.size)) for a in pairs))
    program, weights = made.small(plan)
    tables = [p for p in program.params if p.kind == "computed" and "inv_freq" in p.name]
    assert tables and difference(made.run(program, weights), made.masked(plan)) <= TOLERANCE
    for table in tables:
        size = table.type.shape[0]
        assert isinstance(size, int) and size < made.weights[table.name].shape[0]
        weights[table.name] = made.weights[table.name][:size]
    assert difference(made.run(program, weights), made.masked(plan)) > 1e-3


@every
def test_a_scale_taken_from_the_new_width_is_wrong(name: str):
    made = subject(name)
    plan = Plan(tuple(cuts(made, 7, role="qk")))
    program, weights = made.small(plan)
    scaled = 0

    def again(op: Any) -> Any:
        nonlocal scaled
        if op.target != "surgeon.attention":
            return op
        scaled += 1
        width = program.type_of(op.arg(0)).shape[-1]
        rest = tuple((key, value) for key, value in op.kwargs if key != "scale")
        return replace(op, kwargs=(*rest, ("scale", float(width) ** -0.5)))

    derived = replace(program, ops=tuple(again(op) for op in program.ops))
    assert scaled
    assert difference(made.run(program, weights), made.masked(plan)) <= TOLERANCE
    assert difference(made.run(derived, weights), made.masked(plan)) > 1e-3


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_against_a_reference_whose_layer_norms_see_masked_channels_it_differs(name: str):
    made = subject(name)
    hidden = [a for a in prunable(made.axes) if a.role == "hidden"]
    assert [a.exact for a in hidden] == [False] and "LayerNorm" in hidden[0].inexact[0].why
    plan = Plan(tuple(cuts(made, 1, role="hidden")))
    equal(made, plan, "hidden", name)
    assert difference(made.removed(plan), made.masked(plan, kept_norms=False)) > 1e-3


@every
def test_only_layer_norms_make_a_role_inexact(name: str):
    for axis in prunable(subject(name).axes):
        assert axis.exact == (axis.role != "hidden" or name not in LAYER_NORMS), axis.name


@every
def test_a_choice_for_each_enclosing_index_is_not_any_choice(name: str):
    """The same number kept, but at other places, is another model."""
    made = subject(name)
    axis = next(a for a in prunable(made.axes) if a.role == "v")
    rng = np.random.default_rng(8)
    chosen, other = (random_cut(made.axes, axis, rng) for _ in range(2))
    assert difference(made.removed(Plan((chosen,))), made.masked(Plan((other,)))) > 1e-3


def test_every_parameter_of_a_program_is_one_that_the_model_has():
    for name in models.ARCHITECTURES:
        made = subject(name)
        read = {r.name for op in made.axes.program.ops for r in op.args if isinstance(r, ParamRef)}
        assert read <= set(made.weights)


# --- changes of basis: exact while nothing is cut ------------------------------------------------

ROTATED = ("Llama", "Mistral", "Qwen2", "Qwen3", "Phi3", "Granite", "SmolLM3")
"""Architectures whose residual width can be rotated, as long as the head is not tied."""


def asked(made: Subject) -> Context:
    data: Any = Drawn(made.axes, 200)
    return Context(made.axes, made.weights.__getitem__, calibration=data)


def unchanged(made: Subject, found: Any) -> None:
    """Asserts that the outputs are those of before, to rounding."""
    weights = {**made.weights, **found}
    after = made.run(made.axes.program, weights.__getitem__)
    assert difference(after, made.original) <= TOLERANCE


@every
def test_values_in_another_basis_change_nothing(name: str):
    made = subject(name)
    found = ValueOutput().transform(asked(made))
    values = [a for a in made.axes.axes if a.role == "v"]
    assert found.keys() == {m.param for axis in values for m in axis.members}
    assert len(values) == 2 and all(not found[n].equal(made.weights[n]) for n in found)
    unchanged(made, found)


@every
def test_a_rotated_residual_width_changes_nothing_or_is_refused(name: str):
    made = subject(name)
    (axis,) = (a for a in made.axes.axes if a.role == "hidden")
    if name in ROTATED:
        found = RotateHidden().transform(asked(made))
        assert found.keys() == {m.param for m in axis.members}
        unchanged(made, found)
    else:
        with pytest.raises(SurgeonError, match="can't treat") as caught:
            RotateHidden().transform(asked(made))
        assert "allows no change of its basis but" in caught.value.why
