"""The text of last resort, where the user gives none: one that every machine has."""

from __future__ import annotations

from surgeon.report.evaluate import Text, default_text

BUILT_IN = "built-in text"
"""What a source is called that nobody named."""


def built_in() -> Text:
    """Returns the help topics inside CPython: prose and code in English, some 700 kB."""
    return default_text()


def warning() -> str:
    """Returns what the user is told about it."""
    return (
        f"no calibration data was given, so {built_in().name} stands in: a model calibrated on text"
        " unlike what it will see loses more (and 'surgeon eval' without --text measures on this"
        " same text, which flatters the result); --calibration FILE names better"
    )
