"""A pass of a package that Surgeon has never heard of is found like a built-in one."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import uuid

import pytest

from surgeon import registry
from surgeon.errors import Code, SurgeonError
from surgeon.plugin import ScorePass
from tests.plugin.conftest import LOUD


@pytest.fixture(autouse=True)
def forget_modules():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.split("_")[0] in ("acme", "other"):
            del sys.modules[name]


def refusal(call, *args) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        call(*args)
    text = str(caught.value)
    assert all(f"\n  {part} " in text for part in ("at ", "why", "try"))
    return caught.value


def test_listing_reads_files_and_imports_nothing(acme):
    info = registry.available()["score"]["loud_one"]
    assert (info.plugin, info.kind, info.module) == ("acme", "score", "acme_passes.score.loud_one")
    assert info.summary == "Scores every index by how loud it is."
    assert info.path.is_file()
    assert "acme_probe" not in sys.modules and "acme_passes" not in sys.modules
    assert "_shared" not in registry.available()["score"]


def test_a_file_that_changed_is_read_anew(acme):
    path = registry.available()["score"]["loud_one"].path
    path.write_text('"""Scores by silence."""\n')
    assert registry.available()["score"]["loud_one"].summary == "Scores by silence."


def test_listing_needs_no_framework(acme):
    code = (
        f"import sys; sys.path.insert(0, {str(acme)!r})\n"
        "from surgeon import registry\n"
        "assert 'loud_one' in registry.available()['score']\n"
        "heavy = {'torch', 'transformers', 'pydantic', 'passes'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", ["loud_one", "loud-one"])
def test_load(acme, name):
    cls = registry.load("score", name)
    assert cls.__name__ == "Loud" and issubclass(cls, ScorePass)
    assert "acme_probe" in sys.modules


def test_options_carry_type_default_and_documentation(acme):
    power, norm, tags, top = registry.options(registry.load("score", "loud_one"))
    assert (power.name, power.type, power.required) == ("power", float, True)
    assert power.doc == "The exponent.\n\nLarger is louder."
    assert (norm.default, norm.type_text, norm.doc) == ("l2", "'l1' | 'l2'", "")
    assert (tags.default, tags.doc, tags.required) == ([], "Free words.", False)
    assert (top.default, top.type_text) == (None, "int | None")


def test_build_converts_and_freezes(acme):
    made = registry.build("score", "loud-one", {"power": "2", "keep-top": "3"})
    assert (made.power, made.keep_top, made.norm) == (2.0, 3, "l2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.power = 1.0


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"powr": 1}, "did you mean power"),
        ({}, "no default"),
        ({"power": "much"}, "'much'"),
        ({"power": 1, "norm": "l3"}, "'l3'"),
        ({"power": 1, "keep-top": 1, "keep_top": 2}, "given twice"),
        ({"power": 13}, "13 is unlucky"),
    ],
)
def test_a_bad_option_is_refused(acme, values, says):
    error = refusal(registry.build, "score", "loud_one", values)
    assert error.code is Code.BAD_OPTION
    assert says in str(error)


def test_an_unknown_pass_names_the_nearest(acme):
    error = refusal(registry.load, "score", "loud_two")
    assert error.code is Code.NO_SUCH_PASS
    assert "did you mean loud_one" in error.try_
    assert "loud_one" in error.data["known"]
    assert "did you mean score" in refusal(registry.load, "scores", "loud_one").try_


def test_two_plugins_with_one_name_are_both_named(acme, install):
    other = install("other", {"score/loud_one.py": "1"})
    error = refusal(registry.available)
    assert error.code is Code.BAD_PASS
    assert "'acme'" in error.why and "'other'" in error.why
    assert str(acme) in error.at and str(other) in error.at


def test_the_same_package_seen_twice_is_one(acme, tmp_path, monkeypatch):
    again = tmp_path / "again" / "renamed-2.0.dist-info"
    again.mkdir(parents=True)
    (again / "METADATA").write_text("Metadata-Version: 2.1\nName: renamed\nVersion: 2.0\n")
    (again / "entry_points.txt").write_text("[surgeon.plugins]\nacme = acme_passes\n")
    monkeypatch.syspath_prepend(again.parent)
    assert "loud_one" in registry.available()["score"]


def test_a_missing_package_is_named(install):
    site = install("other", {})
    error = refusal(registry.available)
    assert error.code is Code.MISSING_FILE and "other_passes" in error.what
    assert site.is_dir()


def test_a_file_that_does_not_parse_is_named_with_its_line(install):
    install("other", {"select/broken.py": "def broken(:\n"})
    error = refusal(registry.available)
    assert error.code is Code.BAD_PASS
    assert error.at.endswith("broken.py:1") and "invalid syntax" in error.why


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("", "found: none"),
        (LOUD.replace("import acme_probe", "") + "\nclass Second(Loud): pass\n", "Loud, Second"),
        (LOUD.replace("import acme_probe", "").replace("@dataclass(frozen=True)", ""), "frozen"),
        (LOUD.replace("import acme_probe", "").replace("frozen=True", ""), "frozen"),
        (LOUD.replace("import acme_probe", "").replace("def score", "def other"), "define score"),
        (LOUD.replace("acme_probe", "acme_absent"), "'acme_absent'"),
    ],
)
def test_a_malformed_pass_is_refused_when_loaded(install, source, says):
    name = f"odd_{uuid.uuid4().hex}"
    install("other", {f"score/{name}.py": source})
    assert name in registry.available()["score"]
    error = refusal(registry.load, "score", name)
    assert error.code is (Code.MISSING_EXTRA if "absent" in says else Code.BAD_PASS)
    assert says in str(error)
