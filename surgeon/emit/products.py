"""Two maps in place of one, as the packaged modelling file has them."""

from __future__ import annotations

from collections.abc import Mapping

from surgeon.axes.plan import Selection

TWO_MAPS = "two maps stand in place of one"
"""What no class of Transformers has."""

DOWN = ".down.weight"
"""The end of the name of a product's first map, in the modelling file as in a plan."""


def ranked(selection: Selection, names: Mapping[str, str]) -> tuple[dict[str, str], dict[str, int]]:
    """Returns names with biases where the modelling file has them, and the ranks by module.

    The ranks are of maps that are two by this plan or an earlier one.

    Args:
        selection: the plan's.
        names: new parameter name by source name.
    """
    halves = {old: new.removesuffix(DOWN) for old, new in names.items() if new.endswith(DOWN)}
    ranks = {module: selection.shape(old)[0] for old, module in halves.items()}
    out = dict(names)
    for old, new in names.items():
        module = new.removesuffix(".bias")
        if module != new and module in ranks:
            out[old] = module + ".up.bias"
    return out, ranks
