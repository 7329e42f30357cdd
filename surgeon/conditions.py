"""What has to hold after each pass; one that breaks it is refused by its name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from surgeon.axes.axes import Axes
from surgeon.axes.budget import Budget
from surgeon.axes.factors import Product, factorable
from surgeon.axes.plan import Plan, check
from surgeon.axes.surgery import operate
from surgeon.errors import Code, SurgeonError, near
from surgeon.ir.verify import verify as verify_program


def broken(by: str, what: str, at: str, why: str, try_: str) -> SurgeonError:
    """Returns the refusal of what a pass gave back; `by` is the pass."""
    return SurgeonError(
        Code.BAD_PLAN, f"{by} gave {what}", at=at, why=why, try_=try_, data={"pass": by}
    )


def check_scores(axes: Axes, by: str, wanted: Iterable[str], found: Any) -> Mapping[str, Any]:
    """Returns what a score pass gave, if it is a finite number for each index asked for.

    Raises:
        SurgeonError: `bad-plan`, with the pass and the axis.
    """
    import numpy as np

    _is_mapping(by, found, "scores")
    for target in wanted:
        array = found.get(target)
        axis = axes.by_name.get(target)
        ok = array is not None and bool(np.isfinite(array).all())
        if array is not None and ok and axis is not None:
            outer = tuple(axes.by_name[o].size for o in axis.outer)
            ok = array.shape in ((axis.size,), (*outer, axis.size))
        if not ok:
            raise broken(
                by,
                f"no usable scores for {target}",
                target,
                "scores must be finite numbers, one for each index",
                "check the weights for NaN, and the pass",
            )
    return found


def check_selected(axes: Axes, by: str, plan: Any, budget: Budget) -> Plan:
    """Returns the plan of a selection, if it is one that the model, budget and target allow.

    It is rectangular and within range, leaves something of every axis, takes nothing that is
    pinned or frozen, keeps to the multiples that the target wants; the program after it is well
    formed.

    Raises:
        SurgeonError: `bad-plan`, `plan-mismatch`, `pinned`, `empty-axis` or `bad-program`, with the
            pass.
    """
    if not isinstance(plan, Plan):
        raise broken(by, "no plan", by, f"it is a {type(plan).__name__}", "return a Plan")
    if plan.rewrites:
        raise broken(
            by,
            "a plan that replaces tensors",
            plan.rewrites[0],
            "a selection says what goes; tensors are replaced by other kinds of pass",
            "a pass of kind compensate",
        )
    names = [*(found.axis for found in plan.cuts), *plan.branches]
    for name in names:
        if names.count(name) > 1:
            raise broken(by, f"two cuts of {name}", name, "each is cut once", "one cut an axis")
    try:
        check(axes, plan)
    except SurgeonError as error:
        raise _by(by, error) from error
    for kind, allowed, given in (
        ("cuts", budget.axes, [found.axis for found in plan.cuts]),
        ("drops", budget.branches, plan.branches),
    ):
        for name in given:
            if name not in allowed:
                raise broken(
                    by,
                    f"a plan that {kind} {name}",
                    name,
                    "it is frozen, or outside of what may be pruned",
                    "select from budget.axes and budget.branches only",
                )
    for found in plan.cuts:
        axis = axes.by_name[found.axis]
        multiple = budget.multiple(axis)
        if found.count % multiple:
            raise broken(
                by,
                f"a plan that keeps {found.count} of {found.axis}",
                found.axis,
                f"a multiple of {multiple} is wanted",
                "round kept counts to budget.multiple(axis)",
            )
        if found.size - found.count > budget.limit(axis) * found.size + 1e-9:
            raise broken(
                by,
                f"a plan that keeps {found.count} of {found.axis}",
                found.axis,
                f"at most {budget.limit(axis):g} of its indices may go",
                "keep a count of budget.kept(axis)",
            )
    try:
        verify_program(operate(axes, plan))
    except SurgeonError as error:
        raise _by(by, error) from error
    return plan


def check_tensors(
    axes: Axes, by: str, found: Any, *, products: bool = False, whole: Container[str] = ()
) -> dict[str, Any]:
    """Returns the tensors of a pass, if each can stand for the parameter it is named after.

    Args:
        axes: of the model.
        by: the pass.
        found: what it gave.
        products: whether a `Product` may stand in place of a tensor.
        whole: parameters that are products already, which nothing replaces.

    Raises:
        SurgeonError: `bad-plan`, with the pass and the parameter.
    """
    import torch

    _is_mapping(by, found, "tensors")
    known = axes.program.param
    for param, tensor in found.items():
        if param not in known:
            raise broken(
                by, f"a tensor for '{param}'", param, "there is no such one", near(param, known)
            )
        shape = known[param].type.shape
        if param in whole:
            raise broken(
                by,
                f"a tensor for {param}",
                param,
                "it is the product of two maps by now, and another tensor would be none",
                "put the pass that factors maps behind this one",
            )
        if isinstance(tensor, Product):
            _check_product(axes, by, param, tensor, products)
            continue
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            why = "it must be a tensor of floating-point numbers"
        elif tuple(tensor.shape) != shape:
            why = f"its shape is {list(tensor.shape)}, and it must be {list(shape)}: full size"
        elif not bool(tensor.isfinite().all()):
            why = "it holds NaN or infinity"
        else:
            continue
        raise broken(
            by,
            f"no usable tensor for {param}",
            param,
            why,
            "more calibration data, or a larger ridge or damping where the pass has one",
        )
    return dict(found)


def _check_product(axes: Axes, by: str, param: str, found: Product, allowed: bool) -> None:
    """Sees to it that a product can stand for a parameter."""
    import torch

    both = (found.left, found.right)
    shape = axes.program.param[param].type.shape
    if not allowed:
        why = "only a transform that says so, behind the selection, makes two maps of one"
    elif param not in factorable(axes):
        why = "it is no matrix that one value alone is multiplied with"
    elif not all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in both):
        why = "its factors must be tensors of floating-point numbers"
    elif (found.left.shape[0], found.right.shape[1]) != shape or found.rank != len(found.right):
        sizes = " by ".join(str(list(t.shape)) for t in both)
        why = f"its factors are {sizes}, and the product must be {list(shape)}: full size"
    elif not all(bool(t.isfinite().all()) for t in both):
        why = "a factor holds NaN or infinity"
    else:
        return
    raise broken(by, f"no usable product for {param}", param, why, "see TransformPass.factors")


class Watched:
    """The tensors of a model in memory, which passes are lent and must not write to.

    Args:
        tensors: the model's; what is read from a file anew each time need not be watched.
    """

    def __init__(self, tensors: Mapping[str, Any] | None) -> None:
        from surgeon.capture.weights import StateDictWeights

        held = tensors if isinstance(tensors, dict | StateDictWeights) else {}
        every = ((name, tensor) for name, tensor in held.items() if not tensor.is_inference())
        # A tensor counts how often it was written to, under whatever name.
        self._seen = {name: (tensor, tensor._version) for name, tensor in every}

    def check(self, by: str) -> None:
        """Sees to it that none of them was written to.

        Raises:
            SurgeonError: `bad-pass`, with the pass and the parameter.
        """
        for name, (tensor, version) in self._seen.items():
            if tensor._version != version:
                raise SurgeonError(
                    Code.BAD_PASS,
                    f"{by} changed {name} in place",
                    at=name,
                    why="the tensor is the model's own, which must stay what it was",
                    try_="clone() before writing; and load the model again",
                    data={"pass": by},
                )


def _is_mapping(by: str, found: Any, what: str) -> None:
    if not isinstance(found, Mapping):
        why = f"it is a {type(found).__name__}, and must be a mapping by name"
        raise broken(by, f"no {what}", by, why, "return a dictionary")


def _by(by: str, error: SurgeonError) -> SurgeonError:
    """Returns an error with the pass that brought it about."""
    return SurgeonError(
        error.code,
        f"{by} gave no valid plan: {error.what}",
        at=error.at,
        why=error.why,
        try_=error.try_,
        data={**error.data, "pass": by},
    )
