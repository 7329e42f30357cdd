"""The Transformers target: a checkpoint that `from_pretrained` loads."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.branches import ATTENTION
from surgeon.axes.plan import Plan, Selection, cut, dropped
from surgeon.axes.space import Expr, leaves
from surgeon.axes.surgery import share_of
from surgeon.capture.model import all_params, capture_model
from surgeon.emit.hf_config import (
    PACKAGED,
    PER_LAYER_FAMILIES,
    SHARED,
    Biases,
    Candidate,
    Shape,
    family,
    per_layer,
    stock,
)
from surgeon.emit.layers import LayerShape, layer_shapes
from surgeon.emit.products import TWO_MAPS, ranked
from surgeon.emit.scales import Refused, Scale, folded_scales, table_ratios
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Arg, ParamRef, Ref

AUTO_MAP = {
    "AutoConfig": "modeling_surgeon_pruned.SurgeonPrunedConfig",
    "AutoModelForCausalLM": "modeling_surgeon_pruned.SurgeonPrunedForCausalLM",
}


GROUPED = 8
"""What the rows of experts' weights are multiples of, for torch's grouped products, which
Transformers uses: they want strides of 16 bytes, and weights have two bytes or more."""


@dataclass(frozen=True)
class Emission:
    """Everything that makes a Transformers checkpoint of a plan.

    Attributes:
        candidate: class and configuration.
        names: new parameter name by source name; a parameter that isn't named is not written.
        scales: parameters that fold corrected averages in.
        config_json: the configuration file's content where the packaged class reads it.
        notes: what the report says of the choice.
    """

    candidate: Candidate
    names: Mapping[str, str]
    scales: Mapping[str, tuple[Scale, ...]]
    config_json: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str:
        """The class's name as `config.json` has it."""
        if self.config_json is not None:
            return "SurgeonPrunedForCausalLM"
        return self.candidate.model_class.__name__


def _hidden(axes: Axes, selection: Selection) -> int:
    sizes = [selection.size(axes.number[a.name]) for a in axes.of_role("hidden")]
    numbers = [size for size in sizes if isinstance(size, int)]
    if len(numbers) != 1:
        raise Refused(
            f"the model has {len(numbers)} residual widths, and a configuration names one"
        )
    return numbers[0]


def _renamed(axes: Axes, plan: Plan, kept: tuple[LayerShape, ...]) -> dict[str, str]:
    """Returns the new name of every stored parameter that is left, layers numbered anew."""
    gone, selection = dropped(axes, plan), Selection(axes, plan)
    out: dict[str, str] = {}
    place: dict[str, str] = {}
    for number, layer in enumerate(kept):
        stem, _, _ = layer.path.rpartition(".")
        place[layer.path] = f"{stem}.{number}"
    lost = {b.layer for b in axes.branches} - set(place)
    for p in axes.program.params:
        if p.kind not in ("parameter", "buffer") or p.name in gone:
            continue
        if any(p.name.startswith(layer + ".") for layer in lost):
            continue
        old, new = next(
            ((old, new) for old, new in place.items() if p.name.startswith(old + ".")), ("", "")
        )
        for name in selection.parts(p.name):
            out[name] = new + name[len(old) :]
    return out


def choose(
    axes: Axes, plan: Plan, config: Any, model_class: type, buffers: Mapping[str, torch.Tensor]
) -> Emission:
    """Returns how a plan is written for Transformers, the plainest way first.

    Args:
        axes: the axes of the source.
        plan: a plan that fits them.
        config: the source's configuration.
        model_class: the source's class.
        buffers: the tables that the source computes by itself, by name.

    Raises:
        SurgeonError: `target-refused`, with the reason of every way tried.
    """
    selection = Selection(axes, plan)
    reasons: list[str] = []
    try:
        shape, names = laid_out(axes, plan)
    except Refused as refused:
        raise _refusal([str(refused)], config) from refused
    kept = shape.layers
    differ = _differences(kept, len(set(selection.splits) - dropped(axes, plan)))
    if not differ:
        for label, make in stock(config, model_class, shape):
            try:
                return _stock(axes, selection, shape, names, _made(make), buffers)
            except Refused as refused:
                reasons.append(f"{label}: {refused}")
    else:
        reasons.append(f"{model_class.__name__}: {differ}")
    if family(config) in PER_LAYER_FAMILIES and not any(s.spelled for s in kept):
        return packaged(axes, selection, shape, names, config, differ, reasons)
    reasons.append(_no_file(config))
    raise _refusal(reasons, config)


