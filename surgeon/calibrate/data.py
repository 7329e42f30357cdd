"""Calibration data: texts, lines of JSON, data sets and token ids to windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.calibrate.text import BUILT_IN, built_in, warning
from surgeon.errors import Code, SurgeonError

SAMPLES = 64
LENGTH = 512
DATASETS = "datasets:"
"""What the name of a data set begins with: `datasets:name[:config][@split]`."""

TEXT = "text"
"""The field of a line or row that holds its text."""

_BETWEEN = "\n\n"
"""What stands between two lines' or rows' texts."""


@dataclass(frozen=True)
class Piece:
    """One source of calibration data: a file, a data set, or token ids.

    Attributes:
        source: a path (`.txt` or any text, `.jsonl`, `.npy` with token ids), the name of a data
            set, or token ids themselves.
        weight: share of the windows, relative to the other sources.
    """

    source: str | Path | Sequence[int] | NDArray[np.integer[Any]]
    weight: float = 1.0

    @property
    def name(self) -> str:
        """What a report calls it."""
        return str(self.source) if isinstance(self.source, str | Path) else "token ids"


@dataclass(frozen=True)
class Recipe:
    """Which windows are drawn.

    Attributes:
        pieces: the sources; the windows are shared among them by weight.
        samples: windows.
        length: tokens in a window.
        seed: of the generator that draws the windows' starts.
    """

    pieces: tuple[Piece, ...]
    samples: int = SAMPLES
    length: int = LENGTH
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses numbers that mean nothing."""
        for name, value, least in (("samples", self.samples, 1), ("length", self.length, 2)):
            if value < least:
                raise _bad(f"--{name}", f"{value} is too few", f"{least} or more")
        for piece in self.pieces:
            if not (np.isfinite(piece.weight) and piece.weight > 0):
                raise _bad("--calibration", f"the weight {piece.weight} is no share", "above 0")


@dataclass(frozen=True)
class Windows:
    """What a model is calibrated on.

    Attributes:
        ids: token ids, int64 [samples, length].
        origin: by source, how many windows came from it and how many tokens it has.
    """

    ids: NDArray[np.int64]
    origin: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])


@dataclass(frozen=True)
class Places:
    """Where windows lie in their texts, so that any number of them takes no more than the texts.

    Attributes:
        texts: token ids by source.
        starts: by source, where its windows begin.
        length: tokens in a window.
        origin: by source, how many windows came from it and how many tokens it has.
    """

    texts: tuple[NDArray[np.int64], ...]
    starts: tuple[NDArray[np.int64], ...]
    length: int
    origin: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    def __len__(self) -> int:
        return sum(len(found) for found in self.starts)

    def window(self, number: int) -> NDArray[np.int64]:
        """Returns one window's token ids, [length]; windows stand in the order of their sources."""
        for ids, starts in zip(self.texts, self.starts, strict=True):
            if number < len(starts):
                return ids[starts[number] : starts[number] + self.length]
            number -= len(starts)
        raise IndexError(number)

    @classmethod
    def of(cls, windows: Windows) -> Places:
        """Returns the places of windows that were drawn before."""
        samples, length = windows.ids.shape
        starts = np.arange(samples, dtype=np.int64) * length
        return cls((windows.ids.reshape(-1),), (starts,), length, windows.origin)


def draw(
    recipe: Recipe,
    tokenizer: Any,
    *,
    vocab: int | None = None,
    notes: list[str] | None = None,
) -> Windows:
    """Returns the windows whose places are drawn; see `places`."""
    found = places(recipe, tokenizer, vocab=vocab, notes=notes)
    return Windows(np.stack([found.window(i) for i in range(len(found))]), found.origin)


def places(
    recipe: Recipe,
    tokenizer: Any,
    *,
    vocab: int | None = None,
    notes: list[str] | None = None,
) -> Places:
    """Returns where windows lie whose starts are drawn uniformly, the same for the same seed.

    A recipe without sources gets the text of last resort, and the user a warning.

    Every source is tokenised as one string with no special tokens added. Windows may overlap.

    Args:
        recipe: sources, numbers and seed.
        tokenizer: the model's own; only needed where a source is text.
        vocab: size of the model's vocabulary, to check token ids against.
        notes: gets what there is to say to the user.

    Raises:
        SurgeonError: a source that can't be read, is shorter than a window, or has token ids
            beyond the vocabulary.
    """
    if not recipe.pieces:
        recipe = replace(recipe, pieces=(Piece(BUILT_IN),))
        if notes is not None:
            notes.append(warning())
    generator = np.random.default_rng(recipe.seed)
    texts: list[NDArray[np.int64]] = []
    starts: list[NDArray[np.int64]] = []
    origin: dict[str, tuple[int, int]] = {}
    for piece, count in zip(recipe.pieces, _shares(recipe), strict=True):
        ids = _tokens(piece, tokenizer)
        _check(piece, ids, recipe.length, vocab)
        texts.append(ids)
        starts.append(generator.integers(0, len(ids) - recipe.length + 1, size=count))
        before = origin.get(piece.name, (0, 0))[0]
        origin[piece.name] = (before + count, len(ids))
    return Places(tuple(texts), tuple(starts), recipe.length, origin)


