"""Perplexity on fixed windows of a text, the same way for every kind of model."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.logits import logits_of, positions_of, vocabulary_of

if TYPE_CHECKING:
    from surgeon.calibrate.parallel import World

_ROWS = 128
"""Positions scored at a time: a log-softmax of a whole window is as large as all its logits."""


@dataclass(frozen=True)
class Text:
    """A text and what to call it in a report."""

    name: str
    content: str


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, with what it was measured on."""

    perplexity: float
    windows: int
    """Windows scored; fewer than asked for where the text is short."""
    window: int
    """Tokens in a window."""
    tokens: int
    """Tokens predicted: all but the first of every window."""
    seconds: float
    text: str
    """The text's name."""


@dataclass(frozen=True)
class Windows:
    """The token ids that a text is scored on.

    Attributes:
        text: the text's name.
        ids: one row a window, [count, window].
    """

    text: str
    ids: NDArray[np.int64]

    def same(self, other: Windows) -> bool:
        """Whether both hold the same tokens, so that predictions on them can be compared."""
        return np.array_equal(self.ids, other.ids)


OnWindow = Callable[[int, Any], None]
"""Takes the number of a window and its logits [1, window, vocab]."""


def default_text() -> Text:
    """Returns a text that every machine has: the help topics inside CPython, sorted by name."""
    from pydoc_data.topics import topics

    content = "\n\n".join(topics[name] for name in sorted(topics))
    return Text(f"pydoc_data.topics of CPython {platform.python_version()}", content)


def read_text(path: str | Path) -> Text:
    """Returns the text of a UTF-8 file, under the file's name.

    Raises:
        SurgeonError: no such file, or its bytes are not UTF-8.
    """
    path = Path(path)
    try:
        return Text(path.name, path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SurgeonError(
            Code.MISSING_FILE,
            f"the text '{path}' can't be read",
            at=str(path),
            why=error.strerror or str(error),
            try_="give the path of a text file, or leave it out for the built-in text",
        ) from error
    except UnicodeDecodeError as error:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            f"'{path.name}' is not UTF-8 text",
            at=f"{path}, byte {error.start}",
            why=error.reason,
            try_="convert the file to UTF-8",
        ) from error


def perplexity(
    model: Any,
    tokenizer: Any,
    *,
    text: Text | str | None = None,
    window: int = 1024,
    max_windows: int = 48,
    max_chars: int = 700_000,
    progress: bool = False,
) -> Perplexity:
    """Returns the perplexity over non-overlapping windows from the start of the text.

    The text is tokenised as one string with no special tokens added. Each window is scored by
    itself, without a cache and without what came before it; what is left of the text is left out.

    Args:
        model: anything that `logits_of` takes: a Transformers model, an `OrtSession`, a graph
            module, or a function from token ids [1, window] to logits [1, window, vocab].
        tokenizer: the model's own tokenizer, or the token ids themselves in place of any text.
        text: the text; `default_text()` without it.
        window: tokens in a window, at least 2.
        max_windows: windows scored at most.
        max_chars: characters of the text used at most.
        progress: show a bar on standard error.

    Raises:
        SurgeonError: a text shorter than one window, a window longer than the model's positions,
            token ids beyond the vocabulary, logits of a wrong shape or that are not finite.
    """
    found = windows_of(
        tokenizer,
        text,
        window=window,
        max_windows=max_windows,
        max_chars=max_chars,
        positions=positions_of(model),
    )
    return score(model, found, progress=progress)


