"""Recipes: what a file may say, what is refused and where, and that a run's own repeats it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import surgeon
from surgeon import recipes
from surgeon.calibrate.data import Piece
from surgeon.calibrate.data import Recipe as Data
from surgeon.errors import Code, SurgeonError
from surgeon.recipes import from_text, load_recipe, shipped, to_yaml
from surgeon.recipes.changes import Changes, Named
from surgeon.recipes.reading import DEEPEST, LARGEST
from tests import models
from tests.command import ROOT, checkpoint
from tests.command import surgeon as command
from tests.refusals import refused

pytestmark = pytest.mark.slow

FULL = """
version: 1
about: everything that there is to say
model: somewhere
target: onnx
seed: 3
budget:
  ratio: 1/5
  roles: {kv_heads: 1/3, ffn: 1e-1}
  freeze: [model.layers.0]
  only: hidden
  measure: flops
  limits: {layers: 0, ffn: 0.5}
  multiple_of: {ffn: 64}
  tensor_parallel: 2
calibration:
  sources:
    - {source: a.txt, weight: 2}
    - b.jsonl
  samples: 8
  length: 16
vocabulary: {corpus: a.txt, coverage: 99/100, always: [Sir, Madam]}
schedule: {rounds: 4, shape: cubic, stop_if_worse_than: 1.2}
passes:
  - {score: obs, damping: 0.1}
  - {select: uniform, multiple-of: 8}
  - {compensate: least_squares}
