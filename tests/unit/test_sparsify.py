"""Zeros among the weights: scores against brute force, patterns in what is written, refusals."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import surgeon
from passes.transform._sweep import swept
from passes.transform._zeros import Pattern, below, of_pattern, of_share
from passes.transform.sparsify import Sparsify
from surgeon.axes.budget import allowed_params, decoder_params
from surgeon.calibrate.data import Piece, Recipe
from surgeon.errors import Code, SurgeonError
from surgeon.opening import Model, open_model
from surgeon.plugin import Context
from surgeon.report.sparsity import pattern_of, sparse
from tests import calibrated, models
from tests.command import surgeon as command

pytestmark = pytest.mark.slow

DATA = Recipe((Piece([3 + 7 * i % 89 for i in range(2000)]),), 8, 16)
DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def llama() -> Model:
    return calibrated.origin()


@pytest.fixture(scope="module")
def context(llama: Model) -> Context:
    return Context(llama.axes, llama.read, calibration=calibrated.data())


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(200, 8, generator=draw, dtype=torch.float64)
    x[:, 1] += 2 * x[:, 0]
    x[:, 5] -= x[:, 2]
    return torch.randn(5, 8, generator=draw, dtype=torch.float64), x.T @ x / 200


def inputs(llama: Model, param: str, found: Mapping[str, Any], part: str) -> torch.Tensor:
    """What a map reads, [tokens, d], where maps before its part of the layer are replaced."""
    value = next(c.value for c in surgeon.plugin.contractions(llama.program) if c.param == param)

    def get(name: str) -> torch.Tensor:
        earlier = name in found and name < part
        return found[name] if earlier else llama.read(name)

    (x,) = calibrated.run(llama, (value,), get)
    return x.reshape(-1, x.shape[-1]).double()


# --- which weights -------------------------------------------------------------------------------


def test_maps_of_the_layers_lose_weights_and_embedding_and_head_keep_them(context: Context) -> None:
    found = Sparsify(ratio=0.5).transform(context)
    kinds = {name.split(".", 3)[-1] for name in found}
    assert kinds == {
        *(f"self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }
    assert len(found) == 14


def test_globs_of_the_budget_are_kept_to(context: Context) -> None:
    program = context.program
    free = allowed_params(program, ["model.layers.0"], ["*.mlp.*"])
    assert free is not None and "model.layers.1.mlp.up_proj.weight" in free
    asked = replace(context, budget=replace(context.budget, params=free))
    assert {n.rpartition(".mlp.")[0] for n in Sparsify(ratio=0.5).transform(asked)} == {
        "model.layers.1"
    }
    counted = replace(context.budget, counted=decoder_params(context.axes), params=frozenset())
    with pytest.raises(SurgeonError, match="can't treat the weights"):
        Sparsify(ratio=0.5).transform(replace(context, budget=counted))


# --- scores --------------------------------------------------------------------------------------


def test_magnitude_takes_the_smallest_of_each_map(context: Context) -> None:
    for name, made in Sparsify(ratio=0.3).transform(context).items():
        weight = context.weights(name)
        cut = weight.abs().flatten().sort().values[round(0.3 * weight.numel())]
        assert torch.equal(made, torch.where(weight.abs() < cut, 0.0, weight))


def test_rows_can_be_compared_by_themselves(context: Context) -> None:
    for name, made in Sparsify(ratio=0.25, group="row").transform(context).items():
        weight = context.weights(name)
        cut = weight.abs().sort(1).values[:, round(0.25 * weight.shape[1])]
        assert torch.equal(made, torch.where(weight.abs() < cut[:, None], 0.0, weight))


def test_all_maps_at_once_is_sorting_all_weights(context: Context) -> None:
    made = Sparsify(ratio=0.4, scope="global").transform(context)
    every = torch.cat([context.weights(name).abs().flatten() for name in made])
    cut = every.sort().values[round(0.4 * len(every))]
    for name, found in made.items():
        weight = context.weights(name)
        assert torch.equal(found, torch.where(weight.abs() < cut, 0.0, weight))
    shares = {float((found == 0).float().mean()) for found in made.values()}
    assert len(shares) > 1


def test_wanda_weighs_by_the_inputs_that_sparse_maps_before_it_make(
    llama: Model, context: Context
) -> None:
    made = Sparsify(by="wanda", ratio=0.5).transform(context)
    for name in (DOWN.format(0), DOWN.format(1), "model.layers.1.self_attn.q_proj.weight"):
        # What stands in the same part of the layer is still dense when its inputs are looked at.
        part = name.rpartition(".mlp.")[0] or name.rpartition(".self_attn.")[0]
        earlier = {n: t for n, t in made.items() if n.startswith("model.layers.0.") or "attn" in n}
        earlier = {n: t for n, t in earlier.items() if not n.startswith(f"{part}.mlp")}
        if "self_attn" in name:
            earlier = {n: t for n, t in earlier.items() if not n.startswith(part)}
        x = inputs(llama, name, earlier, "z")
        weight = llama.read(name).double()
        scores = weight.abs() * x.square().mean(0).sqrt()
        cut = scores.sort(1).values[:, weight.shape[1] // 2]
        assert torch.equal(made[name] == 0, scores < cut[:, None]), name
        assert torch.equal(made[name][made[name] != 0], llama.read(name)[made[name] != 0])


def test_random_weights_are_those_of_the_seed(context: Context) -> None:
    one, same = (Sparsify(by="random", ratio=0.5).transform(context) for _ in range(2))
    other = Sparsify(by="random", ratio=0.5).transform(replace(context, seed=1))
    name = DOWN.format(0)
    assert torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name])
    assert float((one[name] == 0).float().mean()) == 0.5


# --- weights that make up for others -------------------------------------------------------------


def direct(weight: Any, second: Any, share: float | None, of: int) -> torch.Tensor:
    """Optimal brain surgery from left to right: one inverse for each column, and nothing clever."""
    weight, whole = weight.clone(), weight.shape[1]
    gone = torch.zeros(weight.shape, dtype=torch.bool)
    for j in range(whole):
        if j % of == 0:
            scores = torch.stack(
                [
                    weight[:, k].square() / torch.linalg.inv(second[k:, k:])[0, 0]
                    for k in range(j, j + of)
                ],
                1,
            )
            if share is None:  # half of every group
                order = scores.argsort(1)[:, : of // 2]
                gone[:, j : j + of] = torch.zeros(scores.shape, dtype=torch.bool).scatter(
                    1, order, True
                )
            else:
                cut = scores.flatten().sort().values[round(share * scores.numel())]
                gone[:, j : j + of] = scores < cut
        inverse = torch.linalg.inv(second[j:, j:])
        step = torch.where(gone[:, j], weight[:, j], 0.0) / inverse[0, 0]
        weight[:, j:] -= step[:, None] * inverse[0]
    return weight.masked_fill(gone, 0.0)


@pytest.mark.parametrize(("share", "of", "block"), [(None, 4, 4), (None, 4, 8), (0.5, 4, 4)])
def test_the_sweep_is_optimal_brain_surgery(
    problem: Any, share: float | None, of: int, block: int
) -> None:
    weight, second = problem

    def choose(scores: Any, _: int) -> Any:
        if share is None:
            return of_pattern(scores, Pattern(of // 2, of))
        return of_share(scores[:, None], share, "layer")[:, 0]

    made = swept(weight, second, choose, damping=1e-12, block=block, width=of)
    torch.testing.assert_close(made, direct(weight, second, share, of), rtol=1e-6, atol=1e-8)


def test_sparsegpt_leaves_less_error_than_wanda_and_that_less_than_magnitude(
    llama: Model, context: Context
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"  # its inputs are the dense model's
    x = inputs(llama, name, {}, "")

    def error(**options: Any) -> float:
        made = Sparsify(pattern="2:4", **options).transform(context)[name].double()
        assert int((made.reshape(48, -1, 4) != 0).sum(-1).max()) == 2
        return float((x @ (made - llama.read(name).double()).T).square().mean())

    sparsegpt, wanda = error(by="sparsegpt"), error(by="wanda")
    assert sparsegpt < error(by="wanda", update=True) < wanda < error(by="magnitude")


def test_what_is_zero_stays_zero_and_counts(context: Context) -> None:
    name = DOWN.format(0)
    half = Sparsify(ratio=0.5).transform(context)
    more = Sparsify(by="sparsegpt", ratio=0.6).transform(context.after(half))
    assert bool((more[name][half[name] == 0] == 0).all())
    assert float((more[name] == 0).float().mean()) == pytest.approx(0.6, abs=1e-3)


# --- shares by layer, and in rounds --------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["influence", "weights"])
def test_layers_that_matter_less_lose_more(context: Context, allocation: Any) -> None:
    made = Sparsify(ratio=0.5, allocation=allocation, spread=0.2).transform(context)
    zeros = [
        [float((t == 0).float().mean()) for n, t in made.items() if f"layers.{layer}." in n]
        for layer in (0, 1)
    ]
    assert sum(int((t == 0).sum()) for t in made.values()) == pytest.approx(
        0.5 * sum(t.numel() for t in made.values()), rel=1e-3
    )
    if allocation == "influence":
        alike = context.similarity(["model.layers.0", "model.layers.1"])
        least = 0 if alike["model.layers.0"] > alike["model.layers.1"] else 1
    else:
        lost = []
        for layer in (0, 1):
            own = [context.weights(n) for n in made if f"layers.{layer}." in n]
            gone = sum(
                float(w.abs().flatten().sort().values[: w.numel() // 2].square().sum()) for w in own
            )
            lost.append(gone / sum(float(w.square().sum()) for w in own))
        least = 0 if lost[0] < lost[1] else 1
    assert zeros[least] == pytest.approx([0.7] * 7, abs=1e-3)
    assert zeros[1 - least] == pytest.approx([0.3] * 7, abs=1e-3)
    (note,) = context.notes[-1:]
    assert "30.0% to 70.0%" in note


def test_rounds_look_anew_at_what_the_one_before_left(context: Context) -> None:
    first = Sparsify(by="wanda", ratio=1 - 0.5**0.5).transform(context)
    again = Sparsify(by="wanda", ratio=0.5).transform(context.after(first))
    both = Sparsify(by="wanda", ratio=0.5, rounds=2).transform(context)
    once = Sparsify(by="wanda", ratio=0.5).transform(context)
    assert all(torch.equal(both[n], again[n]) for n in both)
    assert any(not torch.equal(both[n], once[n]) for n in both)


def test_a_pattern_in_rounds_ends_as_the_pattern(context: Context) -> None:
    made = Sparsify(by="sparsegpt", pattern="2:4", rounds=2).transform(context)
    for tensor in made.values():
        assert int((tensor.reshape(len(tensor), -1, 4) != 0).sum(-1).max()) == 2


# --- patterns ------------------------------------------------------------------------------------


def test_of_every_few_the_largest_stay_and_a_short_end_is_a_group() -> None:
    scores = torch.tensor([[3.0, 1, 2, 4, 9, 8, 7, 6, 1, 5, 3]])
    gone = of_pattern(scores, Pattern(2, 4))
    assert gone.int().tolist() == [[0, 1, 1, 0, 0, 0, 1, 1, 1, 0, 0]]
    assert below([scores[:, :2], scores[:, 2:]], 3 / 11)[1].int().tolist()[0][0] == 1


def test_the_pattern_holds_in_the_checkpoint_of_a_model_that_lost_channels_too(
    tmp_path: Path,
) -> None:
    model = models.build("Llama")
    out = tmp_path / "out"
    pruned = surgeon.prune(
        model,
        roles={"ffn": 0.2, "v": 0.25},
        target="pt2",
        then=["sparsify"],
        then_options={"by": "sparsegpt", "pattern": "2:4"},
        calibration=DATA,
    )
    pruned.save(out)
    assert {c.axis.rpartition("/")[2] for c in pruned.plan.cuts} == {"ffn", "v"}
    assert pruned.report.verification is not None
    own = pruned.report.sparsity
    assert own is not None and own["pattern"] == "2:4" and len(own["parameters"]) == 14
    for one in own["parameters"]:
        tensor = pruned.tensor(one["name"])
        assert tensor.shape == one["shape"]
        assert int((tensor != 0).reshape(len(tensor), -1, 4).sum(-1).max()) == 2, one
    assert tuple(pruned.tensor(DOWN.format(0)).shape) == (48, 64)
    # In full size, the groups are other ones.
    full = pruned.rewrites[DOWN.format(0)]
    assert int((full != 0).reshape(48, -1, 4).sum(-1).max()) > 2


def test_a_written_checkpoint_has_real_zeros_and_says_what_they_save(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    models.build("GPT2", n_embd=64, n_head=4, n_inner=96).save_pretrained(source)
    surgeon.prune(
        source,
        recipe={
            "version": 1,
            "passes": [{"transform": "sparsify", "by": "magnitude", "pattern": "2:4"}],
        },
    ).save(out)
    assert surgeon.verify(out).largest <= 1e-4
    report = json.loads((out / "surgeon.json").read_text())
    found = report["sparsity"]
    assert found["sparsity"] == 0.5 and found["pattern"] == "2:4"
    written = open_model(out)
    for one in found["parameters"]:
        tensor = written.read(one["name"])  # [in, out]: GPT-2 keeps matrices the other way round
        assert int((tensor.T.reshape(tensor.shape[1], -1, 4) != 0).sum(-1).max()) == 2
        assert one["zeros"] == int((tensor == 0).sum()) == tensor.numel() // 2
    dense, kernels, rows, zipped = found["saves"]
    assert dense["share"] == 1 and "nothing" in dense["says"]
    assert kernels["share"] == 0.5625 and rows["share"] == 1 and zipped["share"] < 0.75
    assert "Zeros" in (out / "report.html").read_text()


def test_a_report_tells_a_pattern_from_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    dense = torch.randn(64, 64, generator=draw)
    assert sparse("w", dense, 1) is None
    loose = of_share(dense.abs()[:, None], 0.5, "layer")[:, 0]
    assert pattern_of(dense.masked_fill(loose, 0)) is None
    for text in ("2:4", "4:8", "1:4", "3:7"):
        pattern = Pattern.read(text)
        made = dense.masked_fill(of_pattern(dense.abs(), pattern), 0)
        assert pattern_of(made) == text
        found = sparse("w", made, 1)
        assert found is not None and found.semi is (text in ("2:4", "1:4"))
    narrow = sparse("w", of_pattern(dense[:, :60], Pattern(2, 4)).float(), 1)
    assert narrow is not None and narrow.pattern == "2:4" and not narrow.semi


def test_from_the_command_line_by_recipe_and_beside_a_prune(tmp_path: Path) -> None:
    source, out, more = (tmp_path / name for name in ("source", "out", "more"))
    models.build("Llama").save_pretrained(source)
    done = command("run", "magnitude-sparse", source, "-o", out)
    assert done.code == 0, done.err
    said = " ".join(done.out.split())  # lines are as wide as the terminal
    assert "zeros: 50.0% of" in said and "nothing: a zero is stored" in said
    assert "removed 0.000%" in done.out
    again = command("recipe", out)
    assert "by: magnitude" in again.out and "score:" not in again.out
    done = command(
        *("prune", source, "-o", more, "--role", "ffn=0.2"),
        *("--then", "sparsify", "--then-option", "pattern=2:4"),
    )
    assert done.code == 0, done.err
    assert "2:4 along the inputs" in done.out


# --- any module ----------------------------------------------------------------------------------


class Pictures(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Conv2d(4, 8, 3, padding=1)
        self.two = torch.nn.Conv2d(8, 12, 3)
        self.last = torch.nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.two(self.one(x).relu()).relu().mean((2, 3)))


def test_convolutions_and_maps_of_any_module() -> None:
    torch.manual_seed(0)
    module, x = Pictures(), torch.randn(2, 4, 6, 6)
    told = {"version": 1, "passes": [{"transform": "sparsify", "pattern": "2:4"}]}
    made = surgeon.prune(module, recipe=told, example_inputs=(x,))
    assert made.rewrites.keys() == {"one.weight", "two.weight", "last.weight"}
    kernel = made.rewrites["two.weight"]
    # Groups run along the input channels, at each place of the kernel by itself.
    assert int((kernel != 0).movedim(1, -1).reshape(12, 9, 2, 4).sum(-1).max()) == 2
    assert torch.equal(kernel[kernel != 0], module.two.weight.detach()[kernel != 0])
    state = dict(module.state_dict(), **made.rewrites)
    torch.testing.assert_close(
        made.model(x), torch.func.functional_call(module, state, (x,)), rtol=1e-4, atol=1e-5
    )


def test_the_inputs_of_a_convolution_are_not_known() -> None:
    model = open_model(Pictures(), example_inputs=(torch.randn(2, 4, 6, 6),))
    data: Any = object()
    asked = Context(model.axes, model.read, calibration=data)
    with pytest.raises(SurgeonError, match=r"can't treat one\.weight"):
        Sparsify(by="wanda", ratio=0.5).transform(asked)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ratio": 0.5, "pattern": "2:4"}, "a ratio, such as 0.5, or a pattern"),
        ({"ratio": 1.0}, "below 1"),
        ({"pattern": "4:2"}, "N below M"),
        ({"pattern": "half"}, "N:M"),
        ({"ratio": 0.5, "by": "wanda", "scope": "global"}, "can't be compared"),
        ({"ratio": 0.5, "by": "sparsegpt", "scope": "global"}, "no scores of all maps"),
        ({"ratio": 0.5, "update": True, "scope": "global"}, "map after map"),
        ({"ratio": 0.5, "scope": "global", "allocation": "weights"}, "neither an allocation"),
        ({"ratio": 0.5, "normalise": "mean"}, "scope: global"),
        ({"pattern": "2:4", "scope": "global"}, "a pattern is the same share"),
        ({"pattern": "2:4", "allocation": "influence"}, "a pattern is the same share"),
        ({"ratio": 0.5, "rounds": 3}, "one gives the same"),
        ({"ratio": 0.5, "by": "sparsegpt", "update": False}, "make up"),
        ({"ratio": 0.95, "allocation": "weights"}, "below 1"),
        ({"ratio": 0.5, "damping": 0}, "above 0"),
    ],
)
def test_options_that_mean_nothing_together(options: dict[str, Any], says: str) -> None:
    from surgeon.registry import build

    with pytest.raises(SurgeonError) as caught:
        build("transform", "sparsify", options)
    assert caught.value.code is Code.BAD_OPTION and says in caught.value.why


def test_a_pattern_is_read_with_and_without_quotes() -> None:
    from surgeon.recipes import from_text

    for text in ('"2:4"', "2:4", "4:8", "11:32"):
        passes = f"[{{transform: sparsify, pattern: {text}}}]"
        (step,) = from_text(f"version: 1\npasses: {passes}", "r.yaml").passes
        from surgeon.registry import build

        made: Any = build(step.kind, step.name, step.options)
        assert made.pattern == text.strip('"')


def test_a_pattern_before_the_selection_is_refused(llama: Model) -> None:
    with pytest.raises(SurgeonError, match="can't treat a pattern of 2:4") as caught:
        surgeon.prune(
            llama, ratio=0.1, transform=["sparsify"], transform_options={"pattern": "2:4"}
        )
    assert "put it last" in caught.value.why


def test_influence_takes_layers() -> None:
    model = open_model(Pictures(), example_inputs=(torch.randn(2, 4, 6, 6),))
    with pytest.raises(SurgeonError, match="can't treat"):
        Sparsify(ratio=0.5, allocation="influence").transform(Context(model.axes, model.read))
