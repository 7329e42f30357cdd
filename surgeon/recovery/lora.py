"""Low-rank adapters beside the maps of a model, and their merging back into its weights.

Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from surgeon.errors import Code, SurgeonError
from surgeon.recovery.settings import Settings
from surgeon.recovery.small import Small

_ADAPTED = ("Linear", "Conv1D")
"""Modules of a matrix product that adapters are made for: torch's, and GPT-2's transposed one."""


def adapted(small: Small, settings: Settings) -> nn.Module:
    """Returns the model with adapters of zero effect, which alone are trained.

    They are beside every map that the axes know and whose weight is used once; the head has none.

    Args:
        small: the model; its maps are wrapped in place until `merged`.
        settings: rank, scale and dropout.

    Raises:
        SurgeonError: `missing-extra` without peft, `bad-option` where there is no map to adapt.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise SurgeonError(
            Code.MISSING_EXTRA,
            "low-rank adapters need the package 'peft'",
            at="compensate/recover: method",
            why="it is not installed",
            try_='pip install "model-surgeon[recover]", or method=full',
        ) from error
    targets = maps(small)
    if not targets:
        raise SurgeonError(
            Code.BAD_OPTION,
            "there is no map to put an adapter beside",
            at="compensate/recover: method",
            why="no weight of a linear map is used once, by a module of its own",
            try_="method=full",
        )
    model: Any = small.model
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  (any number will do)
        lora_dropout=settings.dropout,
        target_modules=targets,
        fan_in_fan_out=all(
            type(model.get_submodule(name)).__name__ == "Conv1D" for name in targets
        ),
    )
    with warnings.catch_warnings():
        # peft 0.21 asks Transformers by a name that 5.23 has replaced.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.get_peft_model(model, config)


def maps(small: Small) -> list[str]:
    """Returns the paths of the modules that hold the model's maps, in its order."""
    have = dict(small.model.named_modules())
    # A tied weight has two names; an adapter beside one of its uses could not be merged.
    names = [name for name, _ in small.model.named_parameters(remove_duplicate=False)]
    parameters: dict[int, list[str]] = {}
    for name in names:
        parameters.setdefault(id(small.model.get_parameter(name)), []).append(name)
    tied = {name for found in parameters.values() if len(found) > 1 for name in found}
    out: list[str] = []
    for param in small.maps:
        own = small.names[param]
        path = own.removesuffix(".weight")
        if own in tied or path == own or type(have.get(path)).__name__ not in _ADAPTED:
            continue
        out.append(path)
    return out


def merged(model: nn.Module) -> nn.Module:
    """Returns the model with what its adapters add in its weights, and no adapters."""
    return model.merge_and_unload()  # pyright: ignore[reportCallIssue, reportReturnType]
