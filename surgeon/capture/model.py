"""Capture of Transformers models and of any module, on the meta device."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import UserError, UserErrorType
from torch.export import Dim, ExportedProgram

from surgeon.capture.attention import NAME, register
from surgeon.capture.experts import register_experts
from surgeon.capture.exported import DTYPES, read, renumbered
from surgeon.capture.repeat import Layers, expand, find_layers, short_circuit
from surgeon.capture.tables import with_tables
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Param, Program, TensorType, verify

INPUTS = ("input_ids", "attention_mask", "position_ids")
LONGEST = 1 << 20
SOFTMAX = ("aten.softmax.int", "aten._softmax.default")


class _Causal(nn.Module):
    """A causal language model from tokens, mask and positions to logits, without a cache."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).logits


STRIP = "model."
"""What the wrapper puts before every name."""


@dataclass(frozen=True)
class Captured:
    """A program with the tensors that capture itself had to keep (literals of the source)."""

    program: Program
    constants: Mapping[str, torch.Tensor]


def all_params(model: nn.Module) -> dict[str, Param]:
    """Returns every parameter and buffer of a model by its first name, tied ones merged."""
    stored = set(model.state_dict().keys())
    found: dict[int, Param] = {}
    named = [(n, t, "parameter") for n, t in model.named_parameters(remove_duplicate=False)]
    named += [(n, t, "buffer") for n, t in model.named_buffers(remove_duplicate=False)]
    for name, tensor, kind in named:
        kind = kind if name in stored else "computed"
        if id(tensor) in found:
            first = found[id(tensor)]
            found[id(tensor)] = replace(first, aliases=(*first.aliases, name))
        else:
            found[id(tensor)] = Param(
                name, TensorType(DTYPES[tensor.dtype], tuple(tensor.shape)), kind
            )
    return {p.name: p for p in found.values()}


