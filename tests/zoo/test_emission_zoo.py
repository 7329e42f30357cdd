"""What becomes of every role of every architecture when it is written for Transformers.

Each result is written, loaded by Transformers alone, and compared with the masked model. The
outcomes are pinned in `golden/emission.txt`: a plan that used to be written as a plain checkpoint
and no longer is shows up there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from surgeon.axes.plan import Plan
from surgeon.capture.buffers import computed_buffers
from surgeon.emit.in_memory import in_memory
from surgeon.errors import Code, SurgeonError
from surgeon.pipeline import Model, Pruned, open_model, prune
from surgeon.report import verify as v
from tests import golden, models

pytestmark = pytest.mark.zoo
GOLDEN = "emission.txt"
TOLERANCE = 1e-4

# 48 and 96 times 3/4 are multiples of the 6 heads; times 2/3, of 48, are not.
SHARES = {"hidden": 0.25, "layers": 0.5}
PARTICULAR = (
    "Llama",
    "Qwen3",
    "Gemma",
    "Gemma2",
    "Gemma3Text",
    "GPT2",
    "GPTNeoX",
    "OPT",
    "StableLm",
)
"""Architectures of which some care whether the width is a multiple of the heads."""
EVERYTHING = ("hidden", "kv_heads", "q_per_kv", "ffn")


@cache
def opened(name: str, tied: bool) -> Model:
    return open_model(models.build(name, tie_word_embeddings=tied))


def cases(name: str, tied: bool) -> Iterator[tuple[str, dict[str, float]]]:
    """Each role by itself, a width that no head count divides, and several at once.

    A tied head changes nothing but the width that it shares with the embedding.
    """
    axes = opened(name, tied).axes
    for role in ("hidden",) if tied else axes.roles:
        if role not in ("vocab", "positions"):
            yield role, {role: SHARES.get(role, 0.34)}
    if not tied:
        yield "together", {r: 0.34 for r in EVERYTHING if axes.of_role(r)}
        if name in PARTICULAR:
            yield "hidden, odd", {"hidden": 1 / 3}


def make(origin: Model, roles: Mapping[str, float], **options: Any) -> Pruned:
    return prune(origin, roles=roles, score="random", verify=False, **options)


def loaded(folder: Path, *, remote: bool = False) -> Any:
    """The checkpoint as Transformers loads it, nothing missing and nothing left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=remote, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not info.get("error_msgs")
    return model.eval()


def verified(made: Pruned, model: Any) -> v.Verification:
    """Raises unless a model gives what the masked one gives."""
    masked = v.reference(made.axes, made.plan, made.full)
    forward = v.transformers_forward(model)
    return v.check(forward, masked, v.probes(101), made.axes, made.plan, tolerance=TOLERANCE)


def outcome(made: Pruned, folder: Path) -> str:
    """Writes, loads and compares; returns how the result was written, or why not."""
    try:
        emission = made.emission
    except SurgeonError as error:
        assert error.code == Code.TARGET_REFUSED and error.data["reasons"]
        return "refused: " + "; ".join(error.data["reasons"])
    made.save(folder, verify=False)
    remote = emission.candidate.remote
    model = loaded(folder, remote=remote)
    assert type(model).__name__ == emission.architecture
    assert (folder / "modeling_surgeon_pruned.py").exists() == remote
    stored = sum(p.numel() for p in model.parameters())
    assert stored == made.report.parameters["total"]["after"]
    source: Any = made.origin.source
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same == bool(source.config.tie_word_embeddings)
    found = verified(made, model)
    notes = [emission.architecture.removesuffix("ForCausalLM")]
    if not found.exact:
        notes.append("inexact")
    if emission.scales:
        notes.append(f"{len(emission.scales)} scaled")
    return ", ".join(notes)


def section(heading: str, text: str) -> None:
    """Compares one section of the golden file, or writes it anew."""
    path = golden.FOLDER / GOLDEN
    whole = path.read_text() if path.exists() else ""
    parts: dict[str, str] = {}
    for part in re.split(r"(?m)^(?=\S)", whole):
        if part.strip():
            parts[part.splitlines()[0]] = part
    if os.environ.get("UPDATE_GOLDEN"):
        parts[heading] = text
        order = [f"{n}, {t}" for n in models.ARCHITECTURES for t in ("untied", "tied")]
        path.write_text("".join(parts[h] for h in order if h in parts))
    else:
        assert text.splitlines() == parts.get(heading, "").splitlines()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_role_is_written_as_before(name: str, tied: bool, tmp_path: Path):
    origin = opened(name, tied)
    heading = f"{name}, {'tied' if tied else 'untied'}"
    lines = [heading]
    for number, (label, roles) in enumerate(cases(name, tied)):
        lines.append(f"  {label}: {outcome(make(origin, roles), tmp_path / str(number))}")
    section(heading, "\n".join(lines) + "\n")


