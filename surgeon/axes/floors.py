"""How many indices have to stay: what a top-k chooses must be there to be chosen."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from surgeon.axes.analysis import Facts
from surgeon.axes.space import Expr, Sum, leaves
from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    from surgeon.axes.axes import Axes
    from surgeon.axes.plan import Selection


def _chosen(facts: Facts) -> Iterator[tuple[Expr, int, int]]:
    for expr, count, op in facts.floors:
        found = facts.space.resolve(expr)
        if found:
            yield found, count, op


def least_left(facts: Facts) -> dict[int, int]:
    """Returns how many indices of each axis have to stay so that every top-k finds enough.

    Where experts are chosen within groups that were chosen before (group-limited routing), only
    so many groups count, and each must hold its part.

    Reference: DeepSeek-AI, "DeepSeek-V2" (arXiv:2405.04434), section 2.2.2.
    """
    found = list(_chosen(facts))
    alone = {e[0]: n for e, n, _ in found if len(e) == 1 and not isinstance(e[0], Sum)}
    out: dict[int, int] = {}
    for expr, count, _ in found:
        atoms = list(leaves(expr))
        product = not any(isinstance(factor, Sum) for factor in expr)
        for atom in atoms:
            others = [alone.get(a, facts.space.extents[a].number) for a in atoms if a != atom]
            # Of a concatenation one part may hold all that is chosen.
            need = -(-count // prod(others)) if product else count
            out[atom] = max(out.get(atom, 1), need)
    return out


def check_floors(axes: Axes, selection: Selection) -> None:
    """Returns if every top-k finds enough of what is left.

    Raises:
        SurgeonError: `bad-plan`, with the operation that chooses more.
    """
    for expr, count, op in _chosen(axes.facts):
        if selection.touches(expr) and selection.width(expr) < count:
            where = axes.program.ops[op].where
            names = ", ".join(axes.numbered[a].name for a in leaves(expr) if a in axes.numbered)
            raise SurgeonError(
                Code.BAD_PLAN,
                f"too little is left of {names}",
                at=where or names,
                why=f"top-k chooses {count} of it, and {selection.width(expr)} would be left",
                try_=f"keep at least {count}",
                data={"axes": names, "least": count},
            )
