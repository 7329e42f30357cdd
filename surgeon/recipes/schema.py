"""What a recipe may say. Every key is checked, and none is passed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from surgeon.axes.budget import Measure
from surgeon.plugin import KINDS

VERSION = 1

PLACES = ("transform", "score", "select", "compensate", "then")
"""Where passes may stand, in order. What stands `then` are transforms again."""


def misplaced(kinds: Sequence[str]) -> str | None:
    """Returns why passes of these kinds can't stand in this order; None where they can."""
    for kind in ("score", "select"):
        if kinds.count(kind) > 1:
            return f"passes has {kinds.count(kind)} of kind {kind}, it needs one"
    chosen = [kind for kind in kinds if kind != "transform"]
    for kind in ("score", "select") if chosen else ():
        if kind not in chosen:
            return f"passes has 0 of kind {kind}, and {chosen[0]} needs one"
    order = ["score", "select", "compensate"]
    first = kinds.index(chosen[0]) if chosen else 0
    if chosen != sorted(chosen, key=order.index) or "transform" in kinds[first:][: len(chosen)]:
        return (
            f"passes are in the order {', '.join(kinds)}; they run as transform, score, select, "
            "compensate, transform"
        )
    return None


def _fraction(value: Any) -> Any:
    """Lets a share be written as a fraction, as on the command line."""
    if not isinstance(value, str):
        return value
    try:
        return float(Fraction(value))  # also 1e-1, which YAML takes for a word
    except (ValueError, ZeroDivisionError):
        return value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Share = Annotated[StrictFloat, BeforeValidator(_fraction), Field(gt=0, lt=1, allow_inf_nan=False)]
Part = Annotated[StrictFloat, BeforeValidator(_fraction), Field(ge=0, le=1, allow_inf_nan=False)]
Words = Annotated[tuple[StrictStr, ...], BeforeValidator(_several)]
Positive = Annotated[StrictInt, Field(ge=1)]


class Strict(BaseModel):
    """A part of a recipe: frozen, with these keys and no others."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, str_max_length=1000
    )


class BudgetKeys(Strict):
    """How much is to go, and from where."""

    ratio: Share | None = None
    """Share of the decoder layers' parameters."""

    roles: dict[StrictStr, Share] = {}
    """Share of the indices by role."""

    freeze: Words = ()
    """Globs over axes and module paths that stay whole."""

    only: Words = ()
    """Globs over axes and module paths; nothing else goes."""

    measure: Measure = "parameters"
    """What the ratio is a share of: parameters (of the decoder's layers), flops, bytes,
    cache_bytes or latency."""

    latency: StrictStr | None = None
    """Table of timings that `surgeon latency` wrote, for the measure of that name."""

    limits: dict[StrictStr, Part] = {}
    """By role, or glob over axes, the largest share of an axis's indices that may go."""

    multiple_of: dict[StrictStr, Positive] = {}
    """By role or axis, what kept counts are multiples of."""

    tensor_parallel: Positive = 1
    """Devices that heads and inner widths are dealt out to."""


class SourceKeys(Strict):
    """One source of calibration data."""

    source: StrictStr
    """A file, relative to where the command runs, or `datasets:NAME`."""

    weight: Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Share of the windows, relative to the other sources."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class CalibrationKeys(Strict):
    """Which windows of text passes look at."""

    sources: tuple[SourceKeys, ...] = ()
    """Where the text comes from; it may be left to the command line."""

    samples: Positive = 64
    """Windows."""

    length: Annotated[StrictInt, Field(ge=2)] = 512
    """Tokens in a window."""

    seed: Annotated[StrictInt, Field(ge=0)] | None = None
    """Of the generator that draws the windows; by default the recipe's."""

    statistics: StrictStr | None = None
    """Saved statistics (`surgeon calibrate`) in place of a text."""


class ScheduleKeys(Strict):
    """In how many rounds it goes."""

    rounds: Positive
    """Prunes, each calibrated on what the one before it left."""

    shape: Literal["linear", "cubic"] = "linear"
    """How the ratio grows: evenly, or `1 - (1 - k/rounds)³`, much at first and little at last."""

    stop_if_worse_than: Annotated[StrictFloat, Field(gt=1, allow_inf_nan=False)] | None = None
    """Largest perplexity, relative to the dense model's, on windows held out; the last model that
    keeps to it is the result."""


