"""How operations are lowered: rules register themselves by target."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from surgeon.emit.ort.build import Builder
from surgeon.ir import Op

Lowering = Callable[[Builder, Op], Any]
"""Adds the nodes of an operation and returns its value, or a tuple of its values."""

_RULES: dict[str, Lowering] = {}
_FILES = ("pointwise", "linear", "shape", "reduce", "fused", "attention", "routing")


def lowers(*targets: str) -> Callable[[Lowering], Lowering]:
    """Registers a function as the lowering of these operations."""

    def register(rule: Lowering) -> Lowering:
        for target in targets:
            assert target not in _RULES, target
            _RULES[target] = rule
        return rule

    return register


@cache
def lowerings() -> dict[str, Lowering]:
    """Returns every rule by target, the files that hold them imported."""
    for name in _FILES:
        import_module(f"surgeon.emit.ort.{name}")
    return _RULES


def lowered(b: Builder, op: Op) -> tuple[Any, ...]:
    """Adds the nodes of an operation and returns its values.

    Raises:
        SurgeonError: `target-refused` where it has no rule, or its rule refuses it.
    """
    rule = lowerings().get(op.target)
    if rule is None:
        raise b.refused("there is no rule for it")
    found = rule(b, op)
    return found if isinstance(found, tuple) else (found,)
