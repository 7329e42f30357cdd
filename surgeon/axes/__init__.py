"""Which channels of which tensors are one and the same thing."""

from surgeon.axes.axes import Axes, Axis, Member, Reason, to_text
from surgeon.axes.branches import Branch
from surgeon.axes.settle import analyse
from surgeon.axes.space import Expr, Extent, Sum

__all__ = [
    "Axes",
    "Axis",
    "Branch",
    "Expr",
    "Extent",
    "Member",
    "Reason",
    "Sum",
    "analyse",
    "to_text",
]
