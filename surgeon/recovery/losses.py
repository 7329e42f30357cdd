"""What training makes small: the text's own loss, and how far the model is from its teacher.

Reference: Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (predictions at a
temperature); Jiao et al., TinyBERT, 2020 (hidden states, layer by layer); Muralidharan et al.,
Compact Language Models via Pruning and Knowledge Distillation, 2024 (both, for pruned models).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional


def label_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the mean negative log-likelihood of each token but the first, in nats.

    Args:
        logits: [batch, tokens, vocabulary].
        ids: [batch, tokens].
    """
    found = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(found, ids[:, 1:].flatten())


def logits_loss(found: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns T² · KL(teacher ‖ student) of predictions softened by T, the mean over tokens.

    The factor keeps gradients of the size that they have at T = 1.

    Args:
        found: the student's logits [batch, tokens, vocabulary].
        wanted: the teacher's.
        temperature: T.
    """
    rows = (found.float().flatten(0, 1) / temperature).log_softmax(-1)
    target = (wanted.float().flatten(0, 1) / temperature).log_softmax(-1)
    apart = functional.kl_div(rows, target, log_target=True, reduction="batchmean")
    return apart * temperature**2


def hidden_loss(
    found: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Returns the mean square between residual streams, each divided by its root mean square.

    So does the normaliser that reads it next: the result doesn't depend on a scale that writing
    the model folds into the stream, nor on how streams grow from layer to layer.

    Args:
        found: the student's stream after each of its layers, [batch, tokens, width left].
        wanted: the teacher's after the same layers, [batch, tokens, width].
        kept: by layer, the teacher's channels that the student has; None for all.
    """
    total = found[0].new_zeros((), dtype=torch.float32)
    for own, whole, channels in zip(found, wanted, kept, strict=True):
        same = whole if channels is None else whole.index_select(-1, channels.to(whole.device))
        total = total + (_normalised(own) - _normalised(same)).square().mean()
    return total / len(found)


def _normalised(stream: torch.Tensor) -> torch.Tensor:
    exact = stream.float()
    return exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-6)


def together(parts: Mapping[str, torch.Tensor], weight: float) -> torch.Tensor:
    """Returns weight · (what the teacher asks for) + (1 − weight) · the text's own loss.

    Args:
        parts: `label`, and any of `logits` and `hidden`.
        weight: share of the teacher; without a teacher's part it is not looked at.
    """
    teacher = [parts[name] for name in ("logits", "hidden") if name in parts]
    if not teacher:
        return parts["label"]
    asked = torch.stack(teacher).sum()
    return weight * asked + (1 - weight) * parts["label"]