"""

LEAST = "version: 1\npasses: [{score: magnitude}, {select: uniform}]\n"


def refusal(text: str, code: Code = Code.BAD_RECIPE) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        from_text(text, "r.yaml")
    assert caught.value.code is code, caught.value
    return caught.value


# --- what a recipe says --------------------------------------------------------------------------


def test_every_key_is_read() -> None:
    found = from_text(FULL, "r.yaml")
    assert found.budget.ratio == pytest.approx(0.2)
    assert found.budget.roles == {"kv_heads": pytest.approx(1 / 3), "ffn": 0.1}
    assert (found.budget.freeze, found.budget.only) == (("model.layers.0",), ("hidden",))
    assert [(s.source, s.weight) for s in found.calibration.sources] == [
        ("a.txt", 2.0),
        ("b.jsonl", 1.0),
    ]
    assert (found.budget.measure, found.budget.tensor_parallel) == ("flops", 2)
    assert found.budget.limits == {"layers": 0, "ffn": 0.5}
    assert found.budget.multiple_of == {"ffn": 64}
    tokens = found.vocabulary
    assert tokens is not None and (tokens.corpus, tokens.coverage) == (("a.txt",), 0.99)
    assert (tokens.keep, tokens.always) == (None, ("Sir", "Madam"))
    assert found.schedule is not None and found.schedule.rounds == 4
    assert [(p.kind, p.name) for p in found.passes] == [
        ("score", "obs"),
        ("select", "uniform"),
        ("compensate", "least_squares"),
    ]
    assert found.passes[0].options == {"damping": 0.1}


def test_a_recipe_survives_its_text() -> None:
    for text in (FULL, LEAST):
        found = from_text(text, "r.yaml")
        assert from_text(to_yaml(found), "again") == found
        assert to_yaml(from_text(to_yaml(found), "again")) == to_yaml(found)


def test_only_what_was_said_is_printed() -> None:
    assert yaml.safe_load(to_yaml(from_text(LEAST, "r.yaml"))) == yaml.safe_load(LEAST)


def test_from_a_path_a_mapping_a_name_or_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(LEAST)
    found = from_text(LEAST, "r.yaml")
    assert load_recipe(file) == load_recipe(str(file)) == found
    assert load_recipe(yaml.safe_load(LEAST)) == found and load_recipe(found) is found
    assert load_recipe("fast").passes[0].name == "magnitude"


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "at", "why", "try_"),
    [
        ("pases: []", "pases", "budget, calibration", "did you mean passes?"),
        ("budget: {raito: 0.2}", "budget.raito", "ratio, roles", "did you mean ratio?"),
        ("calibration: {sources: [{sauce: x}]}", "sources[0].sauce", "source, weight", "source"),
        ("schedule: {shape: linear}", "", "no default", "schedule.rounds"),
        ("budget: {ratio: much}", "budget.ratio", "'much'", "Share"),
        ("budget: {ratio: 1.5}", "budget.ratio", "less than 1", "Share"),
        ("budget: {ratio: .nan}", "budget.ratio", "nan", "Share"),
        ("budget: {ratio: true}", "budget.ratio", "True", "Share"),
        ("budget: {ratio: 1/0}", "budget.ratio", "1/0", "Share"),
        ("budget: {roles: {ffn: 2}}", "budget.roles.ffn", "less than 1", "role"),
        ("budget: {measure: weight}", "budget.measure", "'flops'", "share of"),
        ("budget: {limits: {ffn: 1.1}}", "budget.limits.ffn", "less than", "largest share"),
        ("budget: {multiple_of: {ffn: 0}}", "budget.multiple_of.ffn", "greater", "multiples"),
        ("budget: {tensor_parallel: 1.5}", "budget.tensor_parallel", "integer", "Devices"),
        ("budget: 3", "budget", "mapping", "ratio"),
        ("calibration: {samples: 0}", "calibration.samples", "greater", "Windows"),
        ("calibration: {length: 1}", "calibration.length", "greater", "Tokens"),
        ("schedule: {rounds: 2, shape: round}", "schedule.shape", "'linear'", "ratio grows"),
        ("schedule: {rounds: 2.5}", "schedule.rounds", "integer", "round"),
        ("schedule: {rounds: 2, stop_if_worse_than: 1}", "stop_if_worse_than", "than 1", "perpl"),
        ("vocabulary: {keep: 9}", "", "no default", "vocabulary.corpus"),
        ("vocabulary: {corpus: []}", "vocabulary.corpus", "at least 1", "Texts"),
        ("vocabulary: {corpus: x, keep: 0}", "vocabulary.keep", "greater", "most tokens"),
        ("vocabulary: {corpus: x, coverage: 2}", "vocabulary.coverage", "less", "frequent"),
        ("vocabulary: {corpus: x, keep: 9, coverage: 1.0}", "vocabulary", "both say", "corpus"),
        ("seed: -1", "seed", "greater", "random"),
        ("target: 3", "target", "string", "`onnx` or `pt2`"),
        ("about: 2020-01-01", "about", "string", "good for"),
    ],
)
def test_a_wrong_key_or_value_is_named(change: str, at: str, why: str, try_: str) -> None:
    error = refusal(LEAST + change)
    assert error.at.startswith("r.yaml") and at in error.at
    text = str(error)
    assert why in text and try_ in text, text


@pytest.mark.parametrize(
    ("passes", "says"),
    [
        ("x", "list"),
        ("[]", "at least 1"),
        ("[{score: magnitude}]", "0 of kind select, and score needs one"),
        ("[{compensate: bias}]", "0 of kind score, and compensate needs one"),
        ("[{score: magnitude}, {transform: value_output}, {select: uniform}]", "order score, tr"),
        ("[3, {select: uniform}]", "passes[0]"),
        ("[{scores: magnitude}, {select: uniform}]", "this has scores"),
        ("[{score: magnitude, select: uniform}, {select: uniform}]", "score and select"),
        ("[{score: magnitude}, {score: random}, {select: uniform}]", "2 of kind score"),
        ("[{score: magnitude}, {compensate: least_squares}]", "0 of kind select"),
        ("[{select: uniform}, {score: magnitude}]", "order select, score"),
        ("[{score: [1]}, {select: uniform}]", "string"),
    ],
)
def test_passes_are_one_score_and_one_select_in_order(passes: str, says: str) -> None:
    assert says in str(refusal(f"version: 1\npasses: {passes}"))


@pytest.mark.parametrize(
    "passes",
    [
        "[{transform: value_output}]",
        "[{transform: value_output}, {score: obs}, {select: uniform}, {transform: rotate_hidden}]",
        "[{score: obs}, {select: uniform}, {compensate: bias}, {transform: value_output}]",
    ],
)
def test_transforms_stand_before_and_after_and_keep_their_places(passes: str) -> None:
    found = from_text(f"version: 1\npasses: {passes}", "r.yaml")
    assert [step.to_data() for step in found.passes] == yaml.safe_load(passes)
    assert from_text(to_yaml(found), "again") == found
    assert Changes().applied(found).passes == found.passes


@pytest.mark.parametrize(
    ("passes", "code", "at", "says"),
    [
        ("{score: magnitud}", Code.NO_SUCH_PASS, "passes[0].score", "did you mean magnitude"),
        ("{score: magnitude, q: 1}", Code.BAD_OPTION, "passes[0].q", "p, normalise"),
        ("{score: magnitude, p: 7}", Code.BAD_OPTION, "passes[0].p", "1 | 2 | 'max'"),
        ("{score: obs, damping: 0}", Code.BAD_OPTION, "passes[0].damping", "above 0"),
    ],
)
def test_passes_and_their_options_are_checked_at_their_place(
    passes: str, code: Code, at: str, says: str
) -> None:
    error = refusal(f"version: 1\npasses: [{passes}, {{select: uniform}}]", code)
    assert error.at == f"r.yaml: {at}" and error.data["key"] == at
    assert says in str(error)


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(
    f"{chr(c + 1)}: &{chr(c + 1)} [*{chr(c)}, *{chr(c)}]\n" for c in range(ord("b"), ord("y"))
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it holds nothing"),
        ("- a", "it holds a list"),
        ("just words", "it holds a str"),
        ("a: [", "r.yaml:1"),
        ("version: 1\nversion: 1", "r.yaml:2\n  why the key 'version' is given twice"),
        ("version: 1\nbudget: {ratio: 0.1, ratio: 0.2}", "'ratio' is given twice"),
        ("a: &x 1\nb: 2", "anchors"),
        (BOMB, "anchors"),
        ("<<: {version: 1}", "merge"),
        ("[" * 5000, "levels deep"),
        ("? [a]\n: 1", "a key is a word"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("2020-99-99: 1", "month"),
        ("version: 1\n---\nversion: 1", "another document"),
        ("a: \x00", "special characters"),
        ("a: " + "9" * 5000, "digits"),
        ("3: 1", "version"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, says: str) -> None:
    assert says in str(refusal(text))


def test_levels_up_to_the_limit_are_read() -> None:
    deep = "[" * (DEEPEST - 1) + "]" * (DEEPEST - 1)
    assert "levels deep" not in str(refusal("a: " + deep))
    assert "levels deep" in str(refusal("a: [" + deep + "]"))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    def load(name: str, content: bytes | None = None) -> SurgeonError:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SurgeonError) as caught:
            load_recipe(tmp_path / name)
        return caught.value

    assert load("nowhere.yaml").code is Code.MISSING_FILE
    assert load("").code is Code.MISSING_FILE  # a folder
    assert "bytes" in load("huge.yaml", LEAST.encode() + b"#" * LARGEST).why
    assert "UTF-8" in load("latin.yaml", "about: ä".encode("latin-1")).why


@pytest.mark.parametrize("name", ["fst", "FAST", "", "..", "..\\fast"])
def test_a_name_that_does_not_ship_is_refused(name: str) -> None:
    with pytest.raises(SurgeonError) as caught:
        load_recipe(name)
    assert caught.value.code in (Code.BAD_RECIPE, Code.MISSING_FILE)


def test_a_name_never_leads_out_of_the_folder_of_those_that_ship(tmp_path: Path) -> None:
    # A name with a folder in it is a path of the user's, and nothing is put together with ours.
    with pytest.raises(SurgeonError) as caught:
        load_recipe("../recipes/fast")
    assert caught.value.code is Code.MISSING_FILE and caught.value.at == "../recipes/fast"


# --- what ships ----------------------------------------------------------------------------------


def test_the_recipes_that_ship() -> None:
    assert shipped().keys() >= {
        *("default", "fast", "wanda", "taylor", "flap", "depth", "width", "random")
    }
    assert recipes.DEFAULT_RECIPE in shipped()


@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_recipe_that_ships_is_valid_with_passes_that_are_there(name: str) -> None:
    found = load_recipe(name)
    assert found.about and found.about == recipes.about(name)
    assert found.model is None and found.budget.ratio is None  # what the user says


def test_the_recipes_are_in_the_wheel() -> None:
    import tomllib

    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert "surgeon" in built["targets"]["wheel"]["packages"]
    assert all(ROOT / "surgeon" in file.parents for file in shipped().values())


# --- what stands beside a recipe -----------------------------------------------------------------


def test_what_is_given_beside_a_recipe_holds() -> None:
    before = from_text(FULL, "r.yaml")
    after = Changes(
        budget={"ratio": 0.5, "roles": {"ffn": 0.3}, "freeze": ["a"], "only": None},
        calibration={"sources": None, "samples": 4, "length": None},
        passes={
            "score": Named(("magnitude",), {"p": 1}),
            "select": Named(None, {"multiple_of": 16}),
            "compensate": Named(()),
        },
        seed=9,
    ).applied(before)
    assert after.budget.ratio == 0.5 and after.budget.freeze == ("a",)
    assert after.budget.roles == {"kv_heads": pytest.approx(1 / 3), "ffn": 0.3}
    assert after.budget.only == ("hidden",)
    assert (after.calibration.samples, after.calibration.length) == (4, 16)
    assert after.calibration.sources == before.calibration.sources
    assert [p.to_data() for p in after.passes] == [
        {"score": "magnitude", "p": 1},
        {"select": "uniform", "multiple_of": 16},  # in place of the one with a hyphen
    ]
    assert (after.seed, after.target) == (9, "onnx")
    assert Changes().applied(before) == before


# --- runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama") / "m", models.tiny("Llama"), tiny_tokenizer)


@pytest.fixture(scope="module")
def text(llama: Path) -> Path:
    file = llama.parent / "text.txt"
    file.write_text("".join(f"{i} green bottles hang on the wall. " for i in range(60)))
    return file


def ran(*args: object) -> str:
    found = command(*args)
    assert found.code == 0, found.err
    return found.out


WHOLE = """
version: 1
budget: {ratio: 0.3, roles: {kv_heads: 1/3}}
calibration: {samples: 6, length: 16}
seed: 5
passes:
  - score: obs
  - select: uniform
  - compensate: least_squares