class VocabularyKeys(Strict):
    """Which tokens stay; without it, all of them."""

    corpus: Annotated[Words, Field(min_length=1)]
    """Texts whose tokens stay, named as calibration data are."""

    keep: Positive | None = None
    """The most tokens that may stay in all: those that any text needs, then the most frequent."""

    coverage: Annotated[StrictFloat, BeforeValidator(_fraction), Field(gt=0, le=1)] | None = None
    """The most frequent tokens stay that are this share of the corpus."""

    always: Words = ()
    """Strings whose tokens stay in any case."""

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.keep is not None and self.coverage is not None:
            raise ValueError("keep and coverage both say how many tokens stay: only one can hold")
        return self


class QuantizeKeys(Strict):
    """How the result's weights are stored in fewer bits."""

    scheme: Literal["int8", "w8", "int4"]
    """`int8` rounds activations too, while the model runs; `w8` and `int4` round weights alone."""

    group: Annotated[StrictInt, Field(ge=8)] | None = None
    """Of int4: neighbours in a row that share a scale; 32 without it."""

    embeddings: StrictBool = False
    """Whether the embedding and the head are rounded too (8 bits only)."""


class Step(Strict):
    """A pass by kind and name, with its options."""

    kind: Literal["transform", "score", "select", "compensate"]
    name: StrictStr
    options: dict[StrictStr, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        """Turns `{score: obs, damping: 0.1}` into its parts."""
        if not isinstance(value, dict):
            raise ValueError("a pass is a mapping such as 'score: magnitude'")
        kinds = [key for key in value if key in KINDS]
        if len(kinds) != 1:
            found = " and ".join(kinds) or ", ".join(map(str, value)) or "nothing"
            raise ValueError(f"a pass has exactly one of {', '.join(KINDS)}; this has {found}")
        (kind,) = kinds
        options = {key: given for key, given in value.items() if key != kind}
        return {"kind": kind, "name": value[kind], "options": options}

    def to_data(self) -> dict[str, Any]:
        """Returns the pass as a recipe writes it."""
        return {self.kind: self.name, **self.options}


class Recipe(Strict):
    """Everything that a prune is told but the model: the same from Python, a file and a command."""

    version: Literal[1]
    """Of this form: 1."""

    about: StrictStr = ""
    """What it is good for, in a line."""

    model: StrictStr | None = None
    """What it is for, if that belongs to it."""

    target: StrictStr = "transformers"
    """`transformers`, `vllm`, `gguf`, `onnx` or `pt2`; several with commas between them."""

    seed: Annotated[StrictInt, Field(ge=0)] = 0
    """For passes that draw at random, and for the calibration windows."""

    budget: BudgetKeys = BudgetKeys()
    """How much is to go, and from where."""

    calibration: CalibrationKeys = CalibrationKeys()
    """Which windows passes look at."""

    schedule: ScheduleKeys | None = None
    """In how many rounds; without it, one."""

    vocabulary: VocabularyKeys | None = None
    """Which tokens stay; without it, all of them."""

    quantize: QuantizeKeys | None = None
    """Whether weights are stored in fewer bits, and how; the plan is verified in fp32 before."""

    passes: Annotated[tuple[Step, ...], Field(min_length=1)]
    """In order: any transforms; one score, one select and any compensates, or none of these; any
    transforms again."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        why = misplaced([step.kind for step in self.passes])
        if why is not None:
            raise ValueError(why)
        return self

    @property
    def placed(self) -> Mapping[str, tuple[Step, ...]]:
        """The passes by `PLACES`; where nothing is selected, every transform stands first."""
        out: dict[str, list[Step]] = {place: [] for place in PLACES}
        for step in self.passes:
            out["then" if step.kind == "transform" and out["select"] else step.kind].append(step)
        return {place: tuple(steps) for place, steps in out.items()}

    def to_data(self) -> dict[str, Any]:
        """Returns the recipe as plain values; what is not given is left out."""
        plain = self.model_dump(
            mode="json", exclude={"passes"}, exclude_unset=True, exclude_none=True
        )
        passes = [step.to_data() for step in self.passes]
        return {"version": VERSION, **plain, "passes": passes}
