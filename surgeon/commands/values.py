"""From the text of options to values."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import Code, SurgeonError, near

if TYPE_CHECKING:
    from surgeon.packing import Measuring


def number(text: str, where: str) -> float:
    """Returns what a number or a fraction says; `where` is the option, for the refusal."""
    try:
        return float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError) as error:
        raise SurgeonError(
            Code.BAD_RATIO,
            f"{text!r} is no number",
            at=where,
            why="a ratio is a number or a fraction",
            try_="such as 0.25 or 1/3",
        ) from error


def pairs(items: list[str], option: str) -> dict[str, str]:
    """Returns the values of NAME=VALUE by name."""
    out: dict[str, str] = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not sign or not name:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{item!r} is not NAME=VALUE",
                at=option,
                why="the option sets one thing at a time",
                try_=f"{option} ffn=0.25" if option == "--role" else f"{option} p=1",
            )
        if name in out:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{name} is given twice",
                at=option,
                why="only one value can hold",
                try_="leave one of them out",
            )
        out[name] = value
    return out


def numbers(items: list[str] | None, option: str) -> dict[str, float]:
    """Returns the numbers or fractions of NAME=NUMBER by name."""
    found = pairs(items or [], option)
    return {name: number(value, f"{option} {name}") for name, value in found.items()}


def whole_numbers(items: list[str] | None, option: str) -> dict[str, int]:
    """Returns the whole numbers of NAME=NUMBER by name."""
    out: dict[str, int] = {}
    for name, value in pairs(items or [], option).items():
        if not value.isdecimal():
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{value!r} is no whole number",
                at=f"{option} {name}",
                why="indices are counted",
                try_=f"{option} {name}=64",
            )
        out[name] = int(value)
    return out


def one_of(value: str | None, known: tuple[str, ...], option: str) -> str | None:
    """Returns a word that is one of those known; hyphens and underscores are the same."""
    word = None if value is None else value.replace("-", "_")
    if word is not None and word not in known:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"there is no {value!r}",
            at=option,
            why=f"it is one of {', '.join(known)}",
            try_=near(word, known),
        )
    return word


def options(items: list[str], option: str) -> dict[str, Any]:
    """Returns the values of NAME=VALUE by name, read as YAML."""
    import yaml

    out: dict[str, Any] = {}
    for name, value in pairs(items, option).items():
        try:
            out[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{value!r} can't be read",
                at=f"{option} {name}",
                why=f"it is no YAML: {getattr(error, 'problem', None) or error}",
                try_="a value as YAML writes it: 2, 0.5, true, mean, [1, 2]",
            ) from error
    return out


def calibration(sources: list[str], samples: int, length: int, seed: int) -> Any:
    """Returns the recipe of calibration data, or None where no source is named."""
    from surgeon.calibrate.data import Piece, Recipe

    pieces: list[Piece] = []
    for source in sources:
        name, sign, weight = source.rpartition("=")
        try:
            pieces.append(Piece(name, float(weight)) if sign else Piece(source))
        except ValueError:
            pieces.append(Piece(source))  # the name itself has an equals sign
    return Recipe(tuple(pieces), samples, length, seed) if pieces else None


def calibration_keys(
    sources: list[str] | None,
    samples: int | None,
    length: int | None,
    statistics: Path | None = None,
) -> dict[str, Any]:
    """Returns what these options say in place of a recipe's calibration; None says nothing.

    Raises:
        SurgeonError: `bad-option` for numbers that mean nothing.
    """
    from surgeon.recipes.changes import calibration_of, two_sources

    if sources and statistics is not None:
        raise two_sources()
    data = calibration(sources or [], 1, 2, 0)
    named = calibration_of(data)["sources"] if data is not None else None
    for option, number, least in (("--samples", samples, 1), ("--length", length, 2)):
        if number is not None and number < least:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{number} is too few",
                at=option,
                why="calibration needs windows of tokens",
                try_=f"{least} or more",
            )
    stored = None if statistics is None else str(statistics)
    return {"sources": named, "samples": samples, "length": length, "statistics": stored}


def quantize_keys(scheme: str | None, given: list[str] | None) -> dict[str, Any]:
    """Returns what these options say in place of a recipe's `quantize`; empty says nothing."""
    found = options(given or [], "--quantize-option")
    return found if scheme is None else {**found, "scheme": scheme}


def measuring(text: Path | None, windows: int, window: int) -> Measuring | None:
    """Returns the text that steps are scored on, known to be one; None without it.

    Raises:
        SurgeonError: `missing-file` or `bad-text-input`.
    """
    if text is None:
        return None
    from surgeon.packing import Measuring
    from surgeon.report.evaluate import read_text

    read_text(text)
    return Measuring(text, windows, window)
