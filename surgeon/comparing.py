"""One model, or several beside one of them: what they are, and everything measured of them.

Models are opened one at a time and given up before the next one is; of the first, only its
predictions stay, in a scratch folder. Speed alone is measured with all of them loaded, each in a
process of its own, since it has to be measured in turns.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from surgeon import exporting
from surgeon.calibrate.parallel import World, join, launched
from surgeon.emit.scratch import scratch
from surgeon.errors import Code, SurgeonError, near
from surgeon.pruned import versions
from surgeon.ready import Placing, Ready, check_name, open_ready
from surgeon.report.agreement import Agreement, Differences, Kept, vocabulary
from surgeon.report.comparison import Evaluated, Evaluation, Scored, Settings, Written
from surgeon.report.evaluate import Perplexity, Text, Windows, default_text, read_text, score
from surgeon.report.evaluate import windows_of as cut
from surgeon.report.writing import measure, words
from surgeon.runtime import bench
from surgeon.runtime.generate import generate
from surgeon.runtime.logits import positions_of
from surgeon.runtime.placing import check_map

if TYPE_CHECKING:
    from surgeon.report.lm_eval import Tasks


class Options(TypedDict, total=False):
    """What `evaluate` and `compare` take beside models.

    The first ones are the fields of `Settings`, which says what they are.
    """

    window: int
    windows: int
    agreement_windows: int
    prompts: Sequence[str]
    new_tokens: int
    speed: bool
    repeat: int
    tasks: Sequence[str]
    limit: int | None
    texts: Sequence[str | Path | Text]
    """Files to score, or `Text`s; the built-in text without them."""
    tokenizer: Any
    """A folder with a tokenizer, or one itself, for models that have none beside them."""
    tasks_path: Path | None
    """A folder with further tasks for lm-eval."""
    device: str
    """`auto`, `cuda` or `cpu`."""
    device_map: str | Mapping[str, int | str] | None
    """How checkpoints' layers are dealt out to several devices; see `surgeon.runtime.placing`."""
    threads: int | None
    """Threads of each model while it is timed."""
    trust_remote_code: bool
    """Run modelling code that comes with a checkpoint."""
    progress: Callable[[str], None] | None
    """Called with a line of text now and then."""


def evaluate(model: Any, **options: Unpack[Options]) -> Evaluation:
    """Returns what is measured of one model.

    Under a launcher every process takes its share of the windows of texts, and has the figures of
    all of them.

    Args:
        model: an ONNX or .pt2 file or the folder of one, or anything that `open_model` takes.
        options: see `Options`.

    Raises:
        SurgeonError: why it can't be opened or scored.
    """
    return _run([model], 0, options)


def compare(
    models: Sequence[Any], *, against: Any = None, **options: Unpack[Options]
) -> Evaluation:
    """Returns what is measured of several models, and how they differ from one of them.

    Args:
        models: each as for `evaluate`.
        against: which of them the others are compared with; the first without it.
        options: see `Options`.

    Raises:
        SurgeonError: why one of them can't be opened, or the reference can't be scored.
    """
    if len(models) < 2:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{len(models)} models can't be compared",
            at="the models",
            why="a comparison is of a model with at least one other",
            try_="name two, or measure one with 'surgeon eval'",
        )
    place = 0 if against is None else next((i for i, m in enumerate(models) if m is against), None)
    if place is None and isinstance(against, str) and against in models:
        place = models.index(against)
    if place is None:
        names = [str(m) for m in models]
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{against!s:.80} is none of the models",
            at="--against",
            why="the others are compared with one of those that were named",
            try_=near(str(against), names),
        )
    return _run(models, place, options)


