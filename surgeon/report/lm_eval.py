"""Downstream tasks: any model that runs here, as lm-evaluation-harness asks for it.

Reference: Gao et al., A framework for few-shot language model evaluation (EleutherAI's
lm-evaluation-harness), whose tasks, prompts and metrics are used as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from surgeon.errors import Code, SurgeonError, near
from surgeon.runtime.generate import GREEDY, Sampling, generate
from surgeon.runtime.logits import logits_of, positions_of

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

_LONGEST = 2048
"""Tokens of context for a model that doesn't say how many it was made for; lm-eval's own number."""

_SETTINGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Tasks:
    """Tasks by name, and what knows them."""

    names: tuple[str, ...]
    manager: TaskManager


def find_tasks(names: Sequence[str], folder: Path | None = None) -> Tasks:
    """Returns tasks of lm-eval by name.

    Args:
        names: of tasks, groups or tags.
        folder: with further tasks, a YAML file each. Where it has all of them, lm-eval's own, of
            which there are thousands, aren't looked through.

    Raises:
        SurgeonError: `missing-extra` without lm-eval, `missing-file` for the folder, `bad-option`
            for an unknown task.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SurgeonError(
            Code.MISSING_EXTRA,
            "tasks need lm-eval",
            at=f"--tasks {','.join(names)}",
            why=str(error),
            try_='pip install "model-surgeon[lm-eval]"',
        ) from error
    if folder is not None:
        if not folder.is_dir():
            raise SurgeonError(
                Code.MISSING_FILE,
                f"there is no folder '{folder}'",
                at="--tasks-path",
                why="further tasks are YAML files in a folder",
                try_="name the folder, or leave it out for lm-eval's own tasks",
            )
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return Tasks(tuple(names), own)
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if name not in manager.all_tasks:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"there is no task {name!r}",
                at="--tasks",
                why=f"lm-eval and {folder or 'no folder of further tasks'} have none of that name",
                try_=near(name, [t for t in manager.all_tasks if t[:1] == name[:1]]),
            )
    return Tasks(tuple(names), manager)


def run_tasks(
    model: Any, tokenizer: Any, tasks: Tasks, *, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Returns the metrics of tasks, by task and by metric; an error's name ends in `_stderr`.

    Args:
        model: anything that `logits_of` and `generate` take.
        tokenizer: the model's own.
        tasks: what `find_tasks` gave.
        limit: examples of each at most.

    Raises:
        SurgeonError: `runtime-failed` where lm-eval fails, as without a network for a task's data.
    """
    from lm_eval.evaluator import simple_evaluate

    try:
        found: Any = simple_evaluate(
            model=adapter(model, tokenizer),
            tasks=list(tasks.names),
            task_manager=tasks.manager,
            limit=limit,
            log_samples=False,
        )
    except SurgeonError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            "lm-eval failed",
            at=f"--tasks {','.join(tasks.names)}",
            why=f"{type(error).__name__}: {lines[0]}"[:500],
            try_="run the task with lm-eval's own dummy model; its data may need a network",
        ) from error
    return {task: dict(_metrics(metrics)) for task, metrics in found["results"].items()}


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers among what is said of a task; a filter is named unless it is none."""
    for name, value in found.items():
        metric, comma, filtered = name.partition(",")
        if comma and isinstance(value, int | float):
            yield metric if filtered == "none" else name, float(value)


def adapter(model: Any, tokenizer: Any) -> TemplateLM:
    """Returns a model as lm-eval's own kind, which asks in text and gets log-likelihoods.

    Args:
        model: anything that `logits_of` and `generate` take.
        tokenizer: the model's own.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    run = logits_of(model)
    longest = positions_of(model) or _LONGEST

    class Adapter(TemplateLM):
        """One request at a time, without padding: the figures are those of the model alone."""

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer
            self._last: tuple[tuple[int, ...], Any] = ((), None)

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        @property
        def prefix_token_id(self) -> int:
            begin = tokenizer.bos_token_id
            return self.eot_token_id if begin is None else int(begin)

        @property
        def max_length(self) -> int:
            return longest

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            found = tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)
            return list(found["input_ids"])

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            return [self._rolling(request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [_write(model, tokenizer, *request.args) for request in requests]

        def _loglikelihood_tokens(
            self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            return [self._score(context, rest) for _, context, rest in requests]

        def _rolling(self, text: str) -> float:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=longest,
                context_len=1,
            )
            return sum(self._score(*make_disjoint_window(window))[0] for window in windows)

        def _score(self, context: list[int], rest: list[int]) -> tuple[float, bool]:
            """Returns the log-likelihood of tokens after others, and whether they are greedy.

            A context that is too long loses its beginning.
            """
            if not rest:
                return 0.0, True
            if len(rest) > longest:
                raise SurgeonError(
                    Code.BAD_TEXT_INPUT,
                    f"a continuation of {len(rest)} tokens can't be scored",
                    at="lm-eval",
                    why=f"the model was made for {longest} positions",
                    try_="a task with shorter answers",
                )
            read = tuple((context + rest)[-(longest + 1) : -1])
            if self._last[0] != read:  # choices of one token ask for the same logits in turn
                self._last = read, run(np.asarray([read], dtype=np.int64))
            return likelihood(self._last[1], rest)

    # What lm-eval declares and doesn't need is left as it is.
    return cast("TemplateLM", Adapter())


def likelihood(logits: Any, rest: Sequence[int]) -> tuple[float, bool]:
    """Returns the log-likelihood of the tokens that come last, and whether each is the likeliest.

    Args:
        logits: [1, read, vocab]; the last row predicts the last of the tokens.
        rest: token ids.
    """
    import torch

    rows = torch.as_tensor(logits)[0, -len(rest) :].float()
    wanted = torch.tensor(rest, device=rows.device)
    found = torch.log_softmax(rows, dim=-1).gather(1, wanted[:, None])
    return float(found.double().sum()), bool((rows.argmax(-1) == wanted).all())


class _EndError(Exception):
    """Leaves the loop of whatever writes."""


def _write(model: Any, tokenizer: Any, prompt: str, asked: Mapping[str, Any]) -> str:
    """Returns what a model writes after a prompt, up to the first text that ends it."""
    from lm_eval.models.utils import normalize_gen_kwargs

    given: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked)))
    unknown = sorted(set(given) - set(_SETTINGS))
    if unknown:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"a task asks for generation with {unknown[0]}={given[unknown[0]]!r}",
            at="lm-eval, generation_kwargs",
            why=f"known are {', '.join(_SETTINGS)}",
            try_="another task, or a copy of this one without it in a folder for --tasks-path",
        )
    stops = [stop for stop in given["until"] if stop]
    pieces: list[str] = []

    def take(_: int, piece: str) -> None:
        pieces.append(piece)
        if any(stop in "".join(pieces) for stop in stops):
            raise _EndError

    with suppress(_EndError):  # the text up to there holds what ends it
        generate(
            model,
            tokenizer,
            prompt,
            max_new_tokens=given["max_gen_toks"],
            sampling=_sampling(given),
            on_text=take,
        )
    text = "".join(pieces)
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _sampling(given: Mapping[str, Any]) -> Sampling:
    temperature = float(given.get("temperature") or 0.0)
    if not given.get("do_sample") or temperature == 0:
        return GREEDY
    return Sampling(temperature, given.get("top_k"), given.get("top_p"))
