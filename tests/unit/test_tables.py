from __future__ import annotations

import io

import pytest
from rich.console import Console

from surgeon.report.tables import Row, Unit, before_after, markdown, text


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (134_515_008, Unit.COUNT, "134,515,008"),
        (538_090_408, Unit.BYTES, "513.2 MiB"),
        (12, Unit.BYTES, "12 B"),
        (0.01234, Unit.SECONDS, "12.3 ms"),
        (75.0, Unit.SECONDS, "75.0 s"),
        (0.2, Unit.SHARE, "20.0 %"),
        (24.3371, Unit.NUMBER, "24.34"),
        (14_000.4, Unit.NUMBER, "14,000"),
        (1.23e-5, Unit.DIFFERENCE, "1.2e-05"),
        (None, Unit.COUNT, "–"),
        ("fp32", Unit.COUNT, "fp32"),
    ],
)
def test_text(value, unit, shown):
    assert text(value, unit) == shown


def test_change_is_relative_to_before():
    assert Row("", 200, 160, Unit.COUNT).change == "−20.0 %"
    assert Row("", 24.0, 36.0).change == "+50.0 %"
    assert Row("", None, 3).change == Row("", 0, 3).change == Row("", "a", "b").change == ""


def test_tables_hold_every_cell():
    rows = [Row("decoder parameters", 1000, 800, Unit.COUNT), Row("a|b", "x", "y")]
    stream = io.StringIO()
    Console(file=stream, width=100).print(before_after(rows, title="Result"))
    shown = stream.getvalue()
    assert all(
        word in shown for word in ("Result", "decoder parameters", "1,000", "800", "−20.0 %")
    )
    assert markdown(rows) == (
        "| | before | after | change |\n"
        "|---|---:|---:|---:|\n"
        "| decoder parameters | 1,000 | 800 | −20.0 % |\n"
        "| a\\|b | x | y |  |\n"
    )
