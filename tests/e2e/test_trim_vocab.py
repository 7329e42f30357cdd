"""A model loses the tokens that a corpus doesn't need, and goes on as the whole one would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import surgeon as api
from surgeon.errors import Code, SurgeonError
from tests import models
from tests.command import Outcome, checkpoint, surgeon
from tests.e2e.test_bad_options import refused
from tests.vocabularies import TEMPLATE, corpus, with_vocabulary

pytestmark = pytest.mark.slow

SHAPES = [
    ("Llama", True, "byte level"),
    ("Llama", False, "byte fallback"),
    ("Qwen2", True, "byte level, whole words first"),
    ("Qwen2", False, "byte level"),
    ("GPT2", True, "byte level"),
    ("Gemma2", True, "unigram"),
]


def ran(outcome: Outcome) -> Outcome:
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    file.write_text(corpus(), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama with a byte-level tokenizer and ten rows that no token has."""
    folder = tmp_path_factory.mktemp("llama") / "m"
    return with_vocabulary(folder, rows=10, tie_word_embeddings=True)


def prompts(tokenizer: Any) -> list[list[int]]:
    """The beginnings of some lines of the corpus."""
    lines = [line.strip() for line in corpus().splitlines() if len(line) > 30]
    return [tokenizer(line[:25])["input_ids"] for line in lines[:4]]


def goes_on(model: Any, ids: list[int], **options: Any) -> list[int]:
    given = torch.tensor([ids])
    settings = {"eos_token_id": None, "suppress_tokens": None, **options}
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=12,
        do_sample=False,
        **settings,
    )
    return out[0, len(ids) :].tolist()


def loaded(folder: Path) -> tuple[Any, Any]:
    remote = (folder / "modeling_surgeon_pruned.py").exists()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
    return model.eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)


def numbers_of(folder: Path) -> dict[int, int]:
    found = json.loads((folder / "token_map.json").read_text())
    assert found["after"] == len(found["old_ids"]) < found["before"]
    return {old: new for new, old in enumerate(found["old_ids"])}


def same_generation(before: Path, after: Path) -> None:
    """Greedy generation of both, where the whole model may only say what stays."""
    (full, tokenizer), (small, own), numbers = loaded(before), loaded(after), numbers_of(after)
    gone = [i for i in range(full.config.vocab_size) if i not in numbers]
    for ids in prompts(tokenizer):
        given = [numbers[i] for i in ids]
        assert own.decode(given) == tokenizer.decode(ids)
        expected = goes_on(full, ids, suppress_tokens=gone)
        assert goes_on(small, given) == [numbers[i] for i in expected]


# --- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tied", "kind"), SHAPES)
def test_a_model_speaks_with_the_tokens_of_a_corpus(
    tmp_path: Path, text: Path, name: str, tied: bool, kind: str
) -> None:
    source = with_vocabulary(tmp_path / "m", name, kind, rows=9, tie_word_embeddings=tied)
    out = tmp_path / "o"
    shown = ran(surgeon("prune", source, "-o", out, "--trim-vocab", text)).out
    same_generation(source, out)
    model, tokenizer = loaded(out)
    numbers, report = numbers_of(out), json.loads((out / "surgeon.json").read_text())
    assert model.config.vocab_size == len(numbers) == len(tokenizer)  # no row without a token
    assert model.get_input_embeddings().weight.shape[0] == len(numbers)
    assert model.get_output_embeddings().weight.shape[0] == len(numbers)
    found = report["vocabulary"]
    assert found["coverage"] == 1 and found["exact"] is True
    assert (found["after"], found["map"]) == (len(numbers), "token_map.json")
    width, gone = model.get_input_embeddings().weight.shape[1], found["before"] - len(numbers)
    saved = {part: n["before"] - n["after"] for part, n in found["parameters"].items()}
    assert saved == {"embedding": gone * width, "head": 0 if tied else gone * width}
    assert f"{len(numbers):,} of {found['before']:,} tokens stay" in " ".join(shown.split())
    assert report["parameters"]["total"]["after"] == sum(p.numel() for p in model.parameters())
    assert report["verification"]["largest"] <= 1e-4
    ran(surgeon("verify", out))


