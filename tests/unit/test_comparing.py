"""Evaluations of tiny models: every figure against one worked out in another way."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgeon
from surgeon import comparing, ready
from surgeon.errors import Code, SurgeonError
from surgeon.report import comparison_table as t
from surgeon.report.comparison import Evaluation, Settings
from surgeon.report.comparison_page import comparison_page
from surgeon.report.evaluate import Text
from surgeon.runtime import bench
from tests import golden, models
from tests.command import checkpoint

pytestmark = pytest.mark.slow

LETTERS = Text("letters", "".join(chr(32 + (7 * i * i + i) % 95) for i in range(400)))
WORDS = Text("words", "the sun is a star and the earth is a stone " * 5)
WINDOW = 32
SMALL: dict[str, Any] = {
    "window": WINDOW,
    "windows": 3,
    "agreement_windows": 2,
    "texts": (LETTERS, WORDS),
    "prompts": ("The sun", "1 | 2"),
    "new_tokens": 6,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama, and the same with other values and half of an MLP at zero."""
    folder = tmp_path_factory.mktemp("compared")
    other = models.build("Llama", seed=1)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.zero_()
    tokenizer = models.tokenizer()
    return (
        checkpoint(folder / "dense", models.tiny("Llama"), tokenizer),
        checkpoint(folder / "<i>other", other, tokenizer),
    )


@pytest.fixture(scope="module")
def loaded(folders: tuple[Path, Path]) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    found = [AutoModelForCausalLM.from_pretrained(f).eval() for f in folders]
    return found[0], found[1]


@pytest.fixture(scope="module")
def found(folders: tuple[Path, Path]) -> Evaluation:
    return comparing.compare([str(f) for f in folders], **SMALL)


def windows(text: Text) -> torch.Tensor:
    ids = models.tokenizer()(text.content, add_special_tokens=False)["input_ids"]
    count = min(3, len(ids) // WINDOW)
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)


# --- figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("number", [0, 1])
def test_perplexity_is_that_of_the_model_s_own_loss(
    found: Evaluation, loaded: tuple[Any, Any], place: int, number: int
):
    ids = windows((LETTERS, WORDS)[number])
    with torch.no_grad():
        losses = [loaded[place](row[None], labels=row[None]).loss.item() for row in ids]
    scored = found.models[place].texts[number]
    assert scored.text == (LETTERS, WORDS)[number].name and scored.found is not None
    assert scored.found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert scored.found.windows == len(ids)


@pytest.mark.parametrize("number", [0, 1])
def test_agreement_is_that_of_both_models_logits_on_the_first_windows(
    found: Evaluation, loaded: tuple[Any, Any], number: int
):
    ids = windows((LETTERS, WORDS)[number])[:2]
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].double().softmax(-1) for model in loaded)
    kl = float((p * (p / q).log()).sum(-1).mean())
    top1 = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    agreement = found.models[1].texts[number].agreement
    assert agreement is not None and agreement.tokens == 2 * (WINDOW - 1)
    assert agreement.kl == pytest.approx(kl, rel=1e-4) and kl > 0.01
    assert agreement.top1 == pytest.approx(top1)
    assert found.models[0].texts[number].agreement is None


def test_what_a_model_is(found: Evaluation, folders: tuple[Path, Path], loaded: tuple[Any, Any]):
    facts = found.models[1].facts
    assert (facts.kind, facts.architecture) == ("checkpoint", "LlamaForCausalLM")
    assert facts.parameters == sum(p.numel() for p in loaded[1].parameters())
    assert facts.disk_bytes == (folders[1] / "model.safetensors").stat().st_size
    zeros = loaded[1].model.layers[0].mlp.down_proj.weight.numel()
    maps = {id(m.weight): m.weight for m in loaded[1].modules() if isinstance(m, torch.nn.Linear)}
    assert facts.sparsity == pytest.approx(zeros / sum(w.numel() for w in maps.values()))
    config = loaded[1].config
    heads, width = config.num_key_value_heads, config.head_dim
    assert facts.cache_bytes == 2 * config.num_hidden_layers * heads * width * 4
    assert found.compression(1, "parameters") == 1


