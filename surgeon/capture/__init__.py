"""From a model to its program. To users, `surgeon.capture(model)` is a function."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgeon.ir import Program


class _Package(ModuleType):
    """Importing a part of this package binds its name in `surgeon`, over the function there."""

    def __call__(self, source: Any, **options: Any) -> Program:
        """Returns the program of a source; `options` are those of `surgeon.open_model`."""
        import surgeon

        return surgeon.open_model(source, **options).program


sys.modules[__name__].__class__ = _Package