def test_what_a_config_names_is_renumbered(llama: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    ran(surgeon("prune", llama, "-o", out, "--trim-vocab", text, "--no-verify"))
    numbers = numbers_of(out)
    (full, before), (small, after) = loaded(llama), loaded(out)
    end = before.eos_token_id
    assert small.config.eos_token_id == small.config.pad_token_id == numbers[end] != end
    generation = small.generation_config
    assert generation.eos_token_id == [numbers[end], numbers[3]]
    wanted = [numbers[i] for i in full.generation_config.suppress_tokens if i in numbers]
    assert generation.suppress_tokens == wanted
    assert after.eos_token_id == numbers[end] and after.chat_template == TEMPLATE


def test_a_chat_template_has_its_own_words(llama: Path, text: Path, tmp_path: Path) -> None:
    ran(surgeon("prune", llama, "-o", tmp_path / "o", "--trim-vocab", text, "--no-verify"))
    line = next(line.strip() for line in corpus().splitlines() if len(line) > 40)
    chat = [{"role": "user", "content": line}]
    old, new = (
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        for _, tokenizer in (loaded(llama), loaded(tmp_path / "o"))
    )
    numbers = numbers_of(tmp_path / "o")
    assert new["input_ids"] == [numbers[i] for i in old["input_ids"]]


def test_a_chat_template_that_refuses_is_told_of(llama: Path, text: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(llama, tmp_path / "m"))
    (source / "chat_template.jinja").write_text("{{ raise_exception('not this way') }}")
    pruned = api.prune(source, vocabulary={"corpus": text}, verify=False)
    assert any("not this way" in note for note in pruned.report.notes)


def test_logits_are_those_of_the_tokens_that_stay(llama: Path, text: Path) -> None:
    pruned = api.prune(llama, recipe="default", vocabulary={"corpus": text})
    assert any("nothing but the vocabulary" in note for note in pruned.report.notes)
    kept = pruned.plan.cuts[0].array
    assert pruned.plan.renumbered == ("model.embed_tokens/vocab",)
    new = torch.randint(0, len(kept), (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        small = pruned.model(new).logits
        whole = loaded(llama)[0](torch.from_numpy(kept)[new]).logits
    assert torch.allclose(small, whole[..., torch.from_numpy(kept)], atol=1e-5)


def test_a_model_whose_rows_a_target_wants_in_eights(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    more = ("--trim-vocab", text, "--multiple-of", "vocab=64", "--no-verify")
    ran(surgeon("prune", llama, "-o", tmp_path / "o", *more))
    assert len(numbers_of(tmp_path / "o")) % 64 == 0
    same_generation(llama, tmp_path / "o")


# --- with passes and other targets ---------------------------------------------------------------


@pytest.mark.parametrize("roles", [("ffn=0.25", "hidden=0.125"), ("v=0.25", "kv_heads=1/3")])
def test_passes_remove_what_they_did(
    llama: Path, text: Path, tmp_path: Path, roles: tuple[str, ...]
) -> None:
    args = [word for role in roles for word in ("--role", role)]
    args += ["--transform", "value_output", "--calibration", text]
    args += ["--samples", "4", "--length", "16"]
    ran(surgeon("prune", llama, "-o", tmp_path / "whole", *args, "--no-verify"))
    ran(surgeon("prune", llama, "-o", tmp_path / "o", *args, "--trim-vocab", text))
    same_generation(tmp_path / "whole", tmp_path / "o")
    plans = [json.loads((tmp_path / n / "plan.json").read_text()) for n in ("whole", "o")]
    assert plans[1]["cuts"][:-1] == plans[0]["cuts"] and "renumbered" not in plans[0]


@pytest.mark.parametrize("target", ["onnx", "pt2"])
def test_a_graph_speaks_with_them_too(llama: Path, text: Path, tmp_path: Path, target: str) -> None:
    out = tmp_path / "o"
    args = ("--to", target, "--trim-vocab", text, "--role", "ffn=0.25")
    ran(surgeon("prune", llama, "-o", out, *args))
    ran(surgeon("prune", llama, "-o", tmp_path / "p", *args[2:], "--no-verify"))
    model, tokenizer = loaded(tmp_path / "p")
    assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    ids = prompts(tokenizer)[0]
    if target == "onnx":
        from surgeon import runtime

        graph = runtime.open(out, device="cpu")
        found = graph.logits(np.array([ids]))
        settings = json.loads((out / "genai_config.json").read_text())["model"]
        assert settings["vocab_size"] == len(tokenizer)
        assert settings["eos_token_id"] == model.generation_config.eos_token_id
    else:
        run = torch.export.load(out / "model.pt2").module()
        given = torch.tensor([ids])
        found = run(given, torch.ones_like(given), torch.arange(len(ids))[None]).detach().numpy()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits.numpy()
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()
    if target == "onnx":
        ran(surgeon("verify", out))


def test_an_exported_result(llama: Path, text: Path, tmp_path: Path) -> None:
    ran(surgeon("prune", llama, "-o", tmp_path / "o", "--trim-vocab", text, "--no-verify"))
    ran(surgeon("export", tmp_path / "o", "--to", "onnx", "-o", tmp_path / "onnx"))
    shown = ran(surgeon("generate", tmp_path / "onnx", "You may", "--max-new-tokens", "3"))
    assert shown.out


def test_rounds_lose_it_at_the_end(llama: Path, text: Path) -> None:
    recipe = {
        "version": 1,
        "budget": {"roles": {"ffn": 0.25}},
        "schedule": {"rounds": 2},
        "vocabulary": {"corpus": [str(text)], "always": "Surgeon"},
        "passes": [{"score": "magnitude"}, {"select": "uniform"}],
    }
    pruned = api.prune(llama, recipe=recipe, verify=False)
    assert {c.axis.rpartition("/")[2] for c in pruned.plan.cuts} == {"ffn", "vocab"}
    assert [step["pass"] for step in pruned.report.recipe][-2:] == ["round", "vocabulary"]


# --- again ---------------------------------------------------------------------------------------


def test_a_run_is_repeated_by_its_recipe_and_its_plan(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    args = ("--trim-vocab", text, "--vocab-keep", "330", "--vocab-always", "Surgeon")
    ran(surgeon("prune", llama, "-o", tmp_path / "o", *args, "--no-verify"))
    recipe = tmp_path / "again.yaml"
    recipe.write_text(ran(surgeon("recipe", tmp_path / "o")).out)
    ran(surgeon("run", recipe, llama, "-o", tmp_path / "run", "--no-verify"))
    replay = ("--plan", tmp_path / "o", "--no-verify")
    ran(surgeon("prune", llama, "-o", tmp_path / "plan", *replay))
    for name in ("run", "plan"):
        for file in ("model.safetensors", "config.json", "tokenizer.json", "token_map.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "o" / file).read_bytes()
    found = json.loads((tmp_path / "plan" / "surgeon.json").read_text())["vocabulary"]
    assert found["after"] <= 330 and "coverage" not in found
    first = json.loads((tmp_path / "o" / "surgeon.json").read_text())["vocabulary"]
    assert first["coverage"] < 1 and first["exact"] is False
    per = first["tokens_per_character"]
    assert per["after"] > per["before"]
    refused(
        surgeon("prune", llama, "-o", tmp_path / "x", "--plan", tmp_path / "o", *args[:2]),
        "bad-option",
        "--trim-vocab would make another one",
    )


def test_a_smaller_vocabulary_is_made_smaller_still(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    whole = ("--trim-vocab", text, "--no-verify")
    ran(surgeon("prune", llama, "-o", tmp_path / "one", *whole))
    args = (*whole, "--vocab-coverage", "0.9")
    ran(surgeon("prune", tmp_path / "one", "-o", tmp_path / "two", *args))
    one, two = (loaded(tmp_path / name)[1] for name in ("one", "two"))
    assert len(two) < len(one)
    assert two.decode(two("You may not use")["input_ids"]) == one.decode(
        one("You may not use")["input_ids"]
    )
    ran(surgeon("prune", tmp_path / "one", "-o", tmp_path / "same", *whole))
    notes = json.loads((tmp_path / "same" / "surgeon.json").read_text())["notes"]
    assert "the corpus needs every token: the vocabulary stays" in notes


# --- refusals ------------------------------------------------------------------------------------


def test_what_can_not_be_trimmed_is_refused(llama: Path, text: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    whole = checkpoint(tmp_path / "words", models.tiny("Llama"), models.tokenizer())
    bare = checkpoint(tmp_path / "bare", models.tiny("Llama"))
    out = ("-o", tmp_path / "o", "--trim-vocab")

    def no(model: Path, code: str, why: str, *args: object) -> None:
        refused(surgeon("prune", model, *out, *args), code, why)
        assert not (tmp_path / "o").exists()

    no(llama, "bad-text-input", "the corpus is empty", empty)
    no(llama, "missing-file", "nowhere.txt", tmp_path / "nowhere.txt")
    no(llama, "bad-option", "3 tokens are to stay", text, "--vocab-keep", 3)
    no(llama, "bad-recipe", "only one can hold", text, "--vocab-keep", 9, "--vocab-coverage", 0.5)
    no(llama, "bad-recipe", "vocabulary.coverage", text, "--vocab-coverage", 2)
    no(whole, "bad-option", "WordLevel", text)
    no(bare, "bad-option", "no tokenizer beside the model", text)
    refused(
        surgeon("prune", llama, "-o", tmp_path / "o", "--vocab-keep", 400),
        "bad-recipe",
        "vocabulary.corpus",
    )


def test_a_module_and_a_plan_that_does_not_say_so_are_refused(llama: Path, text: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    with pytest.raises(SurgeonError, match="no tokenizer"):
        api.prune(net, example_inputs=(torch.zeros(1, 4),), vocabulary={"corpus": text})
    plan = api.prune(llama, vocabulary={"corpus": text}, verify=False).plan
    with pytest.raises(SurgeonError) as caught:
        api.prune(llama, plan=api.Plan(plan.cuts))
    assert caught.value.code is Code.PINNED


def test_ids_that_a_model_also_computes_with_stay(llama: Path, text: Path) -> None:
    class Odd(torch.nn.Module):
        """Reads whether a token is the seventh, by its number."""

        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(ids) * (ids == 7)[..., None].float())

    odd = api.open_model(Odd(), example_inputs=(torch.zeros(1, 3, dtype=torch.long),))
    from surgeon.axes.plan import check
    from surgeon.vocabulary.trim import plan_of

    with pytest.raises(SurgeonError, match=r"aten\.eq\.Scalar, which would see the new numbers"):
        check(odd.axes, plan_of(odd.axes, range(20)))
