"""The built-in passes against plain loops over a model's own tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from passes.score.magnitude import Magnitude
from passes.score.random import Random
from passes.select.uniform import Uniform
from surgeon.axes import Axes, analyse
from surgeon.axes.budget import Budget, allowed, count, decoder_params
from surgeon.axes.plan import Plan, Selection, check, counts
from surgeon.capture.model import capture_model
from surgeon.errors import Code, SurgeonError
from surgeon.plugin import Context
from tests import models

pytestmark = pytest.mark.slow

HEADS, KV, REP, D, FFN, HIDDEN = 6, 3, 2, 8, 80, 48


@cache
def axes_of(name: str, **overrides: Any) -> Axes:
    return analyse(capture_model(models.tiny(name, **overrides)).program)


def context(
    name: str = "Llama", targets: tuple[str, ...] = (), seed: int = 0, **overrides: Any
) -> Context:
    state = dict(models.tiny(name, **overrides).named_parameters())
    return Context(axes_of(name, **overrides), lambda n: state[n].detach(), targets, seed)


# --- magnitude ---------------------------------------------------------------------------------


def pieces(role: str, tied: bool) -> Callable[..., list[torch.Tensor]]:
    """Returns what of Llama's own tensors goes with one channel of a role, spelled by hand."""
    llama = models.tiny("Llama", **TIED[tied])
    state = {n: t.detach().double() for n, t in llama.named_parameters()}

    def of(layer: int, part: str) -> torch.Tensor:
        return next(t for n, t in state.items() if f"layers.{layer}." in n and part in n)

    def heads(weight: torch.Tensor) -> torch.Tensor:
        return weight.reshape(KV, REP, D, HIDDEN)

    def kv(layer: int, i: int) -> list[torch.Tensor]:
        return [
            heads(of(layer, "q_proj"))[i],
            of(layer, "k_proj").reshape(KV, D, HIDDEN)[i],
            of(layer, "v_proj").reshape(KV, D, HIDDEN)[i],
            heads(of(layer, "o_proj").T)[i],
        ]

    def rep(layer: int, group: int, i: int) -> list[torch.Tensor]:
        return [heads(of(layer, "q_proj"))[group, i], heads(of(layer, "o_proj").T)[group, i]]

    def v(layer: int, group: int, i: int) -> list[torch.Tensor]:
        value = of(layer, "v_proj").reshape(KV, D, HIDDEN)[group, i]
        return [value, heads(of(layer, "o_proj").T)[group, :, i]]

    def ffn(layer: int, i: int) -> list[torch.Tensor]:
        return [of(layer, "gate")[i], of(layer, "up")[i], of(layer, "down")[:, i]]

    def rotary(i: int) -> list[torch.Tensor]:
        out: list[torch.Tensor] = []
        for layer in (0, 1):
            for place in (i, i + D // 2):
                out.append(heads(of(layer, "q_proj"))[:, :, place])
                out.append(of(layer, "k_proj").reshape(KV, D, HIDDEN)[:, place])
        return out

    def hidden(i: int) -> list[torch.Tensor]:
        out = [state["model.embed_tokens.weight"][:, i], state["model.norm.weight"][i]]
        if not tied:
            out.append(state["lm_head.weight"][:, i])
        for layer in (0, 1):
            out += [of(layer, n)[:, i] for n in ("q_proj", "k_proj", "v_proj", "gate", "up")]
            out += [of(layer, n)[i] for n in ("o_proj", "down", "input_layern", "post_attention_l")]
        return out

    return {
        "kv_heads": kv,
        "q_per_kv": rep,
        "v": v,
        "ffn": ffn,
        "rotary": rotary,
        "hidden": hidden,
    }[role]


TIED: dict[bool, dict[str, Any]] = {False: {}, True: {"tie_word_embeddings": True}}
ROLES = ("kv_heads", "q_per_kv", "v", "ffn", "rotary", "hidden")


def by_hand(role: str, axis: Any, p: Any, tied: bool) -> tuple[np.ndarray, int]:
    """The norm of every channel of an axis, and how many weights a channel has."""
    take = pieces(role, tied)
    where = [int(n) for n in re.findall(r"layers\.(\d+)\.", axis.name)]
    shape = (*((KV,) if axis.outer else ()), axis.size)
    out = np.zeros(shape)
    sizes = set()
    for index in np.ndindex(*shape):
        found = torch.cat([t.reshape(-1) for t in take(*where, *index)])
        sizes_of = [abs(float(x)) for x in found]
        out[index] = max(sizes_of) if p == "max" else sum(x**p for x in sizes_of) ** (1 / p)
        sizes.add(len(found))
    (size,) = sizes
    return out, size


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("p", [1, 2, "max"])
@pytest.mark.parametrize("role", ROLES)
def test_magnitude_is_the_norm_of_all_weights_of_a_channel(role: str, p: Any, tied: bool):
    axes = axes_of("Llama", **TIED[tied])
    names = tuple(a.name for a in axes.of_role(role))
    assert names
    plain = Magnitude(p=p).score(context(targets=names, **TIED[tied]))
    for name in names:
        wanted, size = by_hand(role, axes.by_name[name], p, tied)
        np.testing.assert_allclose(plain[name], wanted, rtol=1e-9)
        for option, by in (
            ("mean", wanted.mean()),
            ("max", wanted.max()),
            ("size", 1 if p == "max" else size ** (1 / p)),
        ):
            scaled: Any = Magnitude(p=p, normalise=option)  # type: ignore[arg-type]
            found = scaled.score(context(targets=names, **TIED[tied]))[name]
            np.testing.assert_allclose(found, wanted / by, rtol=1e-9)


@pytest.mark.parametrize("p", [1, 2, "max"])
def test_the_magnitude_of_a_branch_is_the_norm_of_what_it_owns(p: Any):
    axes = axes_of("Llama")
    state = dict(models.tiny("Llama").named_parameters())
    found = Magnitude(p=p).score(context(targets=tuple(b.name for b in axes.branches)))
    assert len(found) == 4
    for branch in axes.branches:
        owned = torch.cat([state[n].detach().double().reshape(-1) for n in branch.params])
        assert found[branch.name].shape == ()
        assert float(found[branch.name]) == pytest.approx(float(owned.norm(1 if p == 1 else 2)))


def test_biases_count_with_their_channel():
    axes = axes_of("Llama", mlp_bias=True)
    state = dict(models.tiny("Llama", mlp_bias=True).named_parameters())
    name = "model.layers.0.mlp/ffn"
    assert name in axes.by_name
    own = context(targets=(name,), mlp_bias=True)
    found = Magnitude(p=1).score(own)[name]
    silent = {n: torch.zeros_like(t) if n.endswith(".bias") else t for n, t in state.items()}
    without = Magnitude(p=1).score(Context(axes, lambda n: silent[n].detach(), (name,)))[name]
    extra = sum(state[f"model.layers.0.mlp.{n}_proj.bias"].detach().abs() for n in ("gate", "up"))
    np.testing.assert_allclose(found - without, np.asarray(extra), rtol=1e-5)


@pytest.mark.parametrize("option", ["none", "mean", "max", "size"])
def test_a_model_of_zeros_has_scores_of_zero(option: Any):
    names = tuple(a.name for a in axes_of("Llama").axes if a.role == "ffn")
    zero = Context(
        axes_of("Llama"),
        lambda n: torch.zeros(axes_of("Llama").program.param[n].type.shape),
        names,
    )
    for score in Magnitude(normalise=option).score(zero).values():
        assert (score == 0).all()


def test_magnitude_reads_each_parameter_once_and_none_in_vain():
    axes = axes_of("Llama")
    state = dict(models.tiny("Llama").named_parameters())
    read: list[str] = []

    def weights(name: str) -> torch.Tensor:
        read.append(name)
        return state[name].detach()

    Magnitude().score(Context(axes, weights, tuple(a.name for a in axes.of_role("ffn"))))
    assert sorted(read) == sorted(n for n in state if ".mlp." in n)


# --- random ------------------------------------------------------------------------------------


def test_random_scores_depend_on_the_seed_and_the_name_alone():
    axes = axes_of("Llama")
    names = (*(a.name for a in axes.axes if a.prunable), axes.branches[0].name)
    first = Random().score(context(targets=names, seed=3))
    again = Random().score(context(targets=tuple(reversed(names)), seed=3))
    other = Random().score(context(targets=names, seed=4))
    for name in names:
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
    for axis in (axes.by_name[n] for n in names if n in axes.by_name):
        outer = tuple(axes.by_name[o].size for o in axis.outer)
        assert first[axis.name].shape == (*outer, axis.size)
        assert ((first[axis.name] >= 0) & (first[axis.name] < 1)).all()
    a, b = (first[x.name] for x in axes.of_role("ffn"))
    assert not np.array_equal(a, b)


# --- uniform -----------------------------------------------------------------------------------


def select(
    name: str = "Llama",
    *,
    ratio: float | None = None,
    roles: dict[str, float] | None = None,
    freeze: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    scores: Callable[..., Any] | None = None,
    overrides: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Axes, Plan, list[str]]:
    """What `uniform` makes of a budget, as the driver calls it, with random scores."""
    made = context(name, **(overrides or {}))
    axes = made.axes
    cuttable, branches = allowed(axes, freeze, only)
    budget = Budget(ratio, roles or {}, decoder_params(axes), cuttable, branches)

    def random(names: Any) -> Any:
        return Random().score(Context(axes, made.weights, tuple(names)))

    plan = Uniform(**options).select(made, scores or random, budget)
    return axes, check(axes, plan), made.notes


def removed(axes: Axes, plan: Plan) -> tuple[int, int]:
    before, after = counts(axes, plan, decoder_params(axes))
    return before - after, before


def sizes(axes: Axes, plan: Plan, role: str) -> set[int]:
    selection = Selection(axes, plan)
    return {int(selection.size(axes.number[a.name])) for a in axes.of_role(role)}


def step(notes: list[str]) -> int:
    (found,) = (re.search(r"is ([\d,]+) parameters", n) for n in notes if "step" in n)
    assert found
    return int(found[1].replace(",", ""))


RATIOS = (0.05, 0.13, 0.2, 0.3, 0.42, 0.55, 0.7)


@pytest.mark.parametrize(
    "name",
    [
        "Llama",
        *(pytest.param(n, marks=pytest.mark.zoo) for n in ("Qwen3", "GPT2", "Gemma2", "Phi3")),
    ],
)
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_ratio_is_met_within_half_a_step(name: str, ratio: float):
    axes, plan, notes = select(name, ratio=ratio)
    gone, total = removed(axes, plan)
    assert abs(gone - ratio * total) <= step(notes) / 2
    assert step(notes) < 0.02 * total  # the smallest step, not a convenient one
    for role in ("ffn", "kv_heads", "q_per_kv", "hidden"):
        if axes.of_role(role):
            assert len(sizes(axes, plan, role)) == 1  # the same in every layer


def test_the_mlp_goes_first_then_key_value_groups_then_query_heads_then_the_width():
    def touched(ratio: float) -> set[str]:
        axes, plan, _ = select(ratio=ratio)
        return {axes.by_name[c.axis].role for c in plan.cuts}

    assert touched(0.2) == {"ffn"}
    assert touched(0.52) == {"ffn", "kv_heads"}
    assert touched(0.8) == {"ffn", "kv_heads", "q_per_kv", "hidden"}
    assert "kv_heads" in {
        axes.by_name[c.axis].role
        for axes, plan, _ in [select(ratio=0.2, ffn_limit=0.1)]
        for c in plan.cuts
    }


def test_roles_are_cut_by_their_share():
    axes, plan, notes = select(roles={"ffn": 0.25, "kv_heads": 1 / 3, "v": 0.5, "rotary": 0.5})
    assert sizes(axes, plan, "ffn") == {60}
    assert sizes(axes, plan, "kv_heads") == {2}
    assert sizes(axes, plan, "v") == {4}
    assert sizes(axes, plan, "rotary") == {2}
    assert sizes(axes, plan, "hidden") == {48} and not notes


def test_qk_means_rotary_pairs_too():
    axes, plan, _ = select("Llama", roles={"qk": 0.5})
    assert sizes(axes, plan, "rotary") == {2}
    axes, plan, _ = select("Phi", roles={"qk": 0.5})
    assert {axes.by_name[c.axis].role for c in plan.cuts} == {"rotary", "qk"}


def test_a_ratio_fills_the_roles_that_were_not_asked_for():
    axes, plan, notes = select(ratio=0.4, roles={"kv_heads": 1 / 3, "hidden": 0.25})
    gone, total = removed(axes, plan)
    assert abs(gone - 0.4 * total) <= step(notes) / 2
    assert sizes(axes, plan, "kv_heads") == {2} and sizes(axes, plan, "hidden") == {36}
    assert sizes(axes, plan, "ffn") < {80 - i for i in range(1, 60)}
    axes, plan, notes = select(ratio=0.3, roles={"ffn": 0.1})
    gone, total = removed(axes, plan)
    assert sizes(axes, plan, "ffn") == {72}
    # What is left is coarse: whole key/value groups. The step says so, and half of it is met.
    assert abs(gone - 0.3 * total) <= step(notes) / 2


def test_a_ratio_between_all_of_the_mlp_and_one_group_takes_the_nearer():
    options = {"overrides": {"intermediate_size": 8}, "ffn_limit": 0.5}
    axes, plan, _ = select(roles={"kv_heads": 1 / 3}, **options)
    group, total = removed(axes, plan)
    axes, plan, _ = select(roles={"ffn": 0.5}, **options)
    mlp, _ = removed(axes, plan)
    assert mlp < group
    near = (mlp + 0.2 * (group - mlp)) / total
    axes, plan, notes = select(ratio=near, **options)
    assert removed(axes, plan)[0] == mlp and step(notes) == group - mlp
    far = (mlp + 0.8 * (group - mlp)) / total
    axes, plan, notes = select(ratio=far, **options)
    assert removed(axes, plan)[0] == group


def test_layers_go_as_a_whole_lowest_score_first():
    axes = axes_of("Llama", num_hidden_layers=5)
    worth = {f"model.layers.{i}": x for i, x in enumerate((5.0, 1.0, 4.0, 0.5, 3.0))}

    def scores(names: Any) -> Any:
        return {n: np.asarray(worth[n.split("/")[0]]) for n in names}

    many: dict[str, Any] = {"overrides": {"num_hidden_layers": 5}, "scores": scores}
    _, plan, _ = select(roles={"layers": 0.4}, **many)
    assert plan.branches == tuple(
        f"model.layers.{i}/{kind}" for i in (1, 3) for kind in ("attention", "mlp")
    )
    assert not plan.cuts
    gone, total = removed(axes, plan)
    assert gone / total == pytest.approx(0.4)
    # A layer of which a part is frozen stays.
    _, plan, _ = select(roles={"layers": 0.25}, freeze=("model.layers.3.mlp",), **many)
    assert {b.split("/")[0] for b in plan.branches} == {"model.layers.1"}


def test_layers_count_towards_the_ratio():
    overrides = {"num_hidden_layers": 4}
    axes, plan, notes = select(ratio=0.4, roles={"layers": 0.25}, overrides=overrides)
    gone, total = removed(axes, plan)
    assert len(plan.branches) == 2
    assert abs(gone - 0.4 * total) <= step(notes) / 2


@pytest.mark.parametrize("multiple", [8, 16])
def test_kept_widths_are_multiples(multiple: int):
    for ratio in (0.1, 0.3, 0.6):
        axes, plan, notes = select(ratio=ratio, multiple_of=multiple)
        gone, total = removed(axes, plan)
        assert all(s % multiple == 0 for r in ("ffn", "hidden") for s in sizes(axes, plan, r))
        assert abs(gone - ratio * total) <= step(notes) / 2
    axes, plan, _ = select(roles={"ffn": 0.3, "hidden": 0.3}, multiple_of=multiple)
    assert sizes(axes, plan, "ffn") == {56 if multiple == 8 else 64}
    assert sizes(axes, plan, "hidden") == {32}


def test_a_width_that_is_no_multiple_is_left_alone_until_it_is_cut():
    small: dict[str, Any] = {"overrides": {"intermediate_size": 90}, "multiple_of": 64}
    axes, plan, _ = select(roles={"kv_heads": 1 / 3}, ratio=0.11, **small)
    assert sizes(axes, plan, "ffn") == {90}
    axes, plan, _ = select(roles={"ffn": 0.1}, **small)
    assert sizes(axes, plan, "ffn") == {64}


def test_each_group_chooses_its_own_heads_and_channels():
    chosen = np.array([[3.0, 1.0], [1.0, 3.0], [3.0, 1.0]])

    def scores(names: Any) -> Any:
        return dict.fromkeys(names, chosen)

    axes, plan, _ = select(roles={"q_per_kv": 0.5}, scores=scores)
    for found in plan.cuts:
        assert found.array.tolist() == [[0], [1], [0]]
        assert found.outer == axes.by_name[found.axis].outer != ()
    # A pass may also score an axis the same for all: then nothing depends on the group.
    axes, plan, _ = select(
        roles={"q_per_kv": 0.5}, scores=lambda names: dict.fromkeys(names, chosen[1])
    )
    assert all(c.outer == () and c.array.tolist() == [1] for c in plan.cuts)


def test_the_lowest_scores_go_and_ties_keep_the_lower_index():
    def scores(names: Any) -> Any:
        rising = np.arange(80.0)
        rising[10:70] = 10.0
        return dict.fromkeys(names, rising)

    axes, plan, _ = select(roles={"ffn": 0.5}, scores=scores)
    for found in plan.cuts:
        # 70…79 score highest; then the first of those that tie.
        assert found.array.tolist() == [*range(10, 40), *range(70, 80)]
    assert select(roles={"ffn": 0.5}, scores=scores)[1] == plan
    assert sizes(axes, plan, "ffn") == {40}


def test_scores_are_asked_of_what_is_cut_and_of_nothing_else():
    asked: list[str] = []

    def scores(names: Any) -> Any:
        asked.extend(names)
        return Random().score(context(targets=tuple(names)))

    select(ratio=0.1, scores=scores)
    assert sorted(asked) == ["model.layers.0.mlp/ffn", "model.layers.1.mlp/ffn"]


def raised(**budget: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        select(**budget)
    return caught.value


def test_an_unreachable_ratio_says_what_can_be_reached():
    error = raised(ratio=0.9, freeze=("*self_attn*", "hidden"))
    assert error.code == Code.BAD_RATIO
    found = re.search(r"a ratio up to ([\d.]+),", error.try_)
    assert found
    reachable = float(found[1])
    assert 0 <= error.data["reachable"] - reachable < 0.001
    select(ratio=reachable, freeze=("*self_attn*", "hidden"))
    with pytest.raises(SurgeonError):
        select(ratio=reachable + 0.002, freeze=("*self_attn*", "hidden"))


def test_an_unreachable_ratio_of_everything():
    error = raised(ratio=0.99)
    axes, plan, _ = select(ratio=float(error.data["reachable"]) - 1e-6)
    gone, total = removed(axes, plan)
    assert gone / total == pytest.approx(error.data["reachable"], abs=1e-3)
    assert sizes(axes, plan, "ffn") == {20} and sizes(axes, plan, "hidden") == {24}


def test_roles_that_go_beyond_the_ratio_are_an_error():
    error = raised(ratio=0.05, roles={"kv_heads": 1 / 3})
    assert error.code == Code.BAD_RATIO and "beyond" in error.why
    found = re.search(r"a ratio from ([\d.]+),", error.try_)
    assert found
    axes, plan, _ = select(ratio=float(found[1]), roles={"kv_heads": 1 / 3})
    assert sizes(axes, plan, "kv_heads") == {2}


def test_a_ratio_with_no_role_left_must_be_what_the_roles_give():
    roles = {"ffn": 0.5, "kv_heads": 1 / 3, "q_per_kv": 0.5, "hidden": 0.5}
    axes, plan, _ = select(roles=roles)
    gone, total = removed(axes, plan)
    assert select(ratio=gone / total, roles=roles)[1] == plan
    error = raised(ratio=0.1, roles=roles)
    assert error.code == Code.BAD_RATIO
    assert error.data["reachable"] == pytest.approx(gone / total)


@pytest.mark.parametrize(
    ("roles", "options", "code", "says"),
    [
        ({"ffn": 0.999}, {}, Code.EMPTY_AXIS, "ffn"),
        ({"kv_heads": 0.9}, {}, Code.EMPTY_AXIS, "3 indices and 3 would go"),
        ({"layers": 0.9}, {}, Code.EMPTY_AXIS, "no layer"),
        ({"experts": 0.5}, {}, Code.NO_SUCH_ROLE, "kv_heads"),
        ({"vocab": 0.5}, {}, Code.PINNED, "vocab"),
        ({"ffn": 0.5}, {"freeze": ("ffn",)}, Code.BAD_OPTION, "frozen"),
        ({"layers": 0.5}, {"freeze": ("layers",)}, Code.BAD_OPTION, "layers"),
    ],
)
def test_what_a_role_cannot_give(
    roles: dict[str, float], options: dict[str, Any], code: Code, says: str
):
    error = raised(roles=roles, **options)
    assert error.code == code
    assert says in str(error)


def test_the_hint_of_an_emptied_axis_works():
    error = raised(roles={"kv_heads": 0.9})
    found = re.search(r"below ([\d.]+)", error.try_)
    assert found
    axes, plan, _ = select(roles={"kv_heads": float(found[1]) - 0.001})
    assert sizes(axes, plan, "kv_heads") == {1}


def test_one_layer_is_cut_where_nothing_else_may_be():
    axes, plan, _ = select(roles={"ffn": 0.5}, only=("model.layers.0",))
    assert [c.axis for c in plan.cuts] == ["model.layers.0.mlp/ffn"]
    assert count(axes.program, decoder_params(axes)) > removed(axes, plan)[0] > 0