def test_what_it_writes_is_its_own_greedy_text(found: Evaluation, loaded: tuple[Any, Any]):
    tokenizer = models.tokenizer()
    for place, model in enumerate(loaded):
        for written in found.models[place].written:
            ids = torch.tensor([tokenizer(written.prompt)["input_ids"]])
            start = ids.shape[1]
            for _ in range(written.tokens):
                with torch.no_grad():
                    ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
            assert written.text == tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    assert [w.prompt for w in found.models[0].written] == ["The sun", "1 | 2"]


def test_the_reference_may_be_any_of_them(folders: tuple[Path, Path], found: Evaluation):
    names = [str(f) for f in folders]
    turned = comparing.compare(
        names, against=names[1], **{**SMALL, "prompts": (), "texts": (LETTERS,)}
    )
    assert turned.reference.name == names[1] and [m.name for m in turned.models] == names
    assert turned.models[1].texts[0].agreement is None
    ours, theirs = turned.models[0].texts[0].agreement, found.models[1].texts[0].agreement
    assert ours is not None and theirs is not None
    assert ours.top1 == theirs.top1 and ours.kl != theirs.kl


def test_models_in_memory_are_evaluated_too():
    model = models.tiny("Llama")
    one = surgeon.evaluate(
        model, tokenizer=models.tokenizer(), **{**SMALL, "speed": True, "prompts": ()}
    )
    assert one.models[0].texts[0].found is not None and one.speed is None
    assert "in memory" in one.models[0].facts.unknown["disk_bytes"]
    assert "in memory" in one.to_json()["models"][0]["unknown"]["speed"]


# --- what can't be compared ----------------------------------------------------------------------


def test_other_vocabularies_are_not_compared(tmp_path: Path, folders: tuple[Path, Path]):
    trimmed = models.build("Llama", vocab_size=100)
    few = models.build("Llama", vocab_size=50)
    names = [
        str(folders[0]),
        str(checkpoint(tmp_path / "a", trimmed, models.tokenizer())),
        str(checkpoint(tmp_path / "b", few, models.tokenizer())),
    ]
    found = comparing.compare(names, **{**SMALL, "prompts": (), "texts": (LETTERS,)})
    first, second = (model.texts[0] for model in found.models[1:])
    assert first.found is not None and first.agreement is None
    assert "100 tokens" in first.why and "can't be compared" in first.why
    assert second.found is None and "no row for" in second.why
    assert any("perplexity on letters" in line for line in t.unknown(found))
    scored = found.to_json()["models"][2]["texts"][0]
    assert scored["perplexity"] is None and scored["why"] == second.why


def test_other_tokens_of_the_same_text_are_not_compared(tmp_path: Path, folders: tuple[Path, Path]):
    class Backwards:
        """A tokenizer that gives the same ids in another order."""

        def __init__(self) -> None:
            self.own = models.tokenizer()

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": self.own(text, **options)["input_ids"][::-1]}

    bare = checkpoint(tmp_path / "bare", models.tiny("Llama"))
    found = comparing.compare(
        [str(folders[0]), str(bare)],
        tokenizer=Backwards(),
        **{**SMALL, "prompts": (), "texts": (LETTERS,)},
    )
    scored = found.models[1].texts[0]
    assert scored.found is not None and scored.agreement is None and "tokenizer" in scored.why


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"windows": 0}, Code.BAD_OPTION),
        ({"agreement_windows": -1}, Code.BAD_OPTION),
        ({"window": 1}, Code.BAD_OPTION),
        ({"window": 65}, Code.BAD_OPTION),
        ({"against": "nobody"}, Code.BAD_OPTION),
        ({"texts": (Path("nowhere.txt"),)}, Code.MISSING_FILE),
        ({"texts": (Text("short", "abc"),)}, Code.BAD_TEXT_INPUT),
        ({"prompts": (" ",)}, Code.BAD_TEXT_INPUT),
    ],
)
def test_mistakes_are_refused(folders: tuple[Path, Path], options: Any, code: Code):
    with pytest.raises(SurgeonError) as caught:
        comparing.compare([str(f) for f in folders], **{**SMALL, **options})
    assert caught.value.code is code


