"""What an evaluation of one model or several found, as plain data with a stable schema."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from surgeon.errors import Code, SurgeonError
from surgeon.report.agreement import Agreement
from surgeon.report.evaluate import Perplexity
from surgeon.report.facts import Facts
from surgeon.report.writing import Writing, mean

if TYPE_CHECKING:
    from surgeon.runtime.bench import Comparison as Speed

SCHEMA = "surgeon-evaluation"
VERSION = 1
"""Goes up when a field changes its meaning or goes; a new field leaves it as it is."""

PROMPTS = (
    "The heart is a muscle that",
    "Once upon a time, in a village by the sea, there lived",
    "To boil an egg, first",
    "The three largest planets of the solar system are",
)


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    window: int = 1024
    """Tokens in a window."""
    windows: int = 48
    """Windows of each text at most."""
    agreement_windows: int = 8
    """Windows of each text, the first ones, on which predictions are compared."""
    prompts: tuple[str, ...] = ()
    """What texts are written from; none without them."""
    new_tokens: int = 64
    """Tokens written after each prompt at most, the likeliest one every time."""
    speed: bool = False
    """Whether prefill and decoding are timed, all models in turns."""
    repeat: int = 5
    """Turns that are timed, of which the median."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval."""
    limit: int | None = None
    """Examples of each task at most."""

    def __post_init__(self) -> None:
        """Refuses settings under which something would be measured on nothing."""
        least = {"window": 2, "windows": 1, "agreement_windows": 0, "new_tokens": 1, "repeat": 1}
        if self.limit is not None:
            least["limit"] = 1
        for name, number in least.items():
            if getattr(self, name) < number:
                raise SurgeonError(
                    Code.BAD_OPTION,
                    f"{name} can't be {getattr(self, name)}",
                    at=f"option {name}",
                    why=f"it has to be {number} or more",
                    try_="leave it out",
                    data={"option": name},
                )


@dataclass(frozen=True)
class Scored:
    """A model on one text.

    Attributes:
        text: the text's name.
        found: None where it can't be scored.
        agreement: with the reference; None for the reference itself and where `why` says so.
        why: why something is missing.
    """

    text: str
    found: Perplexity | None
    agreement: Agreement | None = None
    why: str = ""


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt, and the measures of it."""

    prompt: str
    text: str
    tokens: int
    measures: Writing


@dataclass(frozen=True)
class Evaluated:
    """Everything measured of one model.

    Attributes:
        name: as the user named it.
        facts: what it is.
        device: where it ran, and why there.
        texts: one for each text, in their order.
        written: one for each prompt, in their order.
        tasks: by task and metric, as lm-eval gives them.
    """

    name: str
    facts: Facts
    device: str
    texts: tuple[Scored, ...] = ()
    written: tuple[Written, ...] = ()
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])


@dataclass(frozen=True)
class Evaluation:
    """One model, or several compared with one of them.

    Attributes:
        settings: what was measured.
        models: in the order in which they were named.
        against: which of them the others are compared with.
        speed: of the same models in the same order, where it was measured; relative to the first
            of them.
        why_no_speed: why it wasn't, where it was asked for.
        known_words: how many words count as known in what was written.
        versions: of what it was measured with.
    """

    settings: Settings
    models: tuple[Evaluated, ...]
    against: int = 0
    speed: Speed | None = None
    why_no_speed: str = ""
    known_words: int = 0
    versions: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def reference(self) -> Evaluated:
        """The model that the others are compared with."""
        return self.models[self.against]

    def compression(self, index: int, figure: str) -> float | None:
        """Returns how many times as large the reference is.

        Args:
            index: which model.
            figure: `parameters`, `disk_bytes` or `memory_bytes`.
        """
        whole, own = (getattr(m.facts, figure) for m in (self.reference, self.models[index]))
        return whole / own if whole is not None and own else None

    def speed_up(self, index: int, figure: str) -> float | None:
        """Returns how many times as fast as the reference a model is.

        Args:
            index: which model.
            figure: `prefill` or `decode`.
        """
        if self.speed is None:
            return None
        own, whole = (getattr(self.speed.models[i], figure) for i in (index, self.against))
        return own / whole if whole else None

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data; `docs/evaluation.md` says what each field is."""
        return _finite(
            {
                "schema": SCHEMA,
                "version": VERSION,
                "against": self.reference.name if len(self.models) > 1 else None,
                "settings": asdict(self.settings),
                "known_words": self.known_words,
                "models": [self._model(i) for i in range(len(self.models))],
                "versions": dict(self.versions),
            }
        )

    def _model(self, index: int) -> dict[str, Any]:
        model = self.models[index]
        facts = asdict(model.facts)
        unknown = facts.pop("unknown")
        if self.settings.speed and self.speed is None:
            unknown = {**unknown, "speed": self.why_no_speed}
        return {
            "model": model.name,
            "device": model.device,
            **facts,
            "compression": {
                name: self.compression(index, name)
                for name in ("parameters", "disk_bytes", "memory_bytes")
            },
            "texts": [_scored(text) for text in model.texts],
            "speed": self._speed(index),
            "writing": asdict(mean(w.measures for w in model.written)) if model.written else None,
            "written": [asdict(written) for written in model.written],
            "tasks": {name: dict(found) for name, found in model.tasks.items()},
            "unknown": unknown,
        }

    def _speed(self, index: int) -> dict[str, Any] | None:
        if self.speed is None:
            return None
        own = self.speed.models[index]
        return {
            "run_by": own.kind,
            "device": own.device,
            "prompt_tokens": self.speed.settings.prompt_tokens,
            "new_tokens": self.speed.settings.new_tokens,
            "batch": self.speed.settings.batch,
            "prefill_seconds": list(own.prefill_seconds),
            "decode_seconds": list(own.decode_seconds),
            "prefill_tokens_per_second": own.prefill,
            "decode_tokens_per_second": own.decode,
            "prefill_speed_up": self.speed_up(index, "prefill"),
            "decode_speed_up": self.speed_up(index, "decode"),
            "peak_bytes": own.peak_bytes,
        }


def _scored(text: Scored) -> dict[str, Any]:
    found = text.found
    return {
        "text": text.text,
        "perplexity": None if found is None else found.perplexity,
        "windows": None if found is None else found.windows,
        "window": None if found is None else found.window,
        "tokens": None if found is None else found.tokens,
        "seconds": None if found is None else found.seconds,
        "agreement": None if text.agreement is None else asdict(text.agreement),
        "why": text.why or None,
    }


def _finite(data: Any) -> Any:
    """Returns the data without infinities, which JSON has no numbers for; they become null."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [_finite(value) for value in data]
    return data