def _run(models: Sequence[Any], against: int, options: Options) -> Evaluation:
    chosen = {k: v for k, v in options.items() if k in Settings.__dataclass_fields__}
    for name in ("prompts", "tasks"):
        chosen[name] = tuple(options.get(name, ()))
    settings = Settings(**chosen)  # type: ignore[arg-type]
    given = options.get("texts") or ()
    texts = [t if isinstance(t, Text) else read_text(t) for t in given] or [default_text()]
    tasks: Tasks | None = None
    if settings.tasks:
        from surgeon.report.lm_eval import find_tasks

        tasks = find_tasks(settings.tasks, options.get("tasks_path"))
    device_map = options.get("device_map")
    if device_map is not None:
        check_map(device_map, device=options.get("device", "auto"), speed=settings.speed)
    for model in models:
        check_name(model, trust_remote_code=options.get("trust_remote_code", False))
    options = {**options, "tokenizer": _tokenizer(options.get("tokenizer"))}
    world = _world(options)
    known = words([*(t.content for t in texts), *settings.prompts])
    names = [m if isinstance(m, str) else _name(m) for m in models]
    found: dict[int, Evaluated] = {}
    with scratch() as folder:
        kept = Kept(folder) if len(models) > 1 else None
        placing = None if device_map is None else Placing(device_map, folder / "placed")
        run = _Run(settings, texts, known, kept, tasks, options, world, placing)
        for index in (against, *(i for i in range(len(models)) if i != against)):
            found[index] = run.model(models[index], names[index])
            gc.collect()
    speed, why = _speed(models, settings, options, world)
    ordered = tuple(found[index] for index in range(len(models)))
    return Evaluation(settings, ordered, against, speed, why, len(known), versions())


def _world(options: Options) -> World:
    """Returns the processes that share the windows."""
    if not launched():
        return World()
    from surgeon.runtime.device import choose_torch_device

    return join(choose_torch_device(options.get("device", "auto")).name)


def _name(model: Any) -> str:
    return str(model) if isinstance(model, Path) else type(model).__name__


