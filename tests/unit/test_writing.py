"""Measures of repetition and garbage, on texts short enough to count by hand."""

from __future__ import annotations

import pytest

from surgeon.report.writing import Writing, broken, distinct, loop, mean, measure, words


def test_distinct_is_the_share_of_different_runs():
    assert distinct("abab", 1) == 2 / 4
    assert distinct("abab", 2) == 2 / 3  # ab, ba, ab
    assert distinct("abc", 4) is None


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3, 4, 5, 6], 0),
        ([7, 1, 1, 1], 3 / 4),
        ([1, 1], 0),  # twice is no loop
        ([9, 8, 1, 2, 1, 2, 1, 2, 1], 7 / 9),  # the last copy is cut off
        ([1, 2, 3, 1, 2, 3, 1, 2], 0),  # not three times yet
        ([1, 2, 3, 1, 2, 3, 1, 2, 3, 4], 9 / 10),
        ([5, 5, 5, 0, 1, 2, 1, 2, 1, 2], 6 / 10),  # the longest one counts, not their sum
        ([4] * 10, 1),
    ],
)
def test_a_loop_is_one_unit_three_times_in_a_row(tokens, share):
    assert loop(tokens) == pytest.approx(share)


def test_no_text_has_no_measures():
    assert loop([]) is None
    assert measure("", [], frozenset()) == Writing(None, None, None, None, None, None)


def test_broken_characters_are_those_that_no_text_has():
    assert broken("zażółć\n\t東京 🙂") == 0
    assert broken("ab\ufffd\x00") == 2 / 4
    assert broken("\ue000\x1b") == 1  # private, and control


def test_unknown_words_are_in_no_known_text():
    known = words(["The cat sat.", "It's 3 o'clock"])
    assert known == {"the", "cat", "sat", "it", "s", "o", "clock"}
    assert measure("THE cat xqz 77 qqq!", [], known).unknown == 2 / 4
    assert measure("77 !?", [], known).unknown is None


def test_all_measures_of_one_text():
    found = measure("a b a b.", [1, 2, 3, 4, 1, 2, 3, 4], frozenset("a"))
    assert found.distinct_1 == 3 / 5 and found.distinct_2 == 3 / 4  # ab ba ab b.
    assert found.repetition == pytest.approx(1 - 4 / 5)
    assert (found.loop, found.broken, found.unknown) == (0, 0, 2 / 4)


def test_means_leave_out_what_is_missing():
    one, other = Writing(1, 1, None, 0, 0, 0), Writing(0, None, None, 1, 0, 1)
    assert mean([one, other]) == Writing(0.5, 1, None, 0.5, 0, 0.5)
