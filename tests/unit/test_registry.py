"""The built-in passes enter by the same door: they are what any installed plug-in is."""

from __future__ import annotations

import pytest

from surgeon import registry
from surgeon.errors import Code, SurgeonError
from surgeon.plugin import KINDS


def test_kinds_are_complete_and_names_sorted():
    found = registry.available()
    assert list(found) == list(KINDS)
    assert all(list(passes) == sorted(passes) for passes in found.values())


def test_built_in_passes_are_well_formed_and_documented():
    for kind, passes in registry.available().items():
        for name, info in passes.items():
            if info.plugin != "builtin":
                continue
            assert info.summary, name
            cls = registry.load(kind, name)
            assert issubclass(cls, KINDS[kind])
            assert [option.name for option in registry.options(cls) if not option.doc] == []


def test_unknown_kind_is_refused():
    with pytest.raises(SurgeonError) as caught:
        registry.find("select ", "uniform")
    assert caught.value.code is Code.NO_SUCH_PASS
    assert "select" in caught.value.try_