class _Run:
    """Models measured one after the other, the reference first."""

    def __init__(
        self,
        settings: Settings,
        texts: Sequence[Text],
        known: frozenset[str],
        kept: Kept | None,
        tasks: Tasks | None,
        options: Options,
        world: World,
        placing: Placing | None,
    ) -> None:
        self._world, self._placing = world, placing
        self._settings, self._texts, self._known, self._kept = settings, texts, known, kept
        self._tasks, self._options = tasks, options
        self._reference: list[tuple[Windows, int]] = []
        self._first = ""

    def model(self, model: Any, name: str) -> Evaluated:
        """Returns everything that is measured of a model but its speed."""
        say = self._options.get("progress") or (lambda _: None)
        say(f"opening {name}")
        ready = open_ready(
            model,
            device=self._options.get("device", "auto"),
            tokenizer=self._options.get("tokenizer"),
            trust_remote_code=self._options.get("trust_remote_code", False),
            placing=self._placing,
        )
        is_first = not self._first
        self._first = self._first or name
        texts: list[Scored] = []
        for number, text in enumerate(self._texts):
            say(f"{name}: {text.name}")
            score_it = self._score_first if is_first else self._score
            texts.append(score_it(number, text, ready, name))
        written: list[Written] = []
        for prompt in self._settings.prompts:
            say(f"{name}: writing")
            written.append(self._write(ready, name, prompt))
        return Evaluated(
            name,
            ready.facts,
            exporting.where(ready.run),
            tuple(texts),
            tuple(written),
            self._run_tasks(ready, name, say),
        )

    def _windows(self, text: Text, ready: Ready, name: str) -> Windows:
        return cut(
            exporting.need_tokenizer(ready.tokenizer, name),
            text,
            window=self._settings.window,
            max_windows=self._settings.windows,
            positions=positions_of(ready.run),
        )

    def _score_first(self, number: int, text: Text, ready: Ready, name: str) -> Scored:
        """Scores the reference, whose predictions are kept where others follow."""
        windows = self._windows(text, ready, name)
        sizes: dict[int, float] = {}

        def keep(index: int, logits: Any) -> None:
            sizes[index] = vocabulary(logits)
            if self._kept is not None and index < self._settings.agreement_windows:
                self._kept.keep(number, index, logits)

        found = score(ready.run, windows, on_window=keep, world=self._world)
        self._reference.append((windows, self._size(sizes, windows)))
        return Scored(text.name, found)

    def _size(self, sizes: dict[int, float], windows: Windows) -> int:
        """Returns how many tokens predictions are about; not every process has a window."""
        return int(max(self._world.each(sizes, len(windows.ids))))

    def _score(self, number: int, text: Text, ready: Ready, name: str) -> Scored:
        windows = self._windows(text, ready, name)
        theirs, size = self._reference[number]
        kept, differences, why = self._kept, Differences(), ""
        assert kept is not None
        if not windows.same(theirs):
            why = (
                f"its tokenizer gives other tokens than that of {self._first}, so that neither "
                "predictions nor perplexities can be compared"
            )
        elif not self._settings.agreement_windows:
            why = "no windows were asked for"

        sizes: dict[int, float] = {}

        def add(index: int, logits: Any) -> None:
            sizes[index] = vocabulary(logits)
            if not why and sizes[index] == size and index < self._settings.agreement_windows:
                differences.add(kept.load(number, index), logits, index)

        found: Perplexity | None = None
        agreement: Agreement | None = None
        try:
            found = score(ready.run, windows, on_window=add, world=self._world)
            own = self._size(sizes, windows)
            if own != size:
                why = (
                    f"it chooses among {own:,} tokens and {self._first} among {size:,}, so that "
                    "their probabilities can't be compared"
                )
            agreement = None if why else differences.result(self._world, len(windows.ids))
        except SurgeonError as error:
            # The others can still be compared; what is missing is said in its place.
            if error.code is not Code.RUNTIME_FAILED:
                raise
            why = f"{error.what}: {error.why}"
        return Scored(text.name, found, agreement, why)

    def _write(self, ready: Ready, name: str, prompt: str) -> Written:
        # One at a time: padding in a batch would move the logits by a rounding.
        tokenizer = exporting.need_tokenizer(ready.tokenizer, name)
        found = generate(ready.run, tokenizer, prompt, max_new_tokens=self._settings.new_tokens)
        own = measure(found.text, found.tokens, self._known)
        return Written(prompt, found.text, len(found.tokens), own)

    def _run_tasks(
        self, ready: Ready, name: str, say: Callable[[str], None]
    ) -> dict[str, dict[str, float]]:
        if self._tasks is None:
            return {}
        from surgeon.report.lm_eval import run_tasks

        say(f"{name}: {', '.join(self._tasks.names)}")
        tokenizer = exporting.need_tokenizer(ready.tokenizer, name)
        return run_tasks(ready.run, tokenizer, self._tasks, limit=self._settings.limit)


def _tokenizer(given: Any) -> Any:
    """Returns a tokenizer, be it given as the folder of one."""
    if not isinstance(given, str | Path):
        return given
    from surgeon.capture.source import resolve

    return resolve(str(given)).load_tokenizer()


# --- speed ---------------------------------------------------------------------------------------


def _speed(
    models: Sequence[Any], settings: Settings, options: Options, world: World
) -> tuple[bench.Comparison | None, str]:
    """Returns how fast the models are, or why that can't be told."""
    if not settings.speed:
        return None, ""
    if world.rank != 0:
        return None, "the first process takes the time"
    if not all(isinstance(m, str | Path) for m in models):
        return None, "a model in memory has no name by which another process could load it"
    arguments = {
        "device": options.get("device", "auto"),
        "threads": options.get("threads"),
        "trust_remote_code": options.get("trust_remote_code", False),
    }
    defaults = bench.Settings()
    chosen = bench.Settings(
        # A window's length is one that every model has positions for.
        prompt_tokens=min(defaults.prompt_tokens, max(1, settings.window - defaults.new_tokens)),
        repeat=settings.repeat,
    )
    names = [str(m) for m in models]
    load = "surgeon.exporting:load_to_measure"
    found = bench.compare(names, load, arguments, chosen, progress=options.get("progress"))
    return found, ""
