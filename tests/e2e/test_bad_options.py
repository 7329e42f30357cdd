"""Ratios, roles and options of passes that mean nothing, and outputs that may not be written."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.command import surgeon
from tests.refusals import RATIO, prune, refused

pytestmark = pytest.mark.slow

# --- ratios and roles ----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1", "1.5", "nan", "inf", "-inf", "-1/3", "4/3"])
def test_a_ratio_is_between_0_and_1(llama: Path, tmp_path: Path, ratio: str) -> None:
    refused(prune(llama, tmp_path / "o", "--ratio", ratio), "bad-ratio", "at  --ratio\n")
    role = prune(llama, tmp_path / "o", "--role", f"ffn={ratio}")
    refused(role, "bad-ratio", "at  --role ffn\n")


@pytest.mark.parametrize("ratio", ["abc", "", "1/0", "1/3/4", "20%", "0,2"])
def test_a_ratio_is_a_number(llama: Path, tmp_path: Path, ratio: str) -> None:
    refused(prune(llama, tmp_path / "o", "--ratio", ratio), "bad-ratio", repr(ratio))
    refused(prune(llama, tmp_path / "o", "--role", f"ffn={ratio}"), "bad-ratio", repr(ratio))


@pytest.mark.parametrize("role", ["ffn", "=0.2", ""])
def test_a_role_comes_with_its_share(llama: Path, tmp_path: Path, role: str) -> None:
    refused(prune(llama, tmp_path / "o", "--role", role), "bad-option", "NAME=VALUE")


def test_a_role_comes_once(llama: Path, tmp_path: Path) -> None:
    found = prune(llama, tmp_path / "o", "--role", "ffn=0.1", "--role", "ffn=0.2")
    refused(found, "bad-option", "twice")


def test_something_must_say_how_much(llama: Path, tmp_path: Path) -> None:
    refused(prune(llama, tmp_path / "o"), "bad-ratio", "--ratio 0.2")


@pytest.mark.parametrize(
    "role", ["ffn=0.999", "kv_heads=0.9", "q_per_kv=0.8", "v=0.99", "qk=0.9", "hidden=0.999"]
)
def test_no_axis_is_emptied(llama: Path, tmp_path: Path, role: str) -> None:
    refused(prune(llama, tmp_path / "o", "--role", role), "empty-axis", role.partition("=")[0])


def test_a_layer_is_left(llama: Path, tmp_path: Path) -> None:
    refused(prune(llama, tmp_path / "o", "--role", "layers=0.9"), "empty-axis", "2 layers")


def test_a_ratio_beyond_every_limit_says_what_is_reachable(llama: Path, tmp_path: Path) -> None:
    found = refused(prune(llama, tmp_path / "o", "--ratio", "0.99"), "bad-ratio", "a ratio up to")
    reach = re.search(r"a ratio up to (0\.\d+)", found.err)
    assert reach is not None
    assert surgeon("prune", llama, "--dry-run", "--ratio", reach[1]).code == 0


def test_roles_beyond_the_ratio_are_refused(llama: Path, tmp_path: Path) -> None:
    args = ("--role", "kv_heads=1/3", "--ratio", "0.05")
    refused(prune(llama, tmp_path / "o", *args), "bad-ratio", "beyond")


def test_an_unknown_role_gets_those_there_are(llama: Path, tmp_path: Path) -> None:
    found = prune(llama, tmp_path / "o", "--role", "wings=0.1")
    refused(found, "no-such-role", "'wings'", "hidden, kv_heads, q_per_kv, rotary, v, ffn, layers")


def test_a_role_that_may_not_be_pruned_says_why(llama: Path, tmp_path: Path) -> None:
    found = prune(llama, tmp_path / "o", "--role", "vocab=0.1")
    refused(found, "pinned", "rows are picked by numbers")


def test_a_glob_without_a_match_is_refused(llama: Path, tmp_path: Path) -> None:
    for option in ("--freeze", "--only"):
        found = prune(llama, tmp_path / "o", *RATIO, option, "model.layers.7")
        refused(found, "no-such-axis", "'model.layers.7'")


def test_nothing_left_to_prune_is_refused(llama: Path, tmp_path: Path) -> None:
    refused(prune(llama, tmp_path / "o", *RATIO, "--freeze", "*"), "bad-ratio", "no role is left")
    found = prune(llama, tmp_path / "o", "--role", "ffn=0.2", "--only", "hidden")
    refused(found, "bad-option", "--only")


# --- passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name", "near"), [
    ("score", "magnitud", "magnitude"),
    ("score", "xyz", "magnitude, obs, random"),
    ("select", "unifrom", "uniform"),
])  # fmt: skip
def test_an_unknown_pass_gets_the_nearest(
    llama: Path, tmp_path: Path, kind: str, name: str, near: str
) -> None:
    found = prune(llama, tmp_path / "o", *RATIO, f"--{kind}", name)
    refused(found, "no-such-pass", repr(name), near)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("score", "q=1", "its options are p, normalise"),
        ("score", "p=3", "Input should be 1"),
        ("score", "p=[1", "YAML"),
        ("score", "p", "NAME=VALUE"),
        ("score", "normalise=half", "normalise"),
        ("select", "multiple_of=0", "multiple_of"),
        ("select", "multiple_of=-8", "multiple_of"),
        ("select", "multiple_of=x", "multiple_of"),
        ("select", "ffn_limit=.nan", "ffn_limit"),
        ("select", "ffn_limit=5", "ffn_limit"),
    ],
)
def test_an_option_that_a_pass_does_not_take(
    llama: Path, tmp_path: Path, option: str, value: str, text: str
) -> None:
    found = prune(llama, tmp_path / "o", *RATIO, f"--{option}-option", value)
    refused(found, "bad-option", text)


# --- outputs -------------------------------------------------------------------------------------


def test_somewhere_to_write_is_needed(llama: Path) -> None:
    refused(surgeon("prune", llama, *RATIO), "bad-output", "--dry-run")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_of_something_else_is_left_alone(
    llama: Path, tmp_path: Path, overwrite: list[str]
) -> None:
    mine = tmp_path / "o" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    refused(prune(llama, tmp_path / "o", *RATIO, *overwrite), "bad-output", "not empty")
    assert mine.read_text() == "mine"


def test_a_file_is_no_folder(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "o").write_text("mine")
    refused(prune(llama, tmp_path / "o", *RATIO, "--overwrite"), "bad-output", "it is a file")
    refused(prune(llama, tmp_path / "o" / "below", *RATIO), "bad-output", "is a file")
    assert (tmp_path / "o").read_text() == "mine"


def test_the_model_itself_is_not_overwritten(copy: Path) -> None:
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    refused(surgeon("prune", copy, "-o", copy, *RATIO, "--overwrite"), "bad-output")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_a_folder_that_may_not_be_written_to(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions don't stop root, so the answer is given in the system's place.
    monkeypatch.setattr("os.access", lambda *args, **kwargs: False)
    refused(prune(llama, tmp_path / "o", *RATIO), "bad-output", "can't be written to")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a pseudo file system")
def test_a_file_system_that_refuses(llama: Path) -> None:
    """It has no room either, which isn't what is wrong with it."""
    found = surgeon("prune", llama, "-o", "/proc/surgeon-test", *RATIO)
    refused(found, "bad-output", "/proc/surgeon-test", "can't write here")


def test_a_disk_without_room_is_seen_before_writing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    refused(prune(llama, tmp_path / "o", *RATIO), "disk-full", "make room")


def test_a_disk_that_fills_up_while_writing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("surgeon.emit.hf_writing.write_safetensors", full)
    refused(prune(llama, tmp_path / "o", *RATIO), "disk-full", "ran full")


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_an_export_refuses_its_output_before_working(llama: Path, tmp_path: Path, to: str) -> None:
    for path in (tmp_path, tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("mine")
        refused(surgeon("export", llama, "--to", to, "-o", path), "bad-output")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_demonstration_refuses_before_it_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(surgeon("demo", "-o", tmp_path / "o", "--ratio", "2"), "bad-ratio")
    refused(surgeon("demo", "-o", tmp_path / "file"), "bad-output")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
