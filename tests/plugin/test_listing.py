"""`surgeon passes`: every pass that is installed, its options, needs and references."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from surgeon import registry
from tests.command import surgeon
from tests.plugin.conftest import LOUD, Install
from tests.refusals import refused

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("acme_", "other_")):
            del sys.modules[name]


def listed(*args: str) -> list[dict[str, Any]]:
    found = surgeon("passes", *args, "--json")
    assert found.code == 0, found.err
    return json.loads(found.out)


def test_every_pass_says_what_it_is() -> None:
    found = listed()
    every = registry.available()
    assert [(p["kind"], p["name"]) for p in found] == [
        (kind, name) for kind, passes in every.items() for name in passes
    ]
    for one in found:
        assert one["summary"] and one["doc"].startswith(one["summary"])
        assert all(option["doc"] for option in one["options"]), one["name"]
        assert "fault" not in one and one["plugin"] == "builtin"


def test_options_needs_and_reference() -> None:
    (one,) = listed("score/magnitude")
    assert one["needs"] == ["weights"]
    p = one["options"][0]
    assert (p["name"], p["type"], p["default"], p["required"]) == (
        "p",
        "1 | 2 | 'max'",
        "max",
        False,
    )
    assert p["doc"].startswith("Which norm")
    assert one["reference"].startswith("Li et al., Pruning Filters")
    assert "massive activations" not in one["reference"]  # the next paragraph is none of it
    (one,) = listed("least-squares")
    assert (one["kind"], one["needs"]) == ("compensate", ["activations: sequential", "weights"])


def test_one_is_shown_whole() -> None:
    shown = surgeon("passes", "obs").out
    for text in ("score/obs, from builtin", "Optimal Brain Surgeon", "damping: float = 0.01"):
        assert text in shown
    assert "      Indices eliminated at a time" in shown


def test_those_of_others_are_listed_too(acme: Path) -> None:
    (one,) = listed("loud_one")
    assert (one["plugin"], one["needs"]) == ("acme", [])
    power, norm, tags, _ = one["options"]
    assert power["required"] and power["default"] is None
    assert (norm["default"], tags["doc"]) == ("l2", "Free words.")
    assert (
        "power: float (has to be given)\n      The exponent." in surgeon("passes", "loud_one").out
    )


def test_one_that_cannot_be_loaded_is_listed_with_the_reason(install: Install) -> None:
    install("other", {"score/needy.py": LOUD.replace("acme_probe", "acme_absent")})
    (one,) = listed("needy")
    assert (
        "'acme_absent'" in one["fault"]
        and one["summary"] == "Scores every index by how loud it is."
    )
    assert "can't be loaded" in surgeon("passes", "needy").out
    assert surgeon("passes").code == 0


def test_an_unknown_one_names_the_nearest() -> None:
    refused(surgeon("passes", "obss"), "no-such-pass", "did you mean obs")
    refused(surgeon("passes", "select/obs"), "no-such-pass")


def test_listing_needs_no_framework() -> None:
    code = (
        "import sys; sys.argv = ['surgeon', 'passes']\n"
        "from surgeon.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)
