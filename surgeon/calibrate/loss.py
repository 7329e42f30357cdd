"""The loss of a model on windows, and how it depends on the logits."""

from __future__ import annotations

import torch

from surgeon.calibrate.running import Change, Get, Machine, Running
from surgeon.calibrate.segments import segments
from surgeon.calibrate.states import States, scratch
from surgeon.ir import Program

HEAD_TOKENS = 1024
"""Tokens whose logits are held at a time: a vocabulary is wide."""


ROWS = 64
"""Tokens whose probabilities are computed at a time: so many fit into a processor's cache."""


def summed(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the negative log-likelihood of each next token, in nats, summed.

    Args:
        logits: [windows, length, vocab].
        ids: [windows, length]; the first of each window is not predicted.
    """
    rows = logits[:, :-1].float().reshape(-1, logits.shape[-1])
    wanted = ids[:, 1:].reshape(-1).to(rows.device)
    return torch.nn.functional.cross_entropy(rows, wanted, reduction="sum")


def slope_of_summed(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Returns the gradient of `summed` with respect to the logits, of their shape.

    Autograd would keep several tensors as large as the logits, which are the largest there are.
    """
    found = torch.zeros_like(logits)
    for window, own, row in zip(found, logits, ids.to(logits.device), strict=True):
        for first in range(0, len(row) - 1, ROWS):
            wanted = row[first + 1 : first + 1 + ROWS]
            some = own[first : first + len(wanted)].float().softmax(-1)
            some[torch.arange(len(wanted)), wanted] -= 1
            window[first : first + len(wanted)] = some
    return found


def mean_loss(
    program: Program,
    get: Get,
    ids: torch.Tensor,
    machine: Machine,
    *,
    change: Change | None = None,
) -> float:
    """Returns the mean negative log-likelihood of a predicted token, in nats, piece by piece.

    Args:
        program: a language model's.
        get: its weights.
        ids: this process's token ids [samples, length].
        machine: how pieces are run.
        change: what takes some operations' places.

    Raises:
        SurgeonError: `bad-text-input` where a value is not finite.
    """
    # The head's batches are those of every piece, so that a state belongs to one batch.
    batches = machine.batches(ids, min(machine.tokens, HEAD_TOKENS))
    total = torch.zeros(1, dtype=torch.float64)
    with scratch(machine.offload) as folder:
        states = States(len(batches), folder)
        for piece in segments(program):
            running = Running(piece, get, machine.world.device, change=change)
            for i, batch in enumerate(batches):
                with torch.no_grad():
                    (found,) = running(batch, states[i])
                running.check(batch, states[i], (found,))
                if piece.passed is None:
                    total += summed(found, batch).double().cpu()
                else:
                    states[i] = found
    machine.world.add(total)
    count = machine.world.count(sum(batch[:, 1:].numel() for batch in batches))
    return float(total) / count