# --- folds taken out ---------------------------------------------------------------------------


def kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


@pytest.mark.parametrize(
    ("name", "tied", "roles"),
    [
        ("Llama", False, {"hidden": 0.25}),
        ("Llama", True, {"hidden": 0.25}),
        ("Gemma", True, {"hidden": 0.25}),
        ("Gemma2", False, {"hidden": 0.25}),
        ("Qwen3", True, {"hidden": 0.25}),
        ("Granite", True, {"hidden": 0.25}),
        ("Olmo2", False, {"kv_heads": 0.34}),
        # Two shares at once: the queries' projection carries a factor of each.
        ("Olmo2", True, {"hidden": 0.25, "kv_heads": 0.34}),
    ],
)
def test_every_fold_is_needed(name: str, tied: bool, roles: dict[str, float]):
    made = make(opened(name, tied), roles)
    emission = made.emission

    def check(scales: Any) -> v.Verification:
        changed = replace(emission, scales=scales)
        wide = in_memory(changed, made.selection, made.full, lambda _: torch.float32)
        return verified(made, wide)

    assert check(emission.scales).largest < 1e-5
    for what in sorted({kind(n) for n in emission.scales}):
        for place in range(max(len(s) for n, s in emission.scales.items() if kind(n) == what)):
            fewer = {
                n: tuple(x for i, x in enumerate(s) if i != place) if kind(n) == what else s
                for n, s in emission.scales.items()
            }
            with pytest.raises(SurgeonError) as caught:
                check(fewer)
            assert caught.value.code == Code.VERIFY_FAILED, what


def test_two_shares_make_two_factors_of_one_parameter():
    made = make(opened("Olmo2", False), {"hidden": 0.25, "kv_heads": 0.34})
    bases = {len({s.base for s in found}) for found in made.emission.scales.values()}
    assert bases == {1, 2}


# --- configurations as they are published ------------------------------------------------------


def published(name: str, **overrides: Any) -> Model:
    """A model whose config does not name the width of a head, as most files on the hub."""
    cls: Any = getattr(transformers, models.RECORDED[name]["class"])
    fields = {k: x for k, x in models.RECORDED[name]["config"].items() if k != "head_dim"}
    model = cls(cls.config_class(**{**fields, **overrides}))
    models.randomise(model)
    return open_model(model.eval())


@pytest.mark.parametrize(
    "name",
    ["Llama", "Mistral", "Qwen2", "Phi", "Phi3", "Olmo2", "Granite", "Starcoder2", "SmolLM3"],
)
def test_heads_can_go_where_the_config_does_not_name_their_width(name: str, tmp_path: Path):
    origin = published(name)
    made = make(origin, {"kv_heads": 0.34, "hidden": 0.25})  # the width by itself gives 9 or 18
    assert not made.emission.candidate.remote
    made.save(tmp_path / "out", verify=False)
    verified(made, loaded(tmp_path / "out"))


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_layers_that_slide_from_some_number_on_keep_sliding(name: str, tmp_path: Path):
    sliding = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
    origin = open_model(models.build(name, num_hidden_layers=4, **sliding))
    windows = [False, False, True, True]
    made = make(origin, {"layers": 0.5}, freeze=("model.layers.1", "model.layers.3"))
    for number, one in enumerate((made, make(origin, {"v": 0.34}))):
        folder = tmp_path / str(number)
        one.save(folder, verify=False)
        model = loaded(folder, remote=one.emission.candidate.remote)
        verified(one, model)
        gone = {b.split("/")[0] for b in one.plan.branches}
        wanted = [w for i, w in enumerate(windows) if f"model.layers.{i}" not in gone]
        assert [t == "sliding_attention" for t in model.config.layer_types] == wanted
        assert model.config.sliding_window == 5


@pytest.mark.parametrize(
    ("name", "overrides", "kept"),
    [
        ("Gemma2", {"sliding_window": 5}, (1, 2, 5)),
        ("Gemma3Text", {"sliding_window": 5}, (1, 5, 6)),
        # No layer with full attention is left, and its table of frequencies goes with it.
        ("Gemma3Text", {"sliding_window": 5}, (0, 1, 2)),
        ("SmolLM3", {}, (2, 3, 4)),
    ],
)
def test_kinds_of_layers_survive_the_loss_of_others(
    name: str, overrides: dict[str, Any], kept: tuple[int, ...], tmp_path: Path
):
    origin = open_model(models.build(name, num_hidden_layers=7, **overrides))
    gone = [f"model.layers.{i}" for i in range(7) if i not in kept]
    branches = tuple(b.name for b in origin.axes.branches if b.layer in gone)
    made = prune(origin, plan=Plan(branches=branches), verify=False)
    made.save(tmp_path / "out", verify=False)
    model = loaded(tmp_path / "out")
    verified(made, model)
    source: Any = origin.source
    for field in ("layer_types", "no_rope_layers"):
        if (before := getattr(source.config, field, None)) is not None:
            assert getattr(model.config, field) == [before[i] for i in kept]


