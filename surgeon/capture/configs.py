"""Configs, and the model classes that belong to them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import nn

import surgeon
from surgeon.errors import Code, SurgeonError, near

LAYERS = 10_000
MODULES = 300_000
"""More than any model has: the largest, of 61 layers with 384 experts each, has some 100,000. Even
without values, modules take memory and time.
"""

OWN_CODE = "modeling_surgeon_pruned.py"
"""The modelling file in Surgeon's own per-layer checkpoints."""


def not_a_model(what: str, *, at: str, why: str, try_: str) -> SurgeonError:
    """Returns the error for what can't be read as a model."""
    return SurgeonError(Code.NOT_A_MODEL, what, at=at, why=why, try_=try_)


def first_line(error: Exception) -> str:
    """Returns another library's error in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:400] if text else type(error).__name__


def read_config(path: Path) -> dict[str, Any]:
    """Returns a `config.json` as it is, known to be one."""
    try:
        raw: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise not_a_model(
            f"{path.name} can't be read",
            at=str(path),
            why=first_line(error),
            try_="fetch the file again",
        ) from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise not_a_model(
            f"{path.name} is no model config",
            at=str(path),
            why="it has no model_type",
            try_="name a Transformers config.json",
        )
    return cast(dict[str, Any], raw)


def config_and_class(
    path: Path, raw: Mapping[str, Any], trust_remote_code: bool
) -> tuple[Any, type[nn.Module], bool]:
    """Returns the config, the class, and whether code of the checkpoint is run."""
    from transformers import CONFIG_MAPPING, AutoConfig

    folder = path.parent
    refs: Any = raw.get("auto_map") or {}
    if not isinstance(refs, dict) or (refs and path.name != "config.json"):
        raise not_a_model(
            f"{path.name} has an auto_map that can't be followed",
            at=str(path),
            why="only a config.json beside its code may have one, and it is a mapping",
            try_="name the checkpoint folder",
        )
    refs = cast(Mapping[str, Any], refs)
    if refs and not trust_remote_code and not _is_own(folder, refs):
        raise SurgeonError(
            Code.REMOTE_CODE,
            "the model comes with code of its own",
            at=str(path),
            why=f"auto_map names {', '.join(sorted(map(str, refs.values())))}, "
            "and running it is off unless asked for",
            try_="read that code, then ask with trust_remote_code (--trust-remote-code); or take "
            "auto_map out of config.json if Transformers has a class for this model itself",
        )
    kind = raw["model_type"]
    if not refs and kind not in CONFIG_MAPPING:
        raise not_a_model(
            f"Transformers has no model type {kind!r}",
            at=str(path),
            why="its class is unknown, so its graph can't be traced",
            try_=near(kind, CONFIG_MAPPING.keys()),
        )
    try:
        if refs:
            config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
        else:
            config = CONFIG_MAPPING[kind].from_dict(dict(raw))
        if "AutoModelForCausalLM" in refs:
            from transformers.dynamic_module_utils import get_class_from_dynamic_module

            ref = refs["AutoModelForCausalLM"]
            return config, get_class_from_dynamic_module(ref, str(folder)), True
    except Exception as error:
        raise not_a_model(
            f"Transformers refuses {path.name}",
            at=str(path),
            why=first_line(error),
            try_="correct the config",
        ) from error
    return config, causal_class(config, str(path)), bool(refs)


def _is_own(folder: Path, refs: Mapping[str, Any]) -> bool:
    """Whether all code that a checkpoint names is the very modelling file that we ship."""
    module = OWN_CODE.removesuffix(".py")
    if any(str(ref).rpartition(".")[0] != module for ref in refs.values()):
        return False
    ours = Path(surgeon.__file__ or "").parent / "emit" / OWN_CODE
    theirs = folder / OWN_CODE
    return theirs.is_file() and _sha256(theirs) == _sha256(ours)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def causal_names() -> set[str]:
    """Returns the names of Transformers' causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    names = cast(Mapping[str, str | tuple[str, ...]], NAMES)
    return {n for value in names.values() for n in ((value,) if isinstance(value, str) else value)}


def decodes(config: Any) -> bool:
    """Whether a config is that of a decoder and of nothing else."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False) or config.get_text_config() is not config:
        return False
    # An encoder can be told to be a decoder; others carry the same field and don't read it.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    return not encoder or bool(getattr(config, "is_decoder", False))


def causal_class(config: Any, where: str) -> type[nn.Module]:
    """Returns the class that Transformers would load for a causal language model."""
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    declared = [str(name) for name in getattr(config, "architectures", None) or ()]
    label = ", ".join(declared) or str(config.model_type)
    known = causal_names()
    for name in declared:
        cls: Any = getattr(transformers, name, None) if name in known else None
        if cls is not None and isinstance(config, cls.config_class) and decodes(config):
            return cls
    other = any("For" in name and name not in known for name in declared)
    if other or not decodes(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        not_causal(label, where)
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def not_causal(label: str, where: str) -> NoReturn:
    """Refuses an architecture that is no causal decoder."""
    raise not_a_model(
        f"{label} is no causal decoder",
        at=where,
        why="Surgeon prunes language models that predict the next token: no encoders, "
        "encoder-decoders, classifiers or multimodal models",
        try_="name a causal language model; of a multimodal model, save the language model alone",
    )


def on_meta(cls: type[nn.Module], config: Any, where: str) -> nn.Module:
    """Returns a model with shapes and no values, in eval mode."""
    _check_depth(config, where)
    try:
        with torch.device("meta"), _few_modules():
            return cls(copy.deepcopy(config)).eval()
    except _TooMany:
        raise _too_large(f"it makes more than {MODULES:,} modules", where) from None
    except Exception as error:
        raise SurgeonError(
            Code.CAPTURE_FAILED,
            f"{cls.__name__} can't be built from its config",
            at=where,
            why=first_line(error),
            try_="correct the config; packages that the model's code imports must be installed",
        ) from error


class _TooMany(BaseException):
    """A model has more modules than any has; no library on the way takes it for its own fault."""


@contextmanager
def _few_modules() -> Generator[None]:
    """While active, what makes modules without end is stopped."""
    from torch.nn.modules.module import register_module_module_registration_hook

    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > MODULES:
            raise _TooMany

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_depth(config: Any, where: str) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > LAYERS:
        raise _too_large(f"it asks for {layers:,} layers", where)


def _too_large(why: str, where: str) -> SurgeonError:
    return SurgeonError(
        Code.CAPTURE_FAILED,
        "the config describes a model larger than any",
        at=where,
        why=why,
        try_="correct the config",
    )


def quantised(raw: Mapping[str, Any]) -> str | None:
    """Returns how a config says that its checkpoint is packed, None where it isn't."""
    found = raw.get("quantization_config")
    if not found:
        return None
    return str(found.get("quant_method", "unknown")) if isinstance(found, Mapping) else "unknown"


def declared_dtype(config: Any) -> torch.dtype:
    """Returns the element type that a config names, fp32 where it names none."""
    found = getattr(config, "dtype", None)
    named = getattr(torch, found, None) if isinstance(found, str) else found
    return named if isinstance(named, torch.dtype) else torch.float32
