"""The shape of every decoder layer after a plan, read off the axes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from surgeon.axes.axes import Axes
from surgeon.axes.branches import ATTENTION, DISPATCH, Branch
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.space import leaves
from surgeon.ir.program import Op, ParamRef, Ref

_PROJECTIONS = {"aten.linear.default": 0, "aten.addmm.default": 1}
"""Operations that contract with a weight, and which argument they contract."""


@dataclass(frozen=True)
class LayerShape:
    """Widths of one layer; 0 where the branch is missing.

    `qk` is the width of one query or key head, `v` of one value head; `window` and `scale` are
    the attention's own literals. Of a mixture of experts `experts` are the groups that they are
    chosen in, if there are any, and how many each has; `expert_ffn` is the width of one, and `ffn`
    that of the MLP beside it. Where the model spells its attention out (`spelled`), nothing
    says which of its sizes are heads, and all of these are 0.
    """

    path: str
    heads: int = 0
    kv_heads: int = 0
    qk: int = 0
    v: int = 0
    ffn: int = 0
    experts: tuple[int, ...] = ()
    expert_ffn: int = 0
    scale: float = 0.0
    window: int | None = None
    spelled: bool = False

    @property
    def attention(self) -> bool:
        """Whether the layer has attention."""
        return self.heads > 0 or self.spelled

    @property
    def mlp(self) -> bool:
        """Whether the layer has an MLP."""
        return self.ffn > 0 or self.expert_ffn > 0

    @property
    def widths(self) -> tuple[object, ...]:
        """Everything but the place and the window: what must agree for a uniform model."""
        return (*self.attention_widths, self.ffn, self.experts, self.expert_ffn)

    @property
    def attention_widths(self) -> tuple[object, ...]:
        """Everything that the attention's place in the model doesn't say."""
        return (self.heads, self.kv_heads, self.qk, self.v, self.scale, self.spelled)


def _branch(axes: Axes, selection: Selection, branch: Branch) -> dict[str, object]:
    ops = [axes.program.ops[i] for i in branch.ops]
    attention = [op for op in ops if op.target in ATTENTION]
    if attention:
        return _attention(axes, selection, attention[0])
    if branch.kind == "attention":
        return {"spelled": True}
    sent = next((op for op in ops if op.target == DISPATCH), None)
    if sent is not None:
        return _mixture(axes, selection, sent, ops)
    # The width is read off the last projection, so that it is found where it is 1 and no axis.
    made = {op.outputs[0]: op for op in ops if op.target in _PROJECTIONS}
    for op in reversed(ops):
        if op.target not in _PROJECTIONS:
            continue
        key = _key(op, _PROJECTIONS[op.target])
        while key[1:] in made:  # a projection of what one makes: both are one map, of low rank
            op = made[key[1:]]
            key = _key(op, _PROJECTIONS[op.target])
        return {"ffn": selection.width(axes.dims[key][-1])}
    return {}


def _mixture(axes: Axes, selection: Selection, sent: Op, ops: list[Op]) -> dict[str, object]:
    """Reads off the last product before experts are summed how wide each is."""
    chosen = axes.dims["%" + sent.outputs[0]][-1]
    inner = [op for op in ops if op.target == "aten.matmul.default"]
    return {
        "experts": tuple(selection.width((factor,)) for factor in chosen),
        "expert_ffn": selection.width(axes.dims[_key(inner[-1], 0)][-1]),
    }


def _attention(axes: Axes, selection: Selection, op: Op) -> dict[str, object]:
    q, k, v = axes.dims[_key(op, 0)], axes.dims[_key(op, 1)], axes.dims[_key(op, 2)]
    groups = [a for a in leaves(k[1]) if a in axes.numbered and axes.numbered[a].role == "kv_heads"]
    kv_heads = prod(s for s in (selection.size(a) for a in groups) if isinstance(s, int))
    if op.target == "surgeon.attention":  # heads are repeated inside the operation, not before
        kv_heads = selection.width(k[1])
    scale, window = op.kwarg("scale"), op.kwarg("window")
    before = selection.full_width(q[-1])
    return {
        "heads": selection.width(q[1]),
        "kv_heads": kv_heads,
        "qk": selection.width(q[-1]),
        "v": selection.width(v[-1]),
        "scale": float(scale) if isinstance(scale, int | float) else before**-0.5,
        "window": window if isinstance(window, int) else None,
    }


def _key(op: Op, index: int) -> str:
    ref = op.arg(index)
    assert isinstance(ref, Ref | ParamRef)
    return ("%" if isinstance(ref, Ref) else "$") + ref.name


def layer_shapes(axes: Axes, plan: Plan) -> tuple[LayerShape, ...]:
    """Returns the shape of every layer of the model, those without any branch left included."""
    selection = Selection(axes, plan)
    found: dict[str, dict[str, object]] = {}
    for branch in axes.branches:
        widths = found.setdefault(branch.layer, {})
        if branch.name not in plan.branches:
            widths.update(_branch(axes, selection, branch))
    return tuple(LayerShape(path, **widths) for path, widths in found.items())  # type: ignore[arg-type]