def test_several_end_tokens_are_kept_in_a_model_of_as_many_layers(tmp_path: Path):
    origin = open_model(models.build("Llama", eos_token_id=[2, 3]))
    made = make(origin, {"layers": 0.5})
    made.save(tmp_path / "out", verify=False)
    model = loaded(tmp_path / "out")
    assert model.config.eos_token_id == [2, 3] and model.config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("biases", "wanted"),
    [
        ({}, "MistralForCausalLM"),
        ({"attention_bias": True}, "GraniteForCausalLM"),
        ({"mlp_bias": True}, "GraniteForCausalLM"),
    ],
    ids=str,
)
def test_llama_with_a_width_its_config_refuses(
    biases: dict[str, bool], wanted: str, tmp_path: Path
):
    made = make(open_model(models.build("Llama", **biases)), {"hidden": 1 / 3})
    assert made.emission.architecture == wanted and wanted in made.emission.notes[0]
    report = made.save(tmp_path / "out")
    assert any(wanted in note for note in report.notes)
    verified(made, loaded(tmp_path / "out"))


# --- pruning what was pruned -------------------------------------------------------------------


def again(first: Pruned, folder: Path, roles: Mapping[str, float]) -> Pruned:
    """Prunes the checkpoint that an earlier result makes."""
    first.save(folder, verify=False)
    return make(open_model(folder), roles)


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [4.0, 5.0, 6.0, 7.0],
}

STEPS: dict[str, tuple[str, dict[str, Any], list[dict[str, float]]]] = {
    "pairs and width twice": (
        "Llama",
        {},
        [{"rotary": 0.25, "hidden": 0.25}, {"rotary": 0.34, "hidden": 0.25}, {"v": 0.3}],
    ),
    "norms of heads": (
        "Qwen3",
        {"attention_bias": True},
        [{"rotary": 0.25, "hidden": 0.25}, {"rotary": 0.34, "hidden": 0.2, "ffn": 0.3}],
    ),
    "one group left": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True},
        [{"kv_heads": 0.67, "v": 0.25}, {"q_per_kv": 0.5, "hidden": 0.25}],
    ),
    "rotary tables that grow": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        [{"v": 0.25}, {"rotary": 0.25, "hidden": 0.25}, {"ffn": 0.3, "kv_heads": 0.34}],
    ),
    "rotary tables of two lengths": (
        "Llama",
        {"rope_parameters": LONG_ROPE},
        [{"v": 0.25}, {"rotary": 0.25, "hidden": 0.25}, {"ffn": 0.3, "kv_heads": 0.34}],
    ),
    "one pair left": (
        "Qwen3",
        {},
        [{"rotary": 0.75, "q_per_kv": 0.5, "kv_heads": 0.67}, {"hidden": 0.25, "v": 0.25}],
    ),
    "one MLP channel left": (
        "Llama",
        {"intermediate_size": 3},
        [{"v": 0.3, "ffn": 0.7}, {"v": 0.2}],
    ),
    "biases of queries, keys and values": ("Qwen2", {}, [{"v": 0.25}, {"kv_heads": 0.34}]),
    "windows": ("Mistral", {"sliding_window": 5}, [{"v": 0.25}, {"layers": 0.5}, {"ffn": 0.5}]),
}


@pytest.mark.parametrize("steps", STEPS)
def test_a_packaged_checkpoint_can_be_pruned_again(steps: str, tmp_path: Path):
    name, overrides, shares = STEPS[steps]
    made = make(open_model(models.build(name, **overrides)), shares[0])
    widths = [made]
    for number, roles in enumerate(shares[1:]):
        assert made.emission.candidate.remote
        made = again(made, tmp_path / str(number), roles)
        widths.append(made)
    folder = tmp_path / "last"
    made.save(folder, verify=False)
    model = loaded(folder, remote=True)
    verified(made, model)
    config = model.config
    assert config.source_model_type == models.config(name).model_type
    assert config.rotary_dim == 8
    kept = 1.0
    for one in widths:
        (hidden,) = one.axes.of_role("hidden")
        size = one.selection.size(one.axes.number[hidden.name])
        assert isinstance(size, int)
        kept *= size / hidden.size
    assert config.norm_mean_scale == pytest.approx(kept)
    assert config.norm_mean_scale == pytest.approx(config.hidden_size / 48)
    pairs = 4 if config.rotary_pairs is None else len(config.rotary_pairs)
    assert config.head_dim == 2 * pairs
    if config.qk_norm:
        assert config.qk_norm_mean_scale == pytest.approx(pairs / 4)
    # The frequencies are those of the pairs as the first model numbered them.
    first: Any = widths[0].origin.source
    whole = computed_buffers(first.model_class, first.config)["model.rotary_emb.inv_freq"]
    rotary = model.model.rotary_emb
    if rotary.columns is not None:  # the tables are made for every pair, and some are used
        assert rotary.columns.tolist() == [
            *config.rotary_pairs,
            *(p + 4 for p in config.rotary_pairs),
        ]
        assert torch.equal(rotary.inv_freq, whole)
    else:
        wanted = whole if config.rotary_pairs is None else whole[config.rotary_pairs]
        assert torch.equal(rotary.inv_freq, wanted)


