"""Speed and memory of several models, each in a process of its own, measured in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from surgeon.errors import Code, SurgeonError


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    prompt_tokens: int = 128
    """Tokens read at once, in each row."""
    new_tokens: int = 32
    """Tokens written one at a time after them, in each row."""
    batch: int = 1
    """Rows."""
    repeat: int = 5
    """Turns that are measured; one more comes first and warms up."""

    def __post_init__(self) -> None:
        """Refuses settings under which nothing would be measured."""
        for name, value in asdict(self).items():
            if value < 1:
                raise SurgeonError(
                    Code.BAD_OPTION,
                    f"{name} can't be {value}",
                    at=f"--{name.replace('_', '-')}",
                    why="there would be nothing to measure",
                    try_="1 or more",
                    data={"option": name},
                )


@dataclass(frozen=True)
class Measured:
    """One model's figures."""

    model: str
    kind: str
    """What ran it, such as `ONNX Runtime, ort, fp32`."""
    device: str
    note: str
    """Why this device."""
    prefill_seconds: tuple[float, ...]
    """Of every turn, for the whole batch."""
    decode_seconds: tuple[float, ...]
    peak_bytes: int | None
    """The largest resident set of its process, or None where the system doesn't say."""
    prefill: float
    """Prompt tokens a second, the median over the turns."""
    decode: float
    """New tokens a second, the median over the turns."""


@dataclass(frozen=True)
class Comparison:
    """Models measured in turns, in the order in which they were named."""

    settings: Settings
    models: tuple[Measured, ...]

    def ratio(self, index: int, figure: str) -> float | None:
        """Returns a model's figure as a multiple of the first's, or None where one has none.

        Args:
            index: which model.
            figure: `prefill`, `decode` or `peak_bytes`.
        """
        first, own = getattr(self.models[0], figure), getattr(self.models[index], figure)
        return own / first if first and own is not None else None

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain data, with the ratios to the first model."""
        figures = ("prefill", "decode", "peak_bytes")
        return {
            "settings": asdict(self.settings),
            "models": [
                {**asdict(found), "ratio": {f: self.ratio(index, f) for f in figures}}
                for index, found in enumerate(self.models)
            ],
        }


def compare(
    models: Sequence[str],
    load: str,
    arguments: Mapping[str, Any] | None = None,
    settings: Settings | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> Comparison:
    """Returns the speed and memory of models, measured in turns.

    The order is A, B, A, B: a machine's speed drifts, and this lets it fall on all models alike.
    Each model has a process of its own, so that its peak of memory is its own; all stay loaded.

    Args:
        models: names or paths, as `load` takes them. The same one twice shows the noise.
        load: the function that loads a model in its process, as `module:name`. It gets the name and
            `arguments`, and returns a model that `runner_of` takes.
        arguments: further keyword arguments for it; plain data.
        settings: what is measured.
        progress: called with a line of text now and then.

    Raises:
        SurgeonError: what loading or running a model refuses, or a process that dies.
    """
    settings = settings or Settings()
    say = progress or (lambda _: None)
    with ExitStack() as stack:
        workers: list[Worker] = []
        for model in models:
            say(f"loading {model}")
            worker = Worker(model, load, dict(arguments or {}), settings)
            stack.callback(worker.close)
            workers.append(worker)
            worker.start()
        for turn in range(settings.repeat + 1):
            for worker in workers:
                say(f"turn {turn} of {settings.repeat}: {worker.model}")
                worker.turn(counts=turn > 0)
        return Comparison(settings, tuple(worker.result() for worker in workers))


class Worker:
    """A process that has one model and measures it when told to."""

    def __init__(
        self, model: str, load: str, arguments: dict[str, Any], settings: Settings
    ) -> None:
        self.model, self._settings = model, settings
        self._times: list[tuple[float, float]] = []
        self._about: dict[str, Any] = {}
        self._job = {"model": model, "load": load, "arguments": arguments}
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        code = "from surgeon.runtime.bench_worker import serve; serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env
        )

    def start(self) -> None:
        """Loads the model."""
        self._about = self._ask({**self._job, "settings": asdict(self._settings)})

    def turn(self, *, counts: bool) -> None:
        """Measures the model once."""
        found = self._ask({"do": "turn"})
        if counts:
            self._times.append((found["prefill"], found["decode"]))

    def result(self) -> Measured:
        """Returns the figures of all turns, and the peak of memory so far."""
        peak = self._ask({"do": "peak"})["bytes"]
        prefill, decode = (tuple(times) for times in zip(*self._times, strict=True))
        rows = self._settings.batch
        return Measured(
            self.model,
            self._about["kind"],
            self._about["device"],
            self._about["note"],
            prefill,
            decode,
            peak,
            rows * self._settings.prompt_tokens / statistics.median(prefill),
            rows * self._settings.new_tokens / statistics.median(decode),
        )

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = b""
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            pass  # it has ended, which its exit code explains
        if not answer:
            code = self._process.wait()
            raise SurgeonError(
                Code.RUNTIME_FAILED,
                f"the process that measured {self.model} ended",
                at=self.model,
                why=f"signal {-code}, as when memory runs out" if code < 0 else f"exit code {code}",
                try_="a smaller batch or prompt, or fewer models at once",
                data={"exit": code},
            )
        found = json.loads(answer)
        if "error" in found:
            raise SurgeonError(Code(found["error"].pop("code")), **found["error"])
        return found
