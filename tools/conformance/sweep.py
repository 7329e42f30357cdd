"""Every architecture of Transformers opened as `surgeon inspect` does: nothing may crash."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.conformance.apart import each

LAYERS = re.compile(r"(^|_)(n_|num_)?(hidden_|decoder_|encoder_)?(layers?|blocks)$")
EXPERTS = re.compile(r"experts?$")
FEW, MANY = 2, 16
"""Layers and experts that are left, more experts than any router chooses at once; other sizes stay,
since nothing but shapes is traced.
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one architecture.

    Attributes:
        kind: `captured`, `refused` (with Surgeon's own reason) or `no model` (its default
            configuration makes none).
        why: the reason; of a captured one what can be cut and what has no rule.
    """

    kind: str
    why: str


def architectures() -> dict[str, type]:
    """Returns the causal language models of Transformers, then further encoders, by class."""
    import transformers
    from transformers.models.auto import modeling_auto

    found: dict[str, type] = {}
    for table in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    ):
        for names in table.values():
            name = names if isinstance(names, str) else names[0]
            found.setdefault(name, getattr(transformers, name))
    return found


def shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration's fields with few layers and few experts."""
    if not all(isinstance(key, str) for key in fields):
        return fields  # names of labels, by number
    counts = {v for k, v in fields.items() if LAYERS.search(k) and type(v) is int and v > FEW}
    out: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            out[key] = shrunk(value)
        elif LAYERS.search(key) and type(value) is int:
            out[key] = min(value, FEW)
        elif EXPERTS.search(key) and type(value) is int and value > MANY:
            out[key] = MANY
        elif isinstance(value, list) and len(value) in counts:
            out[key] = value[:FEW]
        else:
            out[key] = value
    return out


def attempt(name: str) -> Outcome:
    """Returns what becomes of one architecture; anything but a `SurgeonError` is a defect."""
    from surgeon.errors import SurgeonError
    from surgeon.opening import open_model

    cls: Any = architectures()[name]
    try:
        default = cls.config_class()
        config = cls.config_class.from_dict(shrunk(default.to_dict()))
    except Exception as error:  # noqa: BLE001 (its own configuration refuses, which is a result)
        return Outcome("no model", f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    config.architectures = [name]
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            axes = open_model(Path(folder) / "config.json").axes
        except SurgeonError as error:
            return Outcome("refused", f"[{error.code.value}] {error.why.splitlines()[0][:200]}")
    roles = [r for r in axes.roles if any(a.prunable for a in axes.of_role(r))]
    missing = {axes.program.ops[i].target for i in axes.facts.barriers}
    why = ", ".join(roles) or "nothing can be cut"
    return Outcome(
        "captured", why + (f"; no rule for {', '.join(sorted(missing))}" * bool(missing))
    )


def sweep(names: Sequence[str], *, jobs: int = 1, seconds: float = 300) -> int:
    """Prints what becomes of each architecture; returns 1 where one crashed."""
    known = list(architectures())
    unknown = [name for name in names if name not in known]
    if unknown:
        print(f"not a language model of Transformers: {', '.join(unknown)}")
        return 2
    count: dict[str, int] = {}
    for name, good, found in each(attempt, names or known, jobs=jobs, seconds=seconds):
        outcome = found if good else Outcome("crashed", str(found))
        count[outcome.kind] = count.get(outcome.kind, 0) + 1
        print(f"{outcome.kind:9} {name}: {outcome.why}", flush=True)
    print(", ".join(f"{n} {kind}" for kind, n in count.items()))
    return 1 if "crashed" in count else 0