def test_layers_that_lost_a_branch_can_be_pruned_again(tmp_path: Path):
    origin = open_model(models.build("Llama", num_hidden_layers=3))
    first = make(origin, {"ffn": 0.5}, only=("model.layers.0",))
    plan = replace(first.plan, branches=("model.layers.1/attention", "model.layers.2/mlp"))
    first = prune(origin, plan=plan, verify=False)
    assert first.emission.config_json is not None
    second = again(first, tmp_path / "first", {"ffn": 0.25, "kv_heads": 0.34, "hidden": 0.25})
    folder = tmp_path / "second"
    second.save(folder)
    model = loaded(folder, remote=True)
    verified(second, model)
    layers = model.config.per_layer_config
    assert [getattr(layer, "skip", []) for layer in layers] == [[], ["attention"], ["mlp"]]
    assert [layer.intermediate_size for layer in layers[:2]] == [30, 60]
    assert layers[0].num_key_value_heads == layers[2].num_key_value_heads == 2


# --- attention that is spelled out --------------------------------------------------------------

SPELLED: dict[str, dict[str, Any]] = {
    "CodeGen": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "n_ctx": 64,
        "rotary_dim": 4,
        "n_inner": 48,
        "tie_word_embeddings": False,
    },
    "XGLM": {
        "d_model": 32,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 64,
    },
}
"""Architectures that don't take their attention from Transformers' interface."""


def spelled(name: str) -> Model:
    tokens = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": 101}
    config = getattr(transformers, f"{name}Config")(**SPELLED[name], **tokens)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    models.randomise(model)
    made = open_model(model.eval())
    assert not any(op.target == "surgeon.attention" for op in made.program.ops)
    return made


@pytest.mark.parametrize("name", SPELLED)
def test_the_mlp_can_go_where_attention_is_spelled_out(name: str, tmp_path: Path):
    made = make(spelled(name), {"ffn": 0.25})
    made.save(tmp_path / "o")
    model = loaded(tmp_path / "o")
    assert type(model).__name__ == f"{name}ForCausalLM"
    assert {"n_inner": 36, "ffn_dim": 36}.items() & model.config.to_dict().items()
    verified(made, model)


def test_spelled_out_attention_that_is_cut_is_refused_by_its_sizes():
    with pytest.raises(SurgeonError) as caught:
        _ = make(spelled("CodeGen"), {"v": 0.25}).emission
    assert "would be [" in caught.value.why and "lack" not in caught.value.why


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "roles", "says"),
    [
        ("GPT2", {"kv_heads": 0.34}, "c_attn.weight would be"),
        ("Gemma", {"rotary": 0.5}, "no per-layer modelling file for gemma"),
        ("GPTNeoX", {"hidden": 1 / 3}, "refuses the sizes"),
        ("Phi3", {"v": 0.34}, "o_proj.weight would be"),
    ],
)
def test_a_refusal_names_every_way_that_was_tried(name: str, roles: dict[str, float], says: str):
    with pytest.raises(SurgeonError) as caught:
        _ = make(opened(name, False), roles).emission
    error = caught.value
    assert error.code == Code.TARGET_REFUSED and says in error.why
    assert error.data["reasons"] and all(r in error.why for r in error.data["reasons"])


def test_layers_that_differ_are_refused_outside_the_packaged_families():
    with pytest.raises(SurgeonError) as caught:
        _ = make(opened("Gemma", False), {"ffn": 0.5}, only=("model.layers.0",)).emission
    assert "differ in width" in caught.value.why


def test_a_plan_that_leaves_no_layer_is_refused():
    origin = opened("Llama", False)
    every = replace(
        make(origin, {"ffn": 0.5}).plan, branches=tuple(b.name for b in origin.axes.branches)
    )
    with pytest.raises(SurgeonError) as caught:
        _ = prune(origin, plan=every, verify=False).emission
    assert "no layer is left" in caught.value.why