def _longest(config: Any) -> int:
    for name in ("max_position_embeddings", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 8:
            return limit
    return LONGEST


def _export(model: nn.Module, config: Any, dynamic: bool) -> ExportedProgram:
    longest = _longest(config)
    try:
        return _exported(model, dynamic, longest)
    except UserError as error:
        # A model that pads or cuts at its longest input is of one kind for all that are shorter.
        if error.error_type is not UserErrorType.CONSTRAINT_VIOLATION or longest == LONGEST:
            raise
        return _exported(model, dynamic, longest - 1)


def _exported(model: nn.Module, dynamic: bool, longest: int) -> ExportedProgram:
    batch, seq = Dim("batch"), Dim("seq", max=longest)
    shape = (2, 7)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    mask = torch.ones(shape, dtype=torch.long, device="meta")
    positions = torch.zeros(shape, dtype=torch.long, device="meta")
    open_ = {0: batch, 1: seq}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(
            _Causal(model),
            (ids, mask, positions),
            dynamic_shapes=(open_, open_, open_) if dynamic else None,
            strict=False,
        )


def _names(dynamic: bool) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(INPUTS, ("batch", "seq")) if dynamic else {}


def _trained_length(module: nn.Module) -> object:
    """The length up to which a rotary module uses its first tables."""
    config: Any = getattr(module, "config", None)
    settings: Any = getattr(config, "rope_parameters", None) or {}
    found = [
        part["original_max_position_embeddings"]
        for part in (settings, *settings.values())
        if isinstance(part, dict) and part.get("rope_type") == "longrope"
    ]
    return min(found, default=getattr(config, "max_position_embeddings", None))


@contextmanager
def _static_rope(model: nn.Module) -> Generator[list[str], None, None]:
    """While active, rotary tables that are recomputed for long inputs keep their trained form.

    Transformers recomputes them in a wrapper that branches on the data (`max(position_ids)`);
    what the wrapper wraps is the branch for inputs within the trained length.
    """
    guards: list[str] = []
    classes: dict[nn.Module, type[nn.Module]] = {}
    for path, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        static = _without_wrappers(type(module)) if kinds is not None else None
        if static is None:
            continue
        names = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        dynamic = sorted(str(n) for n in names if n == "longrope" or "dynamic" in str(n))
        if not dynamic:
            continue
        classes[module] = type(module)
        module.__class__ = static
        guards.append(
            f"{path}: rope type {', '.join(dynamic)} is traced for positions below "
            f"{_trained_length(module)}"
        )
    try:
        yield guards
    finally:
        for module, own in classes.items():
            module.__class__ = own


def _without_wrappers(cls: type[nn.Module]) -> type[nn.Module] | None:
    """Returns the class with the first `forward` of its line that is wrapped taken out of it.

    The wrapper may lie behind a `super().forward` of the class's own, so what it wraps is put
    into the line before the class that has it. None where no `forward` is wrapped.
    """
    for base in cls.__mro__:
        forward: Any = vars(base).get("forward")
        if not hasattr(forward, "__wrapped__"):
            continue
        # no_grad wraps the branching decorator, so every layer comes off; a trace has no gradients.
        inner: Any = inspect.unwrap(forward)
        own = {"__module__": base.__module__, "forward": inner}
        plain: Any = type(base.__name__, (base,), own)
        if base is cls:
            return plain
        return type(cls.__name__, (cls, plain), {"__module__": cls.__module__})
    return None


def _failure(where: str, error: Exception) -> SurgeonError:
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    name = type(error).__name__
    guard = "DataDependent" in name or "data-dependent" in str(error)
    why = f"{name}: {first[:300]}"
    if "Constraints violated" in first:  # torch goes on with lines of hints for its own users
        why = (
            "its code runs for texts of one length only, as a recurrence over tokens or chunks of "
            f"a fixed length does ({name} of torch.export: the size of a dimension is fixed)"
        )
    return SurgeonError(
        Code.DATA_DEPENDENT if guard else Code.CAPTURE_FAILED,
        f"torch.export can't trace {where}",
        at=where,
        why=why,
        try_="check that the model runs on a batch of token ids without a cache; "
        "models that branch on data can't be captured",
    )


def capture_model(
    model: nn.Module, *, repeat: bool = True, attention: bool = True, dynamic: bool = True
) -> Captured:
    """Returns the program of a Transformers causal model; the model is left as it was.

    Args:
        model: on any device; its values are not read.
        repeat: trace one layer of each kind only, and repeat it in the program.
        attention: trace with Surgeon's attention operation where the model supports it.
        dynamic: leave batch and sequence open. Without it tracing takes a third of the time, which
            is enough to see what a model reads and what it computes it with.

    Raises:
        SurgeonError: `not-a-model` for a module without a Transformers configuration;
            `capture-failed` or `data-dependent`, with torch's reason.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise SurgeonError(
            Code.NOT_A_MODEL,
            f"{type(model).__name__} is no Transformers model",
            at=type(model).__name__,
            why="it has no configuration from which its inputs could be told",
            try_="surgeon.capture(module, example_inputs) takes any module",
        )
    meta = on_meta(model)
    meta.eval()
    meta_config: Any = meta.config
    before = getattr(meta_config, "_attn_implementation", None)
    if attention and supports_interface(meta):
        meta_config._attn_implementation = register()
    elif before == NAME:
        meta_config._attn_implementation = "eager"
    meta_config._experts_implementation = register_experts()
    where = f"{type(model).__name__}"
    try:
        captured, guards = _attempt(meta, config, repeat, dynamic)
    except SurgeonError:
        raise
    except Exception as error:
        raise _failure(where, error) from error
    program = replace(captured.program, guards=(*captured.program.guards, *guards))
    program, tables = with_tables(program)
    return Captured(verify(program), {**captured.constants, **tables})


def _attempt(
    meta: nn.Module, config: Any, repeat: bool, dynamic: bool
) -> tuple[Captured, list[str]]:
    """Traces with the attention that is set, or with the model's own where it doesn't use that.

    A model may say that it takes its attention from the interface and yet make its own mask.
    """
    own: Any = meta.config
    ours = getattr(own, "_attn_implementation", None) == NAME
    try:
        with _static_rope(meta) as guards:
            found = _captured(meta, config, repeat, dynamic)
        targets = {op.target for op in found.program.ops}
        if not ours or "surgeon.attention" in targets or not targets & set(SOFTMAX):
            return found, guards
    except Exception:  # whatever our mask breaks in the model's own code; the next one counts
        if not ours:
            raise
    plain = on_meta(meta).eval()
    settings: Any = plain.config
    settings._attn_implementation = "eager"
    settings._experts_implementation = register_experts()
    with _static_rope(plain) as guards:
        return _captured(plain, config, repeat, dynamic), guards


def supports_interface(model: nn.Module) -> bool:
    """Whether a Transformers model takes its attention from the interface."""
    return bool(getattr(model, "_supports_attention_backend", False)) or bool(
        getattr(model, "_supports_sdpa", False)
        and getattr(model, "_can_set_attn_implementation", lambda: False)()
    )


def on_meta(model: nn.Module) -> nn.Module:
    """Returns a copy of a Transformers model whose tensors have shapes and no values, as fp32."""
    config = copy.deepcopy(model.config)  # type: ignore[arg-type]
    with torch.device("meta"):
        out: nn.Module = type(model)(config)
    if hasattr(out, "tie_weights"):
        out.tie_weights()  # type: ignore[operator]
    return out.to(torch.float32)


def _captured(meta: nn.Module, config: Any, repeat: bool, dynamic: bool) -> Captured:
    persistent = frozenset(meta.state_dict().keys())
    layers, modules = find_layers(meta)
    if repeat and layers.repeats:
        short = _shortened(meta, config, layers, modules, persistent, dynamic)
        if short is not None:
            return short
    exported = _export(meta, config, dynamic)
    names = _names(dynamic)
    program, constants = read(exported, dims=names, strip=STRIP, persistent=persistent)
    return Captured(_whole_params(program, meta), constants)


def _whole_params(program: Program, meta: nn.Module) -> Program:
    """Parameters in the model's own order, under the names and ties that the model gives them."""
    full = all_params(meta)
    own = {alias: p for p in full.values() for alias in (p.name, *p.aliases)}
    used = {p.name for p in program.params}
    kept = [p for p in full.values() if used & {p.name, *p.aliases}]
    rest = [p for p in program.params if p.name not in own]
    return replace(program, params=(*kept, *rest))


def _shortened(
    meta: nn.Module,
    config: Any,
    layers: Layers,
    modules: Mapping[str, nn.Module],
    persistent: frozenset[str],
    dynamic: bool,
) -> Captured | None:
    try:
        with short_circuit(layers, modules):
            exported = _export(meta, config, dynamic)
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, RuntimeError):
        return None  # what stands in for a layer is not all that the model wants of it
    if layers.log:
        return None  # a layer computes with its own index: every layer is of a kind of its own
    names = _names(dynamic)
    program, constants = read(exported, dims=names, strip=STRIP, persistent=persistent)
    full = all_params(meta)
    extra = {p.name: p for p in program.params if p.kind == "constant"}
    expanded = expand(program, layers, {**full, **extra})
    if expanded is None:
        return None
    return Captured(_whole_params(renumbered(expanded.without_dead_code()), meta), constants)


def capture_module(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> tuple[Captured, ExportedProgram]:
    """Returns the program of any module, traced with example inputs.

    Raises:
        SurgeonError: `capture-failed` or `data-dependent`, with torch's reason.
    """
    try:
        exported = torch.export.export(
            module, tuple(args), dict(kwargs or {}), dynamic_shapes=dynamic_shapes, strict=False
        )
    except Exception as error:
        raise _failure(type(module).__name__, error) from error
    return capture_exported(exported), exported


def capture_exported(exported: ExportedProgram) -> Captured:
    """Returns the program of a `torch.export` graph."""
    program, constants = read(exported)
    program, tables = with_tables(program)
    return Captured(verify(program), {**constants, **tables})