def windows_of(
    tokenizer: Any,
    text: Text | str | None = None,
    *,
    window: int = 1024,
    max_windows: int = 48,
    max_chars: int = 700_000,
    positions: int | None = None,
) -> Windows:
    """Returns the windows that `perplexity` scores; its arguments are those.

    Args:
        tokenizer: the model's own tokenizer, or the token ids themselves in place of any text.
        text: the text; `default_text()` without it.
        window: tokens in a window, at least 2.
        max_windows: windows at most.
        max_chars: characters of the text used at most.
        positions: how many positions the model was made for, where that is known.

    Raises:
        SurgeonError: a text shorter than one window, or a window longer than the positions.
    """
    for name, value, least in (("window", window, 2), ("max_windows", max_windows, 1)):
        if value < least:
            raise _bad_option(name, value, f"it has to be {least} or more")
    if positions is not None and window > positions:
        raise _bad_option("window", window, f"the model was made for {positions} positions")
    name, ids = _tokenise(tokenizer, text, max_chars)
    count = min(max_windows, len(ids) // window)
    if count == 0:
        raise SurgeonError(
            Code.BAD_TEXT_INPUT,
            f"the text has {len(ids)} tokens, fewer than one window of {window}",
            at=name,
            why="a window that isn't full would be scored with less context than the others",
            try_=f"a longer text, or window={max(2, len(ids))} or less",
            data={"tokens": len(ids), "window": window},
        )
    return Windows(name, ids[: count * window].reshape(count, window))


def score(
    model: Any,
    windows: Windows,
    *,
    progress: bool = False,
    on_window: OnWindow | None = None,
    world: World | None = None,
) -> Perplexity:
    """Returns the perplexity over windows, each scored by itself and without a cache.

    Args:
        model: anything that `logits_of` takes.
        windows: what to score it on.
        progress: show a bar on standard error.
        on_window: called with the logits of every window after it was scored.
        world: processes that share the windows; all of them return the same, bit for bit, but
            the seconds, which are this one's. `on_window` hears of its own windows.

    Raises:
        SurgeonError: as `perplexity`.
    """
    run = logits_of(model)
    vocab = vocabulary_of(model)
    if vocab is not None:  # looking up a row that isn't there ends in an error of the library's
        _check_ids(windows.ids, vocab)
    count, window = windows.ids.shape
    first, size = (0, 1) if world is None else (world.rank, world.size)
    losses: dict[int, float] = {}
    seconds = 0.0
    fault: SurgeonError | None = None
    for index, ids in enumerate(_bar(windows.ids[first::size, None], progress)):
        start = time.perf_counter()
        place = first + index * size
        try:
            logits = run(ids)
            losses[place] = _negative_log_likelihood(logits, ids)
        except SurgeonError as error:
            fault = error  # the others wait for this process's numbers
            break
        seconds += time.perf_counter() - start
        if on_window is not None:
            on_window(place, logits)
    if world is not None:
        world.agree(fault)
        losses = dict(enumerate(world.each(losses, count)))
    elif fault is not None:
        raise fault
    total = math.fsum(losses.values())
    tokens = count * (window - 1)
    mean = total / tokens
    # exp overflows at 709.8: no finite double is that bad.
    value = math.exp(mean) if mean < 709 else math.inf
    return Perplexity(value, count, window, tokens, seconds, windows.text)


def _tokenise(
    tokenizer: Any, text: Text | str | None, max_chars: int
) -> tuple[str, NDArray[np.int64]]:
    """Returns the text's name and its token ids."""
    if tokenizer is None:
        raise SurgeonError(
            Code.MISSING_FILE,
            "there is no tokenizer for this model",
            at="perplexity",
            why="a text can't be turned into token ids without one",
            try_="put the tokenizer's files beside the model, or name a folder that has them",
        )
    if isinstance(tokenizer, (np.ndarray, Sequence)):
        return "token ids", np.asarray(tokenizer, dtype=np.int64).reshape(-1)
    if text is None:
        text = default_text()
    elif isinstance(text, str):
        text = Text("text", text)
    # Not verbose: the tokenizer warns that the whole text is longer than the model's context.
    encoded = tokenizer(text.content[:max_chars], add_special_tokens=False, verbose=False)
    return text.name, np.asarray(encoded["input_ids"], dtype=np.int64)


def _negative_log_likelihood(logits: Any, ids: NDArray[np.int64]) -> float:
    """Returns the sum over the predicted tokens of one window, in nats.

    Args:
        logits: [1, window, vocab], NumPy or torch, of any floating dtype.
        ids: [1, window].
    """
    import torch

    scores = torch.as_tensor(logits)
    if scores.ndim != 3 or scores.shape[:2] != ids.shape:
        raise _bad_logits(
            f"shape {list(scores.shape)} for token ids {list(ids.shape)}",
            "one row of logits is needed for every token of the window",
        )
    _check_ids(ids, scores.shape[2])
    labels = torch.from_numpy(ids[0, 1:]).to(scores.device)
    total = 0.0
    for first in range(0, labels.shape[0], _ROWS):
        rows = scores[0, first : min(first + _ROWS, labels.shape[0])].float()
        wanted = labels[first : first + _ROWS]
        loss = torch.nn.functional.cross_entropy(rows, wanted, reduction="none")
        total += float(loss.double().sum())
    if not math.isfinite(total):
        raise _bad_logits(
            f"not finite: the loss of a window is {total}",
            "an overflow in the model, or weights that are not numbers",
        )
    return total


def _check_ids(ids: NDArray[np.int64], vocab: int) -> None:
    """Refuses token ids that a model has no row for."""
    if int(ids.max()) >= vocab or int(ids.min()) < 0:
        raise _bad_logits(
            f"{vocab} of them for token id {int(ids.max())}",
            "the tokenizer gives ids that the model has no row for",
        )


def _bar(windows: NDArray[np.int64], progress: bool) -> Iterable[NDArray[np.int64]]:
    if not progress:
        return windows
    from rich.console import Console
    from rich.progress import track

    return track(windows, "perplexity", console=Console(stderr=True), transient=True)


def _bad_option(name: str, value: int, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        f"{name} can't be {value}",
        at=f"option {name}",
        why=why,
        try_="the protocol's 48 windows of 1,024 tokens, or a window that the model has room for",
        data={"option": name, "value": value},
    )


def _bad_logits(what: str, why: str) -> SurgeonError:
    return SurgeonError(
        Code.RUNTIME_FAILED,
        f"the model's logits can't be scored: {what}",
        at="perplexity",
        why=why,
        try_="check that model and tokenizer belong together; run in fp32 if it was half precision",
    )
