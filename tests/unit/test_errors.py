"""The error type itself, and what the command makes of it."""

from __future__ import annotations

import pickle

import pytest

from surgeon.errors import Code, SurgeonError, near
from tests.command import surgeon


def an_error() -> SurgeonError:
    return SurgeonError(
        Code.NO_OP_RULE,
        "no axis rule for aten.roll.default",
        at="model.layers.3.mixer",
        why="without a rule its axes cannot be coupled",
        try_="add surgeon/ops/roll.py",
        data={"op": "aten.roll.default"},
    )


def test_an_error_prints_its_four_parts() -> None:
    assert str(an_error()) == (
        "[no-op-rule] no axis rule for aten.roll.default\n"
        "  at  model.layers.3.mixer\n"
        "  why without a rule its axes cannot be coupled\n"
        "  try add surgeon/ops/roll.py"
    )


def test_no_part_can_be_left_out() -> None:
    with pytest.raises(TypeError):
        SurgeonError(Code.NO_OP_RULE, "what", at="at", why="why")  # type: ignore[call-arg]


def test_an_error_crosses_processes() -> None:
    error = an_error()
    back = pickle.loads(pickle.dumps(error))
    assert str(back) == str(error) and back.code is Code.NO_OP_RULE and back.data == error.data


def test_codes_are_lower_case_words_and_differ() -> None:
    values = [code.value for code in Code]
    assert len(set(values)) == len(values)
    assert all(v == v.lower() and v.replace("-", "").isalpha() for v in values)


def test_near_names_come_first_and_otherwise_all() -> None:
    known = ["magnitude", "random", "wanda"]
    assert near("magnitud", known) == "did you mean magnitude?"
    assert near("xyz", known) == "one of: magnitude, random, wanda"


def test_the_command_prints_an_error_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise an_error()

    monkeypatch.setattr("surgeon.pipeline.open_model", refuse)
    found = surgeon("ir", "model")
    assert (found.code, found.out, found.err) == (1, "", f"{an_error()}\n")


def test_what_is_no_users_mistake_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("surgeon.pipeline.open_model", fail)
    with pytest.raises(ZeroDivisionError, match="a defect"):
        surgeon("ir", "model")


def test_an_interruption_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("surgeon.pipeline.open_model", interrupt)
    found = surgeon("ir", "model")
    assert found.code == 130 and found.err == "interrupted; nothing half-written is left\n"