def laid_out(axes: Axes, plan: Plan) -> tuple[Shape, dict[str, str]]:
    """Returns the sizes that are left, and the new name of every stored parameter that is.

    Raises:
        Refused: no layer is left, or there is more than one residual width.
    """
    shapes = layer_shapes(axes, plan)
    kept = tuple(s for s in shapes if s.attention or s.mlp)
    if not shapes:
        raise Refused("the model has no decoder layers")
    if not kept:
        raise Refused("no layer is left")
    places = tuple(i for i, s in enumerate(shapes) if s in kept)
    shape = Shape(_hidden(axes, Selection(axes, plan)), kept, places)
    return shape, _renamed(axes, plan, kept)


def _differences(layers: tuple[LayerShape, ...], products: int) -> str:
    """Returns what keeps a class from describing every layer; empty if nothing does.

    Args:
        layers: their shapes.
        products: how many maps are two.
    """
    found: list[str] = []
    for what in ("attention", "mlp"):
        if any(not getattr(s, what) for s in layers):
            found.append(f"layers lack their {'MLP' if what == 'mlp' else what}")
    whole = [s for s in layers if s.attention and s.mlp]
    # Dense layers before those with experts have a width of their own.
    kinds = [[s.widths for s in whole if bool(s.expert_ffn) == mixed] for mixed in (False, True)]
    attention = {s.attention_widths for s in whole}
    if len(attention) > 1 or any(len(set(widths)) > 1 for widths in kinds):
        found.insert(0, "its layers differ in width")
    if products:
        found.append(f"{TWO_MAPS} ({products} times)")
    return " and ".join(found)


def check_factors(config: Any, model_class: type) -> None:
    """Sees to it that a model's checkpoint may have two maps in place of one.

    Raises:
        SurgeonError: `target-refused` where neither its class nor the modelling file has them.
    """
    if family(config) not in PER_LAYER_FAMILIES:
        raise _refusal([f"{model_class.__name__}: {TWO_MAPS}", _no_file(config)], config)


def _no_file(config: Any) -> str:
    return f"no per-layer modelling file for {family(config)}"


def _refusal(reasons: list[str], config: Any) -> SurgeonError:
    return SurgeonError(
        Code.TARGET_REFUSED,
        "no Transformers class can express this plan",
        at=f"target Transformers, model type {config.model_type}",
        why="; ".join(reasons),
        try_="the same share of every layer (--role ffn=…), or --to pt2 or --to onnx",
        data={"reasons": reasons},
    )


def _made(make: Callable[[], Candidate]) -> Candidate:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return make()
    except (AttributeError, ValueError, TypeError, StrictDataclassError) as error:
        last = str(error).strip().splitlines()[-1].strip()
        raise Refused(f"its configuration refuses the sizes ({last[:160]})") from error


def _stock(
    axes: Axes,
    selection: Selection,
    shape: Shape,
    names: dict[str, str],
    candidate: Candidate,
    buffers: Mapping[str, torch.Tensor],
) -> Emission:
    """Returns the emission if the candidate's own model is the pruned one, part by part."""
    model, wanted = described(selection, names, candidate)
    try:
        have = capture_model(model, dynamic=False).program
    except SurgeonError as error:
        raise Refused(f"its model can't be captured ({_line(error)})") from error
    missing = [p.name for p in have.params if p.kind == "parameter" and p.name not in wanted]
    if missing:
        raise Refused(f"it has a parameter {missing[0]} that the pruned model lacks")
    _same_attention(shape, have)
    fixed = table_ratios(axes, selection, candidate, buffers)
    scales = folded_scales(axes, selection, fixed)
    notes = [candidate.note] if candidate.note else []
    if scales:
        notes.append(
            f"averages over kept channels are folded into {len(scales)} parameters, so that they "
            "stay what they were with the channels masked"
        )
    return Emission(candidate, names, scales, None, tuple(notes))


