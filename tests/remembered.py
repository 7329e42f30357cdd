"""Captures that were made before in this process, given again.

The tests prune the same few tiny models hundreds of times, and tracing a model takes longer than
all the rest. A program is frozen data that follows from the class and configuration of a model
alone, so `open_model` and the Transformers target get the one that was traced for the same class
and configuration earlier. A test that calls `capture_model` itself always traces.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

import surgeon.capture.model as capture
import surgeon.emit.huggingface as huggingface
import surgeon.opening as opening
from surgeon.axes import Axes
from surgeon.capture.model import Captured
from surgeon.ir import Program

IRRELEVANT = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Fields that say where a model comes from and how it is stored; it is traced in fp32."""


def _identity(model: Any, options: dict[str, Any]) -> object:
    """All that a capture reads: the class, the configuration, and how it is asked for."""
    config = model.config
    fields = {k: v for k, v in config.to_dict().items() if k not in IRRELEVANT}
    text = json.dumps(fields, sort_keys=True, default=repr)
    return type(model), type(config), text, config._attn_implementation, tuple(options.items())


@contextmanager
def captures() -> Generator[None, None, None]:
    """While active, `open_model` and the Transformers target trace a model only once."""
    real, analyse = capture.capture_model, opening.analyse
    traced: dict[object, Captured] = {}
    analysed: dict[int, Axes] = {}

    def capture_model(model: Any, **options: Any) -> Captured:
        if not type(model).__module__.startswith(("transformers.models.", "surgeon.emit.")):
            return real(model, **options)
        key = _identity(model, options)
        if key not in traced:
            traced[key] = real(model, **options)
        return traced[key]

    def analyse_once(program: Program) -> Axes:
        if not any(found.program is program for found in traced.values()):
            return analyse(program)
        if id(program) not in analysed:  # `traced` keeps it, so that the number stays its own
            analysed[id(program)] = analyse(program)
        return analysed[id(program)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "capture_model", capture_model)
        patch.setattr(huggingface, "capture_model", capture_model)
        patch.setattr(opening, "analyse", analyse_once)
        yield
