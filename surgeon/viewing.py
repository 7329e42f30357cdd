"""Models opened to be looked at: their axes, what they cost, and two of them side by side."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes
from surgeon.axes.costs import Costs
from surgeon.axes.plan import Plan, check
from surgeon.ir.program import Program
from surgeon.opening import for_plan

if TYPE_CHECKING:
    from surgeon.opening import Model
    from surgeon.ops.rule import OpRule
    from surgeon.report.diff import Side

PLAN_FILE = "plan.json"


def analyse(source: Any, table: dict[str, OpRule] | None = None, **options: Any) -> Axes:
    """Returns the axes of a model.

    Args:
        source: a captured `Program`, or anything that `open_model` takes.
        table: operation rules for a program; by default those of `surgeon.ops`.
        options: those of `open_model`, such as `example_inputs` for a module.
    """
    if isinstance(source, Program):
        from surgeon.axes.settle import analyse as settle

        return settle(source, table)
    from surgeon.opening import open_model

    return open_model(source, **options).axes


def costs_of(model: Model) -> Costs:
    """Returns the costs of a model in bytes as it is stored."""
    stored = model.source.dtype.itemsize if model.source else None
    if model.tensors is not None:
        return Costs(model.axes, lambda name: model.dtype(name).itemsize, stored or 4)
    return Costs(model.axes, None if stored is None else lambda _: stored, stored or 4)


@dataclass(frozen=True)
class _Given:
    """What a user named: the plan that lies there, and whether a model does."""

    name: str
    plan: Plan | None
    is_model: bool

    def made_from(self, model: Model) -> bool:
        """Whether the plan was made for this model."""
        if self.plan is None:
            return False
        if not self.plan.source:  # made from a configuration: for any model that it fits
            return True
        recorded, own = dict(self.plan.source), model.fingerprint()
        if own and recorded.get("fingerprint"):
            return own == recorded["fingerprint"]
        return recorded.get("id") == model.id


def _given(name: str) -> _Given:
    path = Path(name)
    if path.is_dir() and (path / PLAN_FILE).exists():
        from surgeon.saving import read_plan

        return _Given(name, read_plan(path)[0], (path / "config.json").exists())
    if path.is_file() and path.suffix == ".json" and _is_plan(path):
        from surgeon.saving import read_plan

        return _Given(name, read_plan(path)[0], False)
    return _Given(name, None, True)


def _is_plan(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return path.name == PLAN_FILE  # read as a plan, which says what is wrong with it
    return isinstance(found, dict) and "cuts" in found


def sides(
    a: str, b: str, *, source: str | None = None, trust_remote_code: bool = False
) -> tuple[Side, Side]:
    """Returns two models, two plans, or a model and its pruned output, to be compared.

    A plan is looked at on the axes of the model it was made for. So is a pruned output, beside
    that model or another output of it; beside anything else it is a model of its own.

    Args:
        a: a model, a plan file, or a folder that `prune` wrote.
        b: another one.
        source: the model that plans were made for, if it moved.
        trust_remote_code: run modelling code that comes with a model.

    Raises:
        SurgeonError: why one of them can't be read, or `plan-mismatch`.
    """
    from surgeon.opening import open_model, opening_origin

    opened: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in opened:
            opened[name] = open_model(name, trust_remote_code=trust_remote_code)
        return opened[name]

    def origin(plan: Plan) -> Model:
        name = source or dict(plan.source).get("id", "")
        with opening_origin(name, "the plan was made for", name or "the plan's source"):
            return model(name)

    one, other = _given(a), _given(b)
    for first, second, turn in ((one, other, False), (other, one, True)):
        if first.is_model and second.plan is not None and second.made_from(model(first.name)):
            base = model(first.name)
            pair = _side(first.name, base), _side(second.name, base, second.plan)
            return (pair[1], pair[0]) if turn else pair
    if one.plan is not None and other.plan is not None and _same_source(one.plan, other.plan):
        base = origin(one.plan)
        return _side(a, base, one.plan), _side(b, base, other.plan)
    out: list[Side] = []
    for given in (one, other):
        if given.is_model or given.plan is None:
            out.append(_side(given.name, model(given.name)))
        else:
            out.append(_side(given.name, origin(given.plan), given.plan))
    return out[0], out[1]


def _same_source(a: Plan, b: Plan) -> bool:
    ours, theirs = dict(a.source), dict(b.source)
    key = "fingerprint" if "fingerprint" in ours and "fingerprint" in theirs else "id"
    return key in ours and ours[key] == theirs.get(key)


def _side(name: str, model: Model, plan: Plan | None = None) -> Side:
    from surgeon.report.diff import Side

    plan = plan or Plan()
    model = for_plan(model, plan)
    check(model.axes, plan)
    return Side(name, model.axes, costs_of(model), plan)
