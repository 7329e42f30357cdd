"""Exported models, opened and run.

    import surgeon.runtime

    model = surgeon.runtime.open("folder", device="auto")
    for piece in model.stream("The capital of France is"):
        print(piece, end="", flush=True)

Names are imported when they are used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.runtime.decoder import Decoder
    from surgeon.runtime.model import LanguageModel, open, open_session
    from surgeon.runtime.sampling import Sampling
    from surgeon.runtime.session import OrtSession

_HOME = {
    "Decoder": "surgeon.runtime.decoder",
    "LanguageModel": "surgeon.runtime.model",
    "OrtSession": "surgeon.runtime.session",
    "Sampling": "surgeon.runtime.sampling",
    "open": "surgeon.runtime.model",
    "open_session": "surgeon.runtime.model",
}

__all__ = ["Decoder", "LanguageModel", "OrtSession", "Sampling", "open", "open_session"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'surgeon.runtime' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
