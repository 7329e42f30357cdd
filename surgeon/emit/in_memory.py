"""The model of an emission without a file: what loading the written checkpoint gives."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from surgeon.axes.plan import Selection
from surgeon.capture.model import all_params
from surgeon.emit.hf_writing import final
from surgeon.emit.huggingface import Emission
from surgeon.errors import Code, SurgeonError
from surgeon.runtime.apply import Get


def class_of(emission: Emission) -> tuple[Any, Any]:
    """Returns the configuration and the class that loading an emission's checkpoint gives."""
    if emission.config_json is None:
        return emission.candidate.config, emission.candidate.model_class
    from surgeon.emit.modeling_surgeon_pruned import SurgeonPrunedConfig, SurgeonPrunedForCausalLM

    own = ("auto_map", "model_type")
    data = {key: value for key, value in emission.config_json.items() if key not in own}
    return SurgeonPrunedConfig(**data), SurgeonPrunedForCausalLM


def in_memory(
    emission: Emission,
    selection: Selection,
    get: Get,
    dtype_of: Callable[[str], torch.dtype],
) -> Any:
    """Returns the model of an emission without writing it: what loading the checkpoint gives."""
    config, model_class = class_of(emission)
    state = {
        new: final(emission, selection, get, old, dtype_of(old))
        for old, new in emission.names.items()
    }
    with _default_dtype(state.values()):
        model = model_class(config)
    for name, own in model.state_dict(keep_vars=True).items():
        if name in state:
            own.data = own.data.to(state[name].dtype)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {alias for p in all_params(model).values() for alias in p.aliases}
    if unexpected or set(missing) - tied - set(_unread(model, state)):
        raise SurgeonError(
            Code.TARGET_REFUSED,
            f"{type(model).__name__} does not have the pruned model's parameters",
            at=f"missing {missing[:3]}, unexpected {unexpected[:3]}",
            why="the class and the emitted tensors don't agree",
            try_="report this with the plan and the configuration",
        )
    model.tie_weights()
    return model.eval()


@contextmanager
def _default_dtype(tensors: Iterable[torch.Tensor]) -> Generator[None, None, None]:
    """While active, what a model makes for itself is of the type that most of its tensors have.

    So does Transformers when it loads a checkpoint.
    """
    weight: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            weight[tensor.dtype] = weight.get(tensor.dtype, 0) + tensor.numel()
    before = torch.get_default_dtype()
    torch.set_default_dtype(max(weight, key=lambda d: weight[d], default=before))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unread(model: Any, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns stored buffers that the class makes by itself and that the program never reads."""
    return [n for n, _ in model.named_buffers() if n not in state]
