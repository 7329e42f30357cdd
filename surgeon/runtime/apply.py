"""A plan applied to weights, tensor by tensor: sliced, or masked in full shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.channels import along
from surgeon.axes.grouped import unmasked
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.space import leaves
from surgeon.axes.surgery import centred
from surgeon.ir.program import Op, ParamRef, Ref
from surgeon.runtime.routing import kept_choices

Get = Callable[[str], torch.Tensor]


def rewritten(get: Get, rewrites: Mapping[str, torch.Tensor]) -> Get:
    """Returns a reader of weights in which some parameters are replaced."""
    return lambda name: rewrites[name] if name in rewrites else get(name)


def removed(selection: Selection, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns what is left of a parameter: rows and columns of kept indices, contiguous.

    Of one that becomes two, it returns what is left of either.
    """
    if not selection.cuts_into(name):
        return tensor
    if not selection.separable(name):
        flat = torch.from_numpy(selection.flat(name))
        return tensor.reshape(-1)[flat].reshape(selection.shape(name))
    for dim, kept in enumerate(selection.kept(name)):
        if kept is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(kept))
    return tensor.contiguous()


def masked(selection: Selection, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a parameter in full shape with zeros where an index was removed.

    Heads that are alike lose none: one stands for all of its group.
    """
    if selection.plan.grouped:
        selection = Selection(selection.axes, unmasked(selection.plan))
    if not any(selection.touches(e) for e in selection.axes.param_dims(name)):
        return tensor
    if selection.separable(name):
        out = tensor.clone()
        for dim, kept in enumerate(selection.kept(name)):
            if kept is not None:
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
                gone[torch.from_numpy(kept)] = False
                out.index_fill_(dim, gone.nonzero().flatten(), 0)
        return out
    out = torch.zeros_like(tensor).reshape(-1)
    flat = torch.from_numpy(selection.flat(name))
    out[flat] = tensor.reshape(-1)[flat]
    return out.reshape(tensor.shape)


def alike(axes: Axes, plan: Plan, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a full-size parameter in which all heads of a group are as its first, which stays.

    Args:
        axes: with heads told apart.
        plan: with its groups.
        name: of the parameter.
        tensor: its values.
    """
    for axis_name in plan.grouped:
        axis, count = axes.by_name[axis_name], plan.by_axis[axis_name].count
        for dim in [m.dim for m in axis.members if m.param == name]:
            for found in along(axes, axis, axes.param_dims(name)[dim]):
                at = torch.from_numpy(found.reshape(count, axis.size // count, -1))
                moved = tensor.movedim(dim, 0).clone()
                own = moved[at]
                moved[at] = own[:, :1].expand_as(own)
                tensor = moved.movedim(0, dim).contiguous()
    return tensor


Normaliser = Callable[..., torch.Tensor]


def kept_layer_norm(kept: torch.Tensor) -> Normaliser:
    """Returns LayerNorm in full shape whose mean and variance see kept channels only.

    Args:
        kept: ones and zeros, of the normalised shape.
    """
    count = float(kept.sum())

    def norm(
        x: torch.Tensor,
        shape: list[int],
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
        cudnn_enable: bool = True,
    ) -> torch.Tensor:
        dims = tuple(range(x.dim() - len(shape), x.dim()))
        seen = kept.to(x.device)
        mean = (x * seen).sum(dims, keepdim=True) / count
        centred = (x - mean) * seen
        var = centred.square().sum(dims, keepdim=True) / count
        out = centred * torch.rsqrt(var + eps)
        out = out if weight is None else out * weight
        return out if bias is None else out + bias

    return norm


def kept_rms_norm(kept: torch.Tensor) -> Normaliser:
    """Returns the fused RMSNorm in full shape whose mean square sees kept channels only."""
    count = float(kept.sum())

    def norm(
        x: torch.Tensor,
        shape: list[int],
        weight: torch.Tensor | None = None,
        eps: float | None = None,
    ) -> torch.Tensor:
        dims = tuple(range(x.dim() - len(shape), x.dim()))
        mean = (x.square() * kept.to(x.device)).sum(dims, keepdim=True) / count
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        out = x * torch.rsqrt(mean + eps)
        return out if weight is None else out * weight

    return norm


def kept_mean(kept: torch.Tensor) -> Normaliser:
    """Returns the average in full shape over kept channels only.

    Args:
        kept: ones and zeros, of as many dimensions as what is averaged, 1 where it isn't.
    """
    count = float(kept.sum())

    def mean(
        x: torch.Tensor, dims: list[int], keepdim: bool = False, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        x = x if dtype is None else x.to(dtype)
        return (x * kept.to(x.device)).sum(dims, keepdim=keepdim) / count

    return mean


_KEPT_ONLY = {
    "aten.layer_norm.default": kept_layer_norm,
    "aten.rms_norm.default": kept_rms_norm,
}


def kept_only(
    axes: Axes, selection: Selection, program_ops: Mapping[str, int]
) -> dict[int, Normaliser]:
    """Returns for a masked reference the normalisers that must see kept channels only.

    Args:
        axes: the axes of the whole model.
        selection: what is removed.
        program_ops: the index, in the reference program, of the operation that makes each value.
    """
    out: dict[int, Normaliser] = {}
    out |= kept_choices(axes, selection, program_ops)
    for op in axes.program.ops:
        if op.target == "aten.mean.dim" and op.outputs[0] in program_ops:
            found = _kept_average(axes, selection, op)
            if found is not None:
                out[program_ops[op.outputs[0]]] = found
            continue
        make = _KEPT_ONLY.get(op.target)
        index = program_ops.get(op.outputs[0])
        shape = op.arg(1)
        if make is None or index is None or not isinstance(shape, tuple):
            continue
        exprs = axes.dims["%" + op.outputs[0]][-len(shape) :]
        if not any(a in selection.cuts for e in exprs for a in leaves(e)):
            continue
        sizes = [s for s in shape if isinstance(s, int)]
        kept = torch.zeros(prod(sizes))
        kept[torch.from_numpy(selection.indices(tuple(f for e in exprs for f in e)))] = 1.0
        out[index] = make(kept.reshape(sizes))
    return out


def _kept_average(axes: Axes, selection: Selection, op: Op) -> Normaliser | None:
    """Returns an average that sees kept channels only; None where it is scaled by their share.

    An average over both kinds of axes is told of the first kind alone: of the other, masked
    channels are zero and `share_of` accounts for them.
    """
    x, dims = op.arg(0), op.arg(1)
    assert isinstance(x, Ref | ParamRef)
    exprs = axes.dims[("%" if isinstance(x, Ref) else "$") + x.name]
    if not isinstance(dims, tuple):
        return None
    over = sorted(d % len(exprs) for d in dims if isinstance(d, int))
    whole = tuple(f for d in over for f in exprs[d])
    unseen = {a for f in whole if centred(axes, (f,)) for a in leaves((f,))}
    cuts = tuple(c for number, c in selection.cuts.items() if number in unseen)
    if not cuts:
        return None
    selection = Selection(axes, Plan(cuts))
    sizes = [axes.program.type_of(x).shape[d] for d in over]
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) != len(sizes):
        return None
    kept = torch.zeros(prod(numbers))
    kept[torch.from_numpy(selection.indices(whole))] = 1.0
    shape = [numbers[over.index(d)] if d in over else 1 for d in range(len(exprs))]
    return kept_mean(kept.reshape(shape))