def described(
    selection: Selection, names: Mapping[str, str], candidate: Candidate
) -> tuple[Any, Mapping[str, tuple[int, ...]]]:
    """Returns a candidate's model without values, and the shapes that its parameters have to have.

    Raises:
        Refused: its class can't be built, or has other parameters.
    """
    try:
        with torch.device("meta"):
            model = candidate.model_class(candidate.config)
    except (ValueError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise Refused(f"its model can't be built ({_line(error)})") from error
    model.tie_weights()
    every = all_params(model)
    alias = {a: p.name for p in every.values() for a in p.aliases}
    wanted = {alias.get(new, new): selection.shape(old) for old, new in names.items()}
    for name, size in wanted.items():
        found = every.get(name)
        if found is None or found.kind not in ("parameter", "buffer"):
            raise Refused(f"it has no parameter {name}")
        if found.type.shape != size:
            raise Refused(f"{name} would be {list(found.type.shape)}, it is {list(size)}")
    return model, wanted


def multiple_of(axes: Axes, config: Any, model_class: type) -> dict[str, int]:
    """Returns what widths should be multiples of, by axis, for a class of Transformers."""
    out = _heads_divide(axes, config, model_class)
    if not axes.of_role("experts"):
        return out
    for axis in axes.of_role("hidden"):
        out[axis.name] = math.lcm(out.get(axis.name, 1), GROUPED)
    widths = axes.of_role("ffn")
    inner = [a for a in widths if any(axes.get(n).role == "experts" for n in a.outer)]
    out |= {axis.name: GROUPED for axis in inner}
    shared = next((int(getattr(config, n, 0) or 0) for n in SHARED if hasattr(config, n)), 0)
    if shared:
        # The MLP beside the experts has the width of so many, before and after: both round alike.
        sizes = {axis.size * shared for axis in inner}
        out |= {a.name: GROUPED * shared for a in widths if a not in inner and a.size in sizes}
    return out


def _heads_divide(axes: Axes, config: Any, model_class: type) -> dict[str, int]:
    """Returns what the residual width should be a multiple of, by axis, for a stock class.

    Some configurations refuse widths that the heads don't divide. None says so: it is found by
    asking for a width that they don't divide, and for one that they do.
    """
    hidden, layers = axes.of_role("hidden"), layer_shapes(axes, Plan())
    heads = layers[0].heads if layers else 0
    if family(config) in PER_LAYER_FAMILIES or len(hidden) != 1 or heads < 2:
        return {}
    (axis,) = hidden
    whole = (axis.size - 1) // heads * heads
    odd = next((n for n in range(axis.size - 1, 0, -1) if n % heads), 0)
    if not axis.prunable or not whole or not odd:
        return {}

    def taken(kept: int) -> bool:
        plan = Plan((cut(axis, range(kept)),))
        shape = Shape(kept, layers, tuple(range(len(layers))))
        names = _renamed(axes, plan, layers)
        for _, make in stock(config, model_class, shape):
            try:
                described(Selection(axes, plan), names, _made(make))
            except Refused:
                continue
            return True
        return False

    return {axis.name: heads} if taken(whole) and not taken(odd) else {}


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


def _same_attention(shape: Shape, have: Any) -> None:
    literals = [
        (float(op.kwarg("scale", 0.0)), op.kwarg("window"))
        for op in have.ops
        if op.target == "surgeon.attention"
    ]
    if not literals:
        return  # captured as it stands: verification compares results
    for layer, (scale, window) in zip(shape.layers, literals, strict=True):
        if not math.isclose(scale, layer.scale, rel_tol=1e-6):
            raise Refused(
                f"it would scale attention by {scale:.6g}, the model uses {layer.scale:.6g}"
            )
        if window != layer.window:
            raise Refused(f"{layer.path} would have the window {window}, it has {layer.window}")


def packaged(
    axes: Axes,
    selection: Selection,
    shape: Shape,
    names: dict[str, str],
    config: Any,
    differ: str,
    reasons: Sequence[str],
) -> Emission:
    """Returns the emission for the packaged modelling file, which reads widths per layer.

    `differ` says how layers differ, and `reasons` why no class of Transformers will do.
    """
    attention = [op for op in axes.program.ops if op.target in ATTENTION]
    norms: dict[str, set[float]] = {"hidden": set(), "qk": set()}
    for index, op in enumerate(axes.program.ops):
        if op.target == "aten.mean.dim":
            kind = "hidden" if roles_of(axes, op.arg(0)) & {"hidden"} else "qk"
            norms[kind].add(share_of(axes, selection, index, op))
    rotary = axes.of_role("rotary")
    cuts = [selection.plan.by_axis.get(a.name) for a in rotary]
    pairs = [int(i) for i in cuts[0].array] if len(cuts) == 1 and cuts[0] else None
    # An earlier result's own file knows what was removed before: this plan counts from there.
    earlier = config if config.model_type == PACKAGED else None
    if earlier is not None:
        rotary_dim = int(earlier.rotary_dim)
        biases = Biases(
            earlier.attention_bias, earlier.attention_output_bias, earlier.mlp_bias, earlier.qk_norm
        )
    else:
        rotary_dim = selection.full_width(_dims(axes, attention[0].arg(0))[-1]) if attention else 0
        biases = _biases(axes, names)
    data = per_layer(
        config,
        shape,
        biases,
        rotary_dim=rotary_dim,
        rotary_pairs=_composed(earlier.rotary_pairs if earlier else None, pairs),
        norm_mean_scale=max(norms["hidden"], default=1.0)
        * (earlier.norm_mean_scale if earlier else 1.0),
        qk_norm_mean_scale=max(norms["qk"], default=1.0)
        * (earlier.qk_norm_mean_scale if earlier else 1.0),
    )
    names, ranks = ranked(selection, names)
    if ranks:
        data["ranks"] = ranks
    data["architectures"] = ["SurgeonPrunedForCausalLM"]
    data["auto_map"] = AUTO_MAP
    data["model_type"] = PACKAGED
    why = [differ] if differ else []
    if ranks and not selection.splits:
        why.append(TWO_MAPS)
    if data["rotary_pairs"] is not None:
        why.append("rotary pairs are missing")
    if any(s.attention and s.qk != s.v for s in shape.layers):
        why.append("value heads and query heads differ in width")
    if not why:
        why += [f"{PACKAGED} is what it was made from"] if earlier is not None else reasons
    note = (
        f"{'; '.join(why)}: the checkpoint carries its modelling file, load it with "
        "trust_remote_code=True (it does not need Surgeon)"
    )
    candidate = Candidate(object, None, note, remote=True)
    return Emission(candidate, names, {}, data, (note,))


def _composed(before: list[int] | None, kept: list[int] | None) -> list[int] | None:
    if before is None or kept is None:
        return kept if before is None else before
    return [before[i] for i in kept]


def _dims(axes: Axes, arg: Arg) -> tuple[Expr, ...]:
    assert isinstance(arg, Ref | ParamRef)
    return axes.dims[("%" if isinstance(arg, Ref) else "$") + arg.name]


def roles_of(axes: Axes, arg: Arg, dim: int = -1) -> set[str]:
    """Returns the roles of the axes in one dimension; an axis of a single index isn't there."""
    found = (axes.numbered.get(a) for a in leaves(_dims(axes, arg)[dim]))
    return {axis.role for axis in found if axis}


def _biases(axes: Axes, names: Collection[str]) -> Biases:
    """Reads from the program which projections have a bias, and whether heads have a norm."""
    attention = output = mlp = qk_norm = False
    for op in axes.program.ops:
        own = {r.name for r in op.args if isinstance(r, ParamRef)} & set(names)
        if op.target == "aten.linear.default":
            bias, weight = op.arg(2), op.arg(1)
            if not isinstance(bias, ParamRef) or bias.name not in own:
                continue
            made, read = roles_of(axes, weight, 0), roles_of(axes, weight, 1)
            if "ffn" in made | read:
                mlp = True
            elif "hidden" in made:
                output = True
            else:
                attention = True
        elif any(
            len(axes.param_dims(n)) == 1 and "hidden" not in roles_of(axes, ParamRef(n))
            for n in own
        ):
            qk_norm = True
    return Biases(attention, output, mlp, qk_norm)
