"""Tasks of lm-eval: the adapter against sums by hand, and a whole task without a network."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from surgeon.errors import Code, SurgeonError
from surgeon.report import lm_eval as tasks
from surgeon.runtime import Decoder
from surgeon.runtime.generate import generate
from tests import decoders, models
from tests.command import checkpoint, surgeon

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `dev` brings it)")
HOME = Path(__file__).parents[1] / "tasks"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tasks, in the folder that their data is looked for in, and caches of their own."""
    import datasets

    out = Path(shutil.copytree(HOME, tmp_path / "tasks"))
    monkeypatch.chdir(out)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return out


def asked(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def log_p(model: Any, ids: list[int], start: int) -> tuple[float, bool]:
    """The log-likelihood of the ids from `start` on, and whether each is the likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    total, greedy = 0.0, True
    for place in range(start, len(ids)):
        row = logits[place - 1].tolist()
        total += row[ids[place]] - math.log(sum(map(math.exp, row)))
        greedy = greedy and row.index(max(row)) == ids[place]
    return total, greedy


def encoded(text: str) -> list[int]:
    return models.tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_log_likelihoods_are_sums_over_the_continuation():
    model, tokenizer = models.tiny("Llama"), models.tokenizer()
    lm = tasks.adapter(model, tokenizer)
    first = generate(model, tokenizer, "x", max_new_tokens=1)  # what is greedy after <s>x
    pairs = [("The sky is", " blue"), ("The sky is", " b"), ("The sky", " is"), ("", "alone")]
    found = lm.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, rest), (value, greedy) in zip(pairs, found, strict=True):
        before = encoded(context) or [tokenizer.bos_token_id]
        wanted = log_p(model, before + encoded(rest), len(before))
        assert value == pytest.approx(wanted[0], rel=1e-5) and greedy == wanted[1]
    (likeliest,) = lm.loglikelihood([asked("<s>x", first.text)], disable_tqdm=True)
    assert isinstance(likeliest[1], bool)


def test_the_likeliest_continuation_is_known_as_such():
    logits = np.log(np.array([[[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]]]))
    assert tasks.likelihood(logits[:, :2], [1, 0]) == (pytest.approx(math.log(0.9 * 0.8)), True)
    assert tasks.likelihood(logits[:, :2], [1]) == (pytest.approx(math.log(0.2)), False)


def test_a_context_that_is_too_long_loses_its_beginning():
    model = models.tiny("Llama")  # 64 positions
    lm = tasks.adapter(model, models.tokenizer())
    text = "".join(chr(65 + i % 50) for i in range(90))
    (found,) = lm.loglikelihood([asked(text, "zz")], disable_tqdm=True)
    ids = encoded(text + "zz")[-65:]
    with torch.no_grad():
        rows = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    wanted = sum(float(rows[place - 1, ids[place]]) for place in (63, 64))
    assert found[0] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(SurgeonError) as caught:
        lm.loglikelihood([asked("a", text)], disable_tqdm=True)
    assert caught.value.code is Code.BAD_TEXT_INPUT


def test_a_rolling_likelihood_predicts_every_token_once():
    model, tokenizer = models.tiny("Llama"), models.tokenizer()
    lm = tasks.adapter(model, tokenizer)
    short, long = "A short text.", "".join(chr(65 + i % 50) for i in range(70))
    found = lm.loglikelihood_rolling([asked(short), asked(long)], disable_tqdm=True)
    ids = [tokenizer.bos_token_id, *encoded(short)]
    assert found[0] == pytest.approx(log_p(model, ids, 1)[0], rel=1e-5)
    # 64 tokens after <s>, then the other 6 with as much before them as there is room for.
    ids = [tokenizer.bos_token_id, *encoded(long)]
    whole, rest = ids[:65], ids[-65:]
    with torch.no_grad():
        one, two = (model(torch.tensor([x[:-1]])).logits[0].log_softmax(-1) for x in (whole, rest))
    wanted = sum(float(one[n, whole[n + 1]]) for n in range(64))
    wanted += sum(float(two[n, rest[n + 1]]) for n in range(58, 64))
    assert found[1] == pytest.approx(wanted, rel=1e-5)


def test_writing_ends_before_what_ends_it():
    model, tokenizer = models.tiny("Llama"), models.tokenizer()
    lm = tasks.adapter(model, tokenizer)
    whole = generate(model, tokenizer, "Hello", max_new_tokens=12).text
    assert len(whole) == 12
    given = [
        {"until": [], "max_gen_toks": 12},
        {"until": [whole[4:6], "never"], "max_gen_toks": 12},
        {"until": whole[0], "max_gen_toks": 12},
        {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": False},
    ]
    found = lm.generate_until([asked("Hello", options) for options in given], disable_tqdm=True)
    assert found == [whole, whole[: whole.index(whole[4:6])], "", whole[:3]]
    with pytest.raises(SurgeonError) as caught:
        lm.generate_until([asked("Hello", {"until": [], "num_beams": 4})], disable_tqdm=True)
    assert caught.value.code is Code.BAD_OPTION and "num_beams" in caught.value.what


def test_a_graph_of_onnx_runtime_is_asked_the_same_way(tmp_path: Path):
    made = decoders.Tiny()
    model = Decoder(decoders.write(tmp_path / "m.onnx", made), device="cpu", threads=1)
    lm = tasks.adapter(model, models.tokenizer())
    (found,) = lm.loglikelihood([asked("The sky", " is")], disable_tqdm=True)
    ids = encoded("The sky is")
    rows = torch.from_numpy(made.logits(ids)).log_softmax(-1)
    assert found[0] == pytest.approx(sum(float(rows[n - 1, ids[n]]) for n in (7, 8, 9)), rel=1e-4)
    (text,) = lm.generate_until([asked("x", {"until": [], "max_gen_toks": 4})], disable_tqdm=True)
    wanted = made.greedy(models.tokenizer()("x")["input_ids"], 4)
    assert text == models.tokenizer().decode(wanted, skip_special_tokens=True)


def test_a_whole_task_runs_without_a_network(folder: Path):
    model, tokenizer = models.tiny("Llama"), models.tokenizer()
    found = tasks.run_tasks(
        model, tokenizer, tasks.find_tasks(["colours", "colours_written"], folder)
    )
    right = 0
    for line in (folder / "colours.jsonl").read_text().splitlines():
        doc = json.loads(line)
        ids = encoded(doc["question"])
        scores = [log_p(model, ids + encoded(f" {c}"), len(ids))[0] for c in doc["choices"]]
        right += int(np.argmax(scores)) == doc["answer"]
    assert found["colours"]["acc"] == right / 4
    assert "acc_stderr" in found["colours"] and "acc_norm" in found["colours"]
    assert found["colours_written"]["exact_match"] == 0


@pytest.mark.slow
def test_the_command_shows_what_lm_eval_found(folder: Path, tmp_path: Path):
    model = checkpoint(tmp_path / "m", models.tiny("Llama"), models.tokenizer())
    args = ("--window", 32, "--windows", 1, "--tasks", "colours", "--tasks-path", folder)
    found = surgeon("eval", model, *args, "--limit", 2, "--json")
    assert found.code == 0, found.err
    data = json.loads(found.out)["models"][0]["tasks"]["colours"]
    assert data["acc"] in (0, 0.5, 1)
    assert "colours, acc" in surgeon("eval", model, *args).out


def test_a_folder_that_is_none_and_lm_eval_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(SurgeonError) as caught:
        tasks.find_tasks(["colours"], tmp_path / "none")
    assert caught.value.code is Code.MISSING_FILE
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(SurgeonError) as caught:
        tasks.find_tasks(["colours"])
    assert caught.value.code is Code.MISSING_EXTRA
    assert "model-surgeon[lm-eval]" in caught.value.try_


def test_data_that_can_not_be_had_is_said(folder: Path):
    (folder / "colours.jsonl").unlink()
    with pytest.raises(SurgeonError) as caught:
        tasks.run_tasks(
            models.tiny("Llama"), models.tokenizer(), tasks.find_tasks(["colours"], folder)
        )
    assert caught.value.code is Code.RUNTIME_FAILED and "colours" in caught.value.at