def _shares(recipe: Recipe) -> list[int]:
    """Returns how many windows come from each source: by weight, the remainder by its size."""
    total = sum(piece.weight for piece in recipe.pieces)
    exact = [recipe.samples * piece.weight / total for piece in recipe.pieces]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: recipe.samples - sum(counts)]:
        counts[i] += 1
    return counts


# --- sources -------------------------------------------------------------------------------------


def _tokens(piece: Piece, tokenizer: Any) -> NDArray[np.int64]:
    source = piece.source
    if not isinstance(source, str | Path):
        return np.asarray(source, dtype=np.int64).reshape(-1)
    if str(source).endswith(".npy"):
        return _stored(Path(source))
    if tokenizer is None:
        raise SurgeonError(
            Code.MISSING_FILE,
            "there is no tokenizer for the calibration text",
            at=piece.name,
            why="a text can't be turned into token ids without one",
            try_="a model with a tokenizer beside it, or token ids in a .npy file",
        )
    text = _BETWEEN.join(texts(str(source)))
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)


def texts(source: str) -> Iterator[str]:
    """Yields the texts of a source: of a file, of the lines of a .jsonl, of a data set's rows.

    Raises:
        SurgeonError: why it can't be read.
    """
    if source == BUILT_IN:
        yield built_in().content
        return
    if source.startswith(DATASETS):
        yield from _rows(source)
        return
    path = Path(source)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SurgeonError(
            Code.MISSING_FILE,
            f"the calibration data '{source}' can't be read",
            at=source,
            why=error.strerror or str(error),
            try_=f"the path of a text file, or {DATASETS}NAME for a data set",
        ) from error
    except UnicodeDecodeError as error:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            f"'{path.name}' is not UTF-8 text",
            at=f"{source}, byte {error.start}",
            why=error.reason,
            try_="convert the file to UTF-8",
        ) from error
    if path.suffix not in (".jsonl", ".ndjson"):
        yield content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield _field(line, f"{source}:{number}")


def _field(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            "a line is no JSON",
            at=where,
            why=str(error),
            try_="one JSON object a line",
        ) from error
    text = row if isinstance(row, str) else row.get(TEXT) if isinstance(row, dict) else None
    if not isinstance(text, str):
        held = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            f"a line has no field '{TEXT}'",
            at=where,
            why=f"it holds {held}",
            try_=f'lines such as {{"{TEXT}": "…"}}',
        )
    return text


def _rows(source: str) -> Iterator[str]:
    try:
        import datasets  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise SurgeonError(
            Code.MISSING_EXTRA,
            "reading a data set needs the package 'datasets'",
            at=source,
            why="it is not installed",
            try_="pip install datasets, or give a text file",
        ) from error
    name, _, split = source.removeprefix(DATASETS).partition("@")
    path, _, config = name.partition(":")
    try:
        rows: Any = datasets.load_dataset(path, config or None, split=split or "train")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    except Exception as error:  # the package raises what its many sources raise
        raise SurgeonError(
            Code.MISSING_FILE,
            f"the data set '{path}' can't be read",
            at=source,
            why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            try_=f"{DATASETS}name:config@split, or a text file",
        ) from error
    if TEXT not in rows.column_names:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            f"the data set has no column '{TEXT}'",
            at=source,
            why=f"its columns are {', '.join(rows.column_names)}",
            try_="write its texts to a file, one JSON object a line",
        )
    for row in rows:
        yield row[TEXT]


def _stored(path: Path) -> NDArray[np.int64]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SurgeonError(
            Code.MISSING_FILE if isinstance(error, OSError) else Code.BAD_TEXT_INPUT,
            f"the token ids '{path}' can't be read",
            at=str(path),
            why=str(error),
            try_="a .npy file of integers, as numpy.save writes it",
        ) from error
    if found.dtype.kind not in "iu":
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            f"'{path.name}' holds no token ids",
            at=str(path),
            why=f"its element type is {found.dtype}",
            try_="an array of integers",
        )
    return found.astype(np.int64).reshape(-1)


def _check(piece: Piece, ids: NDArray[np.int64], length: int, vocab: int | None) -> None:
    if len(ids) < length:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            "the calibration data is shorter than one window" if len(ids) else "it is empty",
            at=piece.name,
            why=f"it has {len(ids):,} tokens, and a window has {length:,}",
            try_=f"a longer text, or --length {max(2, len(ids) // 2)}",
            data={"tokens": len(ids), "length": length},
        )
    if vocab is not None and (ids.min() < 0 or ids.max() >= vocab):
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            "the token ids are not this model's",
            at=piece.name,
            why=f"they go from {ids.min()} to {ids.max()}, and the vocabulary has {vocab:,} tokens",
            try_="ids that the model's own tokenizer made, or the text itself",
        )


def _bad(where: str, what: str, try_: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        what,
        at=where,
        why="calibration needs windows of tokens",
        try_=try_,
    )
