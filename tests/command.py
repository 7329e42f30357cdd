"""The `surgeon` command as a user runs it: in this process, or in one of its own."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """What a run of the command left on its terminal."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


def surgeon(*args: object) -> Outcome:
    """Runs the command in this process, through the same function as the installed script."""
    from transformers.utils import logging

    from surgeon.cli import main

    # The command turns bars off by the environment, which was read before it ran here.
    logging.disable_progress_bar()
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["surgeon", *map(str, args)]
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def python(code: str, *args: object, path: Path | None = None) -> Outcome:
    """Runs Python code in a process of its own, without Surgeon unless `path` leads to it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=300,
    )
    return Outcome(found.returncode, found.stdout, found.stderr)


def checkpoint(folder: Path, model: Any, tokenizer: Any = None, **options: Any) -> Path:
    """Saves a model, and a tokenizer beside it, as Transformers does."""
    model.save_pretrained(folder, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> dict[str, Any]:
    """Returns all tensors of a checkpoint folder."""
    from safetensors.torch import load_file

    out: dict[str, Any] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        out |= load_file(file)
    return out
