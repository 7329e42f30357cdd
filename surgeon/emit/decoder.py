"""A pruned decoder as runtimes with one class for all see it: llama.cpp, vLLM.

Such a class is Llama's: RMSNorms over what is there, attention scaled by its own head width, gated
MLPs with SiLU. Averages over removed channels, and scales that come from an earlier width, are
folded into weights. What the result means is checked by a model that computes just that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.fold import Fold
from surgeon.axes.plan import Plan, Selection, dropped
from surgeon.axes.space import leaves
from surgeon.emit import hf_writing
from surgeon.emit import huggingface as hf
from surgeon.emit.hf_config import PACKAGED, PER_LAYER_FAMILIES, Biases, family
from surgeon.emit.layers import LayerShape
from surgeon.emit.products import TWO_MAPS
from surgeon.emit.scales import Refused, Scale, folded_scales
from surgeon.emit.target import Refusal
from surgeon.ir.program import Op
from surgeon.runtime.apply import Get, removed

QUERIES = (".self_attn.q_proj.weight", ".self_attn.q_proj.bias")
QUERY_NORM = ".self_attn.q_norm.weight"
HEAD = "lm_head.weight"
"""Ends of names in the families of Llama, which these formats' own names are made from."""

ELSEWHERE = "--to transformers, or --to onnx or --to pt2, which can express any plan"


