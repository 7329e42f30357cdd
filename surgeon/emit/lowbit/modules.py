"""Which of a checkpoint's tensors are stored in fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from surgeon.axes.plan import Selection
from surgeon.emit.huggingface import Emission
from surgeon.emit.in_memory import class_of
from surgeon.emit.lowbit.grid import SMALLEST, group_for
from surgeon.emit.lowbit.scheme import Scheme
from surgeon.errors import Code, SurgeonError


@dataclass(frozen=True)
class Chosen:
    """What becomes of an emission's tensors.

    Attributes:
        groups: by the checkpoint's name of a weight in fewer bits, how many share a scale.
        whole: modules that multiply by a weight and keep it as it is.
        notes: what the report says of the choice.
    """

    groups: dict[str, int]
    whole: tuple[str, ...]
    notes: tuple[str, ...]


def choose(emission: Emission, selection: Selection, scheme: Scheme) -> Chosen:
    """Returns which weights are stored in fewer bits: those of linear maps, by the model's class.

    The embedding and the head, whether they are one table or two, stay as they are unless the
    scheme says otherwise.

    Raises:
        SurgeonError: `target-refused` where there is no such weight.
    """
    config, model_class = class_of(emission)
    with torch.device("meta"):
        model: Any = model_class(config)
    model.tie_weights()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    groups: dict[str, int] = {}
    notes: list[str] = []
    smaller: dict[int, list[str]] = {}
    for old, new in emission.names.items():
        path, _, leaf = new.rpartition(".")
        module = model.get_submodule(path)
        if leaf != "weight" or not isinstance(module, nn.Linear | nn.Embedding):
            continue
        table = any(module is t for t in tables)
        if not (scheme.embeddings if table else isinstance(module, nn.Linear)):
            continue
        width = selection.shape(old)[1]
        group = group_for(width, scheme.size) if scheme.scheme == "int4" else width
        if group is None:
            notes.append(
                f"{new} stays as it is: no group from {SMALLEST} to {scheme.size} weights "
                f"divides its rows of {width}"
            )
            continue
        if group < scheme.size and scheme.scheme == "int4":
            smaller.setdefault(group, []).append(new)
        groups[new] = group
    notes += [
        f"{len(names)} weights, such as {names[0]}, have groups of {group}: {scheme.size} "
        "doesn't divide their rows"
        for group, names in smaller.items()
    ]
    if not groups:
        raise SurgeonError(
            Code.TARGET_REFUSED,
            "there is nothing to quantise",
            at=emission.architecture,
            why="; ".join(notes) or "it has no linear map (nn.Linear) apart from its head",
            try_="leave quantisation out, or export to ONNX with --quantize",
        )
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    # A head that is the embedding's own table goes with it.
    stored = {id(model.get_submodule(name.rpartition(".")[0]).weight) for name in groups}
    whole = tuple(name for name, module in linear if id(module.weight) not in stored)
    return Chosen(groups, whole, tuple(notes))
