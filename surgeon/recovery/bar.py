"""How far a training is, in a terminal; nowhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from surgeon.calibrate.parallel import rank


class Bar:
    """A bar of steps on the error output of the first process, if that is a terminal.

    Args:
        steps: in all.
        label: what is being done.
    """

    def __init__(self, steps: int, label: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Left

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Left(),
            TextColumn("{task.fields[said]}"),
        )
        quiet = not console.is_terminal or rank() != 0
        self._progress = Progress(*columns, console=console, disable=quiet, transient=True)
        self._task = self._progress.add_task(label, total=steps, said="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def at(self, step: int) -> None:
        """Shows that this step is done."""
        self._progress.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Shows something beside the bar."""
        self._progress.update(self._task, said=text)