@dataclass(frozen=True)
class Decoder:
    """What a format has to say of a pruned decoder.

    Attributes:
        config: the source's configuration.
        emission: names and folded scales of its tensors, and the configuration of a model that
            computes what the format's class does.
        selection: the plan's arithmetic.
        layers: the shapes of those that are left.
        hidden: the residual width.
        head: the width of a head, of queries as of values; 0 where no layer has attention.
        biases: which maps have one, and whether heads are normalised.
        tied: whether the head is the embedding.
        frequencies: of the rotary pairs, radians per position, [head / 2].
        pairs: whether all rotary pairs are there.
    """

    config: Any
    emission: hf.Emission
    selection: Selection
    layers: tuple[LayerShape, ...]
    hidden: int
    head: int
    biases: Biases
    tied: bool
    frequencies: torch.Tensor
    pairs: bool

    @property
    def family(self) -> str:
        """The model type of the source."""
        return family(self.config)

    @property
    def vocab(self) -> int:
        """Tokens."""
        return int(self.config.vocab_size)

    @property
    def uniform(self) -> bool:
        """Whether all layers are alike, with both branches."""
        return all(s.attention and s.mlp for s in self.layers) and (
            len({(s.heads, s.kv_heads, s.ffn) for s in self.layers}) == 1
        )

    @property
    def rope(self) -> Mapping[str, Any]:
        """The source's rotary parameters."""
        return self.config.rope_parameters or {}

    def tensor(self, get: Get, old: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Returns a tensor as the format is to hold it, by its name in the source."""
        return hf_writing.final(self.emission, self.selection, get, old, dtype)


@dataclass(frozen=True)
class Material:
    """Where a decoder's tensors and files come from.

    Attributes:
        get: reads a parameter in full size, fp32.
        dtype_of: the element type in which it is stored.
        source: where the tokenizer comes from.
    """

    get: Get
    dtype_of: Callable[[str], torch.dtype]
    source: Any


def decoder_of(axes: Axes, plan: Plan, config: Any, fixed: Mapping[str, torch.Tensor]) -> Decoder:
    """Returns a decoder in the form that these formats share.

    Args:
        axes: the axes of the source.
        plan: a plan that fits them.
        config: the source's configuration.
        fixed: the tables that the source computes by itself, by name.

    Raises:
        Refused: it has no such form. The text is the reason.
    """
    if family(config) not in PER_LAYER_FAMILIES:
        known = ", ".join(PER_LAYER_FAMILIES)
        raise Refused(f"it has models like {known}, and this is {family(config)}")
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        raise Refused(f"its MLPs use SiLU, and this model uses {config.hidden_act}")
    selection = Selection(axes, plan)
    if set(selection.splits) - dropped(axes, plan) or getattr(config, "ranks", None):
        raise Refused(TWO_MAPS)
    shape, names = hf.laid_out(axes, plan)
    if any(s.spelled for s in shape.layers):
        raise Refused("the model spells its attention out, so that nothing tells its heads")
    attending = [s for s in shape.layers if s.attention]
    widths = {(s.qk, s.v) for s in attending}
    if len(widths) > 1 or any(qk != v for qk, v in widths):
        said = ", ".join(f"{qk} and {v}" for qk, v in sorted(widths)[:3])
        raise Refused(f"heads of queries and values have one width for all layers, not {said}")
    if any(s.window is not None for s in attending):
        raise Refused("it has no sliding windows")
    head = attending[0].qk if attending else 0
    frequencies, pairs = _frequencies(axes, selection, config, fixed)
    if attending and 2 * len(frequencies) != head:
        raise Refused(f"{2 * len(frequencies)} of the {head} channels of a head are turned")
    emission = hf.packaged(axes, selection, shape, names, config, "", [""])
    data: dict[str, Any] = copy.deepcopy(dict(emission.config_json or {}))
    biases = Biases(
        *(data[n] for n in ("attention_bias", "attention_output_bias", "mlp_bias", "qk_norm"))
    )
    scales = folded_scales(axes, selection, {}, _earlier(axes, config))
    natural = head**-0.5 if head else 1.0
    _scale_queries(scales, names, shape.layers, natural, biases.qk_norm)
    data |= {"norm_mean_scale": 1.0, "qk_norm_mean_scale": 1.0, "attention_scaling": natural}
    for own in data.get("per_layer_config", {}).values():
        own.pop("attention_scaling", None)
    made = hf.Emission(emission.candidate, names, scales, data, ())
    return Decoder(
        config=config,
        emission=made,
        selection=selection,
        layers=shape.layers,
        hidden=shape.hidden,
        head=head,
        biases=biases,
        tied=HEAD not in names.values(),
        frequencies=frequencies,
        pairs=pairs,
    )


def _frequencies(
    axes: Axes, selection: Selection, config: Any, fixed: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, bool]:
    """Returns the frequencies of the rotary pairs that are left, and whether those are all."""
    rotary = {axes.number[axis.name] for axis in axes.of_role("rotary")}
    tables = [
        p.name
        for p in axes.program.params
        if p.kind == "computed"
        and len(p.type.shape) == 1
        and rotary & set(leaves(axes.dims["$" + p.name][0]))
    ]
    if not tables:
        return torch.zeros(0), True
    if len(tables) > 1:
        raise Refused(f"all layers turn by the same frequencies, not by {', '.join(tables)}")
    found = removed(selection, tables[0], fixed[tables[0]]).double()
    every = getattr(config, "rotary_pairs", None) is None
    return found, every and len(found) == fixed[tables[0]].numel()


def _earlier(axes: Axes, config: Any) -> Callable[[Op], float]:
    """Returns by what an earlier result corrects its averages."""
    if config.model_type != PACKAGED:
        return lambda _: 1.0

    def share(op: Op) -> float:
        if op.target != "aten.mean.dim":
            return 1.0
        over = hf.roles_of(axes, op.arg(0))
        return float(config.norm_mean_scale if "hidden" in over else config.qk_norm_mean_scale)

    return share


def _scale_queries(
    scales: dict[str, tuple[Scale, ...]],
    names: Mapping[str, str],
    layers: tuple[LayerShape, ...],
    natural: float,
    normed: bool,
) -> None:
    """Folds into the queries what a layer scales its attention by, other than by its width."""
    ends = (QUERY_NORM,) if normed else QUERIES
    for number, layer in enumerate(layers):
        if not layer.attention or math.isclose(layer.scale, natural, rel_tol=1e-6):
            continue
        stem = f"{layer.path.rpartition('.')[0]}.{number}"
        scale = Scale(layer.scale / natural, Fold(Fraction(1)))
        for old, new in names.items():
            if new in [stem + end for end in ends]:
                scales[old] = (*scales.get(old, ()), scale)


def refusals(
    target: str,
    axes: Axes,
    plan: Plan,
    origin: Any,
    more: Callable[[Decoder], list[Refusal]],
) -> list[Refusal]:
    """Returns why a plan has no such form, or else what a format has to say against it.

    Args:
        target: its name.
        axes: the axes of the source.
        plan: a plan that fits them.
        origin: what has the source, and the tables that it computes.
        more: the format's own rules.
    """
    source = getattr(origin, "source", None)
    if source is None:
        why = "it is written from a Transformers model's configuration, and this is a module"
        return [Refusal("", why, "--to onnx or --to pt2, which can express any plan")]
    try:
        found = decoder_of(axes, plan, source.config, origin.fixed)
    except Refused as refused:
        return [Refusal(f"{target}: {source.config.model_type}", str(refused), ELSEWHERE)]
    return more(found)


def heads_stay(axes: Axes, why: str) -> dict[str, str]:
    """Returns a reason to leave the widths of heads alone, by axis."""
    return {a.name: why for role in ("v", "qk", "rotary") for a in axes.of_role(role)}


def starts_with_attention(axes: Axes, why: str) -> dict[str, str]:
    """Returns a reason to leave the first layer's attention where it is, by branch."""
    first = axes.branches[0].layer if axes.branches else ""
    return {b.name: why for b in axes.branches if b.layer == first and b.kind == "attention"}
