"""What is left is trained on a text: all of it or low-rank adapters, with or without a teacher.

The smaller model as a whole is trained by Transformers' trainer, on the text's labels, on what the
dense model predicts, on the dense model's hidden states, or on several of these. Adapters are
merged back. What it has learnt replaces the tensors that the plan is applied to: every target,
verification and replay see it like any other compensation.

Reference: Hu et al., LoRA, 2021; Hinton et al., Distilling the Knowledge in a Neural Network, 2015;
Ma et al., LLM-Pruner, 2023 (adapters after pruning); Muralidharan et al., Compact Language Models
via Pruning and Knowledge Distillation, 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from surgeon.plugin import CompensatePass, Context, Plan


@dataclass(frozen=True)
class Recover(CompensatePass):
    """Training of the smaller model, as full-size tensors."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "training"})

    method: Literal["full", "lora"] = "full"
    """Every weight is trained, or low-rank adapters beside the maps (needs the extra `recover`)."""

    steps: int = 300
    """Steps of the optimizer."""

    data: str | tuple[str, ...] = ()
    """Text, .jsonl, .npy of token ids or datasets:NAME, one or a list; by default what the passes
    are calibrated on (in a schedule that watches quality, the very windows they see)."""

    batch: int = 4
    """Windows in a step, of all processes and parts together."""

    length: int = 512
    """Tokens in a window."""

    rate: float = 1e-4
    """The largest learning rate; it falls by a cosine. Adapters take about ten times as much."""

    warmup: float = 0.05
    """Share of the steps over which the rate rises."""

    decay: float = 0.0
    """Weight decay."""

    seed: int = 0
    """Of windows, their order, adapters and dropout."""

    distill: Literal["none", "logits", "hidden", "both"] = "logits"
    """What is learnt from the dense model: its predictions, the residual stream after each layer
    that is left, both, or nothing."""

    temperature: float = 1.0
    """Predictions of both models are softened by it."""

    weight: float = 1.0
    """Share of the teacher in the loss; the rest is the text's own."""

    rank: int = 16
    """Of adapters."""

    alpha: float = 32.0
    """What adapters add is multiplied by this over their rank."""

    dropout: float = 0.0
    """Of what adapters read."""

    keep_zeros: bool = False
    """What is zero in a map's weight stays zero, as a sparsity pattern wants it."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of products; weights and the optimizer are in fp32."""

    accumulate: int = 1
    """Parts of a step that go through the model one after the other."""

    checkpointing: bool = False
    """Activations are computed again on the way back rather than kept."""

    checkpoints: str = ""
    """Folder of checkpoints: a training that was interrupted goes on from the last."""

    save_every: int = 100
    """Steps between checkpoints."""

    fsdp: str = ""
    """Transformers' FSDP configuration, a JSON file, under `accelerate launch`."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        for name in ("steps", "batch", "rank", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be 1 or more")
        if self.length < 2:
            raise ValueError(f"length is {self.length}, a window has 2 tokens or more")
        for name in ("rate", "temperature", "alpha"):
            if not 0 < getattr(self, name) < float("inf"):  # false for NaN as well
                raise ValueError(f"{name} is {getattr(self, name)}, it has to be above 0")
        for name in ("warmup", "weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, it is a share from 0 to 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, it is a share below 1")
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"decay is {self.decay}, it has to be 0 or more")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, it has to be 0 or more")
        if self.keep_zeros and self.method == "lora":
            raise ValueError("keep_zeros holds for method full: an adapter adds to every element")

    def compensate(self, context: Context, plan: Plan) -> Mapping[str, Any]:
        """Returns by parameter name the full-size tensor that replaces it."""
        found, facts = context.recovered(plan, self)
        context.facts.update(facts)
        losses = [loss for _, loss in facts["curve"]]
        quarter = max(1, len(losses) // 4)
        first, last = (sum(s) / len(s) for s in (losses[:quarter], losses[-quarter:]))
        context.notes.append(
            f"recover: {facts['tokens']:,} tokens in {facts['steps']} steps, "
            f"{facts['training_seconds']:.0f} s; loss {first:.3f} in the first quarter, "
            f"{last:.3f} in the last"
        )
        return found