"""


@pytest.mark.slow
def test_a_recipe_runs_alike_from_everywhere_and_its_run_repeats_it(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    file = tmp_path / "whole.yaml"
    file.write_text(WHOLE)
    ran("run", file, llama, "-o", tmp_path / "a", "--calibration", text)
    plan = json.loads((tmp_path / "a/plan.json").read_text())

    def same(folder: Path) -> bool:
        stored = (folder / "plan.safetensors").read_bytes()
        return json.loads((folder / "plan.json").read_text()) == plan and stored == (
            (tmp_path / "a/plan.safetensors").read_bytes()
        )

    # The same recipe as options of prune.
    args = ("--recipe", file, "--calibration", text, "--no-verify")
    ran("prune", llama, "-o", tmp_path / "b", *args)
    assert same(tmp_path / "b")
    # From Python.
    data = Data((Piece(str(text)),), 6, 16, 5)
    made = surgeon.prune(str(llama), recipe=file, calibration=data, verify=False)
    assert made.plan.cuts == surgeon.Plan.from_json(json.dumps(plan)).cuts
    # What a run prints, with everything in it: the model, the text, the options by default.
    printed = ran("recipe", tmp_path / "a")
    found = yaml.safe_load(printed)
    assert found["model"] == str(llama) and found["seed"] == 5
    assert found["calibration"]["sources"] == [{"source": str(text), "weight": 1.0}]
    assert found["passes"][0].items() >= {"score": "obs", "damping": 0.01, "batch": 16}.items()
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    ran("run", again, "-o", tmp_path / "c", "--no-verify")
    assert same(tmp_path / "c")
    assert ran("recipe", tmp_path / "c") == printed
    # Another seed is another plan.
    ran("prune", llama, "-o", tmp_path / "d", *args, "--seed", 6)
    assert not same(tmp_path / "d")


@pytest.mark.slow
def test_options_hold_in_place_of_the_recipe(llama: Path) -> None:
    base = ("prune", llama, "--dry-run", "--json", "--recipe", "random", "--ratio", "0.2")
    report = json.loads(ran(*base))
    assert [p["pass"] for p in report["recipe"]] == ["score/random", "select/uniform"]
    other = json.loads(ran(*base, "--score", "magnitude", "--select-option", "multiple_of=16"))
    assert [p["pass"] for p in other["recipe"]] == ["score/magnitude", "select/uniform"]
    assert other["as_recipe"]["passes"][1]["multiple_of"] == 16
    assert other["as_recipe"]["budget"] == {"ratio": 0.2}


@pytest.mark.slow
def test_without_a_text_there_is_one_and_a_warning(llama: Path) -> None:
    args = ("prune", llama, "--dry-run", "--json", "--recipe", "wanda", "--ratio", "0.2")
    report = json.loads(ran(*args, "--samples", 4, "--length", 16))
    assert report["recipe"][0]["effect"]["data"]["built-in text"][0] == 4
    assert any("--calibration FILE" in note for note in report["notes"])
    assert report["as_recipe"]["calibration"] == {"samples": 4, "length": 16}


@pytest.mark.slow
def test_saved_statistics_stand_in_for_data(llama: Path, text: Path, tmp_path: Path) -> None:
    stats = tmp_path / "stats.safetensors"
    windows = ("--calibration", text, "--samples", 4, "--length", 16)
    ran("calibrate", llama, "-o", stats, *windows)
    base = ("prune", llama, "--recipe", "wanda", "--ratio", "0.2", "--no-verify")
    ran(*base, "-o", tmp_path / "a", *windows)
    ran(*base, "-o", tmp_path / "b", "--statistics", stats)
    plans = [(tmp_path / name / "plan.json").read_text() for name in "ab"]
    assert plans[0] == plans[1]
    found = yaml.safe_load(ran("recipe", tmp_path / "b"))
    assert found["calibration"]["statistics"] == str(stats)
    assert "sources" not in found["calibration"]
    # What takes the model to run is refused, and so are both, and another model's.
    other = checkpoint(tmp_path / "other", models.build("Llama", seed=1))
    again = ("prune", llama, "-o", tmp_path / "c", "--ratio", "0.2")
    take = ("--statistics", stats)
    refused(command(*again, "--recipe", "width", *take), "bad-option", "pruned model computes")
    refused(command(*again, "--recipe", "wanda", *take, *windows), "bad-option", "one of both")
    args = ("prune", other, "-o", tmp_path / "c", "--ratio", "0.2", "--recipe", "wanda")
    refused(command(*args, *take), "plan-mismatch", "fingerprint")
    rounds = tmp_path / "r.yaml"
    rounds.write_text(WHOLE + "schedule: {rounds: 2}\n")
    refused(command("run", rounds, llama, "-o", tmp_path / "c", *take), "bad-option", "schedule")
    assert not (tmp_path / "c").exists()


IDS = Data((Piece([3 + 7 * i % 89 for i in range(400)]),), 6, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(shipped()))
def test_a_recipe_that_ships_meets_a_ratio_and_is_verified(name: str) -> None:
    model = models.tiny("Llama", num_hidden_layers=4) if name == "depth" else models.tiny("Llama")
    recipe = load_recipe(name)
    asked = 0.3 if recipe.placed["select"] else None
    saved = sum(step.options.get("budget", 0) for step in recipe.passes if step.kind == "transform")
    made = surgeon.prune(model, recipe=name, ratio=asked, calibration=IDS)
    # Heads are grouped by number: what that removes follows from the model.
    wanted = made.report.ratio["removed"] if made.plan.grouped else asked or saved
    assert 0 <= made.report.ratio["removed"] == pytest.approx(wanted, abs=0.05)
    assert bool(made.plan.grouped) == (name == "grouped-heads")
    assert made.report.verification is not None
    assert made.report.verification["largest"] <= 1e-4
    assert bool(made.plan.branches) == (name == "depth")


@pytest.mark.slow
def test_limits_and_multiples_hold(llama: Path) -> None:
    base = ("prune", llama, "--dry-run", "--json", "--recipe", "random", "--role", "ffn=0.5")
    report = json.loads(ran(*base, "--multiple-of", "ffn=16", "--tensor-parallel", 2))
    assert {a["after"] % 16 for a in report["axes"] if a["role"] == "ffn"} == {0}
    assert report["as_recipe"]["budget"] == {
        "roles": {"ffn": 0.5},
        "multiple_of": {"ffn": 16},
        "tensor_parallel": 2,
    }
    for options, at in (
        (("--multiple-of", "ffn=x"), "--multiple-of ffn"),
        (("--limit", "ffn=x"), "--limit ffn"),
        (("--limit", "ffn=2"), "--limit"),
        (("--tensor-parallel", "0"), "--tensor-parallel"),
        (("--measure", "weight"), "--measure"),
    ):
        found = command(*base, *options)
        assert found.code == 1 and f"  at  {at}\n" in found.err, found.err


@pytest.mark.slow
def test_what_cannot_be_run_is_refused(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(LEAST)
    out = tmp_path / "o"
    refused(command("run", file, llama, "-o", out), "bad-ratio", "nothing says how much")
    refused(command("run", file, "-o", out, "--ratio", 0.2), "not-a-model", "no model is given")
    refused(command("run", file, llama, "--ratio", 0.2), "bad-output", "-o FOLDER")
    refused(command("recipe", tmp_path), "missing-file", "surgeon.json")
    refused(command("recipe", "nothing"), "bad-recipe", "no recipe 'nothing'")
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    args = ("--plan", plan, "--recipe", "fast")
    refused(command("prune", llama, "-o", out, *args), "bad-option", "--plan with --recipe")
    assert not out.exists()


@pytest.mark.slow
def test_a_run_that_replayed_a_plan_has_no_recipe(llama: Path, tmp_path: Path) -> None:
    ran("prune", llama, "-o", tmp_path / "a", "--ratio", "0.1", "--no-verify")
    replay = ("--plan", tmp_path / "a", "--no-verify")
    ran("prune", llama, "-o", tmp_path / "b", *replay)
    refused(command("recipe", tmp_path / "b"), "bad-recipe", "replayed a plan")


def test_the_recipes_that_ship_are_listed_and_printed() -> None:
    assert ran("recipe").split("\n")[0].startswith("default")
    assert ran("recipe", "fast") == shipped()["fast"].read_text()
