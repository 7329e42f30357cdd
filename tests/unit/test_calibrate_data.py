"""Windows of calibration data from texts, lines, ids and mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgeon.calibrate.data import Piece, Recipe, draw
from surgeon.errors import Code, SurgeonError

IDS = list(range(100))


def refused(code: Code, *pieces: Piece, tokenizer: Any = None, **options: Any) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        draw(Recipe(pieces, **options), tokenizer, vocab=1000)
    assert caught.value.code is code and caught.value.try_
    return caught.value


def test_windows_are_runs_of_the_source_and_a_seed_draws_the_same() -> None:
    recipe = Recipe((Piece(IDS),), samples=20, length=7, seed=3)
    one, two = draw(recipe, None).ids, draw(recipe, None).ids
    assert one.shape == (20, 7) and np.array_equal(one, two)
    assert np.array_equal(one, one[:, :1] + np.arange(7))
    other = draw(Recipe((Piece(IDS),), samples=20, length=7, seed=4), None).ids
    assert not np.array_equal(one, other)
    assert len(set(one[:, 0].tolist())) > 10


def test_the_last_window_can_be_drawn() -> None:
    found = draw(Recipe((Piece(IDS[:8]),), samples=50, length=7), None).ids
    assert set(found[:, 0].tolist()) == {0, 1}


def test_sources_are_mixed_by_weight() -> None:
    pieces = (Piece(IDS, 3.0), Piece([i + 500 for i in IDS], 1.0))
    found = draw(Recipe(pieces, samples=10, length=4), None).ids
    assert (found[:, 0] < 500).sum() == 8  # 7.5 and 2.5: the first remainder is the first source's


def test_texts_and_lines_of_json(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("one\n\ntwo")
    lines.write_text('{"text": "one"}\n\n"two"\n')
    options: dict[str, Any] = {"samples": 5, "length": 4}
    one, two = (draw(Recipe((Piece(p),), **options), tiny_tokenizer).ids for p in (text, lines))
    assert np.array_equal(one, two)


def test_token_ids_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ids.npy"
    np.save(path, np.arange(40, dtype=np.int32).reshape(4, 10))
    found = draw(Recipe((Piece(path),), samples=3, length=5), None)
    assert found.ids.dtype == np.int64 and found.origin == {str(path): (3, 40)}


def test_bad_sources(tmp_path: Path, tiny_tokenizer: Any) -> None:
    missing = refused(Code.MISSING_FILE, Piece(tmp_path / "none.txt"), tokenizer=tiny_tokenizer)
    assert "none.txt" in missing.at
    short = tmp_path / "short.txt"
    short.write_text("abc")
    assert "512" in refused(Code.BAD_TEXT_INPUT, Piece(short), tokenizer=tiny_tokenizer).why
    short.write_text("")
    assert "empty" in refused(Code.BAD_TEXT_INPUT, Piece(short), tokenizer=tiny_tokenizer).what
    short.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(Code.BAD_TEXT_INPUT, Piece(short), tokenizer=tiny_tokenizer).what
    lines = tmp_path / "l.jsonl"
    lines.write_text(json.dumps({"body": "x"}) + "\n")
    error = refused(Code.BAD_TEXT_INPUT, Piece(lines), tokenizer=tiny_tokenizer)
    assert error.at.endswith("l.jsonl:1") and "body" in error.why
    lines.write_text('{"text": "x"}\nno json\n')
    error = refused(Code.BAD_TEXT_INPUT, Piece(lines), tokenizer=tiny_tokenizer)
    assert error.at.endswith("l.jsonl:2")
    refused(Code.MISSING_FILE, Piece(short))  # there is no tokenizer
    floats = tmp_path / "f.npy"
    np.save(floats, np.zeros(600))
    assert "float64" in refused(Code.BAD_TEXT_INPUT, Piece(floats)).why


def test_without_a_source_there_is_a_text_of_last_resort_and_a_warning(tiny_tokenizer: Any) -> None:
    notes: list[str] = []
    found = draw(Recipe((), 3, 50, 1), tiny_tokenizer, notes=notes)
    assert found.ids.shape == (3, 50)
    ((name, (windows, tokens)),) = found.origin.items()
    assert name == "built-in text" and windows == 3 and tokens > 100_000
    (said,) = notes
    assert "no calibration data" in said and "--calibration" in said
    named: list[str] = []
    draw(Recipe((Piece(IDS),), 3, 50), None, notes=named)
    assert named == []
    refused(Code.MISSING_FILE)  # it is a text, and there is no tokenizer


def test_ids_of_another_model_and_numbers_that_mean_nothing() -> None:
    assert "2000" in refused(Code.BAD_TEXT_INPUT, Piece([2000] * 600)).why
    for options in ({"samples": 0}, {"length": 1}):
        refused(Code.BAD_OPTION, Piece(IDS), **options)
    refused(Code.BAD_OPTION, Piece(IDS, float("nan")))


def test_a_data_set_needs_its_package(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    error = refused(Code.MISSING_EXTRA, Piece("datasets:wikitext"), tokenizer=tiny_tokenizer)
    assert "pip install datasets" in error.try_