def test_one_model_is_no_comparison(folders: tuple[Path, Path]):
    with pytest.raises(SurgeonError) as caught:
        comparing.compare([str(folders[0])])
    assert "surgeon eval" in caught.value.try_


def test_what_cannot_be_analysed_still_runs(
    folders: tuple[Path, Path], found: Evaluation, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> Any:
        raise SurgeonError(Code.CAPTURE_FAILED, "no graph", at="", why="", try_="")

    monkeypatch.setattr(ready, "open_model", refuse)
    one = comparing.evaluate(str(folders[0]), **{**SMALL, "prompts": ()})
    assert one.models[0].texts[0].found is not None
    assert one.models[0].texts[0].found.perplexity == pytest.approx(
        found.models[0].texts[0].found.perplexity
    )
    facts = one.models[0].facts
    assert facts.flops is None and "no graph" in facts.unknown["flops"] and facts.memory_bytes


# --- forms ---------------------------------------------------------------------------------------


def timed(found: Evaluation) -> Evaluation:
    """The same with times that nobody measured."""
    from dataclasses import replace

    fakes = tuple(
        bench.Measured(m.name, "Transformers", "cpu", "", (1.0,), (1.0,), None, 10.0 * n, 4.0 * n)
        for n, m in enumerate(found.models, 1)
    )
    settings = replace(found.settings, speed=True)
    return replace(found, settings=settings, speed=bench.Comparison(bench.Settings(), fakes))


def shape(data: Any) -> Any:
    """Returns the names in JSON data, with the types of what they stand for."""
    if isinstance(data, dict):
        return {key: shape(value) for key, value in data.items()}
    if isinstance(data, list):
        return [shape(data[-1])] if data else []
    return type(data).__name__


def test_the_json_has_the_documented_fields(found: Evaluation):
    data = json.loads(json.dumps(timed(found).to_json(), allow_nan=False))
    golden.compare("evaluation.json", json.dumps(shape(data), indent=1) + "\n")
    document = Path(__file__).parents[2] / "docs" / "evaluation.md"
    named = set(re.findall(r"`(\w+)`", document.read_text()))
    fields = set(re.findall(r'"(\w+)":', json.dumps(data["models"][1] | data)))
    assert not fields - named - set(data["versions"]) - set(data["settings"])


def test_figures_without_end_are_null(found: Evaluation):
    from dataclasses import replace

    model = found.models[0]
    scored = replace(model.texts[0], found=replace(model.texts[0].found, perplexity=math.inf))
    data = replace(found, models=(replace(model, texts=(scored,)),)).to_json()
    assert (
        json.loads(json.dumps(data, allow_nan=False))["models"][0]["texts"][0]["perplexity"] is None
    )


def test_speeds_are_relative_to_the_reference(found: Evaluation):
    from dataclasses import replace

    own = timed(found)
    assert own.speed_up(1, "prefill") == 2 and own.speed_up(0, "decode") == 1
    assert replace(own, against=1).speed_up(0, "decode") == 0.5


def test_the_page_is_one_file_that_asks_for_nothing(found: Evaluation):
    page = comparison_page(timed(found))
    assert not re.search(r"""(src|href)\s*=|url\(|@import|<script|https?://""", page)
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page
    assert "&lt;i&gt;other" in page and "<i>" not in page
    assert "letters" in page and "The sun" in page


def test_markdown_has_every_table_and_survives_bars(found: Evaluation):
    text = t.markdown(timed(found))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
    assert cells == {3, 4}  # two models beside each other, with labels or without
    for part in ("## Size", "## Perplexity", "## Speed", "## Side by side", r"1 \| 2", "×2.00"):
        assert part in text


def test_the_terminal_is_not_obeyed_by_what_a_model_writes():
    assert t.visible("a\x1b[2J\n\u200b") == "a\\x1b[2J\n\\x200b"


def test_names_are_short_where_that_says_enough(found: Evaluation):
    from dataclasses import replace

    assert t.columns(found)[0] == "dense"
    same = tuple(replace(m, name=f"{n}/out") for n, m in enumerate(found.models))
    assert t.columns(replace(found, models=same)) == ("0/out", "1/out")


def test_settings_have_the_protocol_s_windows():
    assert (Settings().window, Settings().windows) == (1024, 48)
