"""Surgeon: a compiler that makes language models physically smaller.

    import surgeon

    pruned = surgeon.prune("smollm2", ratio=0.2)
    pruned.save("smaller")

Names are imported when they are used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.axes import Axes, Axis
    from surgeon.axes.plan import Plan
    from surgeon.comparing import compare, evaluate
    from surgeon.errors import Code, SurgeonError
    from surgeon.exporting import quantize
    from surgeon.improving import prune_iteratively, recover
    from surgeon.ir import Program
    from surgeon.pipeline import Model, Pruned, Report, capture, open_model, prune, verify
    from surgeon.viewing import analyse

_HOME = {
    "Axes": "surgeon.axes",
    "Axis": "surgeon.axes",
    "Code": "surgeon.errors",
    "Model": "surgeon.pipeline",
    "Plan": "surgeon.axes.plan",
    "Program": "surgeon.ir",
    "Pruned": "surgeon.pipeline",
    "Report": "surgeon.pipeline",
    "SurgeonError": "surgeon.errors",
    "analyse": "surgeon.viewing",
    "capture": "surgeon.pipeline",
    "compare": "surgeon.comparing",
    "evaluate": "surgeon.comparing",
    "open_model": "surgeon.pipeline",
    "prune": "surgeon.pipeline",
    "prune_iteratively": "surgeon.improving",
    "recover": "surgeon.improving",
    "quantize": "surgeon.exporting",
    "verify": "surgeon.pipeline",
}

__all__ = [
    "Axes",
    "Axis",
    "Code",
    "Model",
    "Plan",
    "Program",
    "Pruned",
    "Report",
    "SurgeonError",
    "analyse",
    "capture",
    "compare",
    "evaluate",
    "open_model",
    "prune",
    "prune_iteratively",
    "quantize",
    "recover",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'surgeon' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
