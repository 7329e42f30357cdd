"""What quantisation cost: perplexity before and after, and what is left on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.emit.quantize.graph import Quantised, Stored
from surgeon.errors import Code, SurgeonError

if TYPE_CHECKING:
    import torch

WINDOW, WINDOWS = 512, 2
"""Tokens in a window and windows of the built-in text: enough to tell a bad rounding from a good
one, and a few seconds on a small model."""

Reference = Callable[..., Any]


@dataclass(frozen=True)
class Quality:
    """Perplexity of a model before and after quantisation, on the same windows.

    Attributes:
        before: of the program, in fp32.
        after: of the graph that was written, in ONNX Runtime on the CPU.
        window: tokens in a window.
        windows: that were scored.
        text: the text's name.
    """

    before: float
    after: float
    window: int
    windows: int
    text: str


def measure(
    path: str | Path, reference: Reference, tokenizer: Any, positions: int
) -> Quality | None:
    """Returns the perplexity of a written graph and of the program it was made from.

    Args:
        path: of the graph.
        reference: the program, from ids, mask and positions, each [B, S], to logits.
        tokenizer: the model's own.
        positions: the longest sequence.

    Returns:
        None where the model has too few positions or the text too few tokens for one window.

    Raises:
        SurgeonError: `runtime-failed` where the graph can't be run.
    """
    from surgeon.report.evaluate import perplexity
    from surgeon.runtime.model import open_session

    window = min(WINDOW, positions)
    if window < 2:
        return None

    def before(ids: Any) -> torch.Tensor:
        import torch

        tokens = torch.from_numpy(ids)
        places = torch.arange(tokens.shape[1]).expand_as(tokens)
        with torch.inference_mode():
            return reference(tokens, torch.ones_like(tokens), places)

    try:
        first = perplexity(before, tokenizer, window=window, max_windows=WINDOWS)
    except SurgeonError as error:
        if error.code is Code.BAD_TEXT_INPUT:
            return None
        raise
    session = open_session(path, device="cpu")
    second = perplexity(session, tokenizer, window=window, max_windows=WINDOWS)
    return Quality(first.perplexity, second.perplexity, window, first.windows, first.text)


def report(found: Quantised, quality: Quality | None) -> dict[str, Any]:
    """Returns what a report says of a quantised graph."""
    return {
        "scheme": found.scheme.name,
        "block_size": found.scheme.block_size,
        "rounding": found.scheme.rounding,
        "matrices": len(found.matrices),
        "bytes_before": sum(m.before for m in found.matrices),
        "bytes_after": sum(m.after for m in found.matrices),
        "embedding": _stored(found.embedding),
        "head": _stored(found.head),
        "shared_table": found.shared,
        "other_bytes": found.rest,
        "perplexity": None if quality is None else vars(quality),
    }


def notes(found: Quantised, quality: Quality | None) -> list[str]:
    """Returns what the user should know of a quantised graph, in sentences."""
    said: list[str] = []
    if quality is not None:
        said.append(
            f"perplexity {quality.before:.3f} before quantisation, {quality.after:.3f} after "
            f"({quality.windows} windows of {quality.window} tokens of {quality.text})"
        )
    if found.shared:
        said.append(f"embedding and head, one table: {_size(found.embedding)}")
    else:
        said += [f"{w}: {_size(s)}" for w, s in _ends(found).items() if s is not None]
    if found.scheme.name == "int8":
        said.append(
            "int8 is for the CPU: ONNX Runtime has no CUDA kernel for products of integers "
            "(MatMulInteger); for CUDA take --quantize w8 or int4"
        )
        said.append(
            "int8 rounds a whole activation with one scale, which outliers spoil; w8 computes in 8 "
            "bits on the CPU too, with a scale for every block"
        )
    return said


def _ends(found: Quantised) -> Mapping[str, Stored | None]:
    return {"embedding": found.embedding, "head": found.head}


def _size(stored: Stored | None) -> str:
    assert stored is not None
    return (
        f"{stored.before / 1e6:,.1f} MB before, {stored.after / 1e6:,.1f} MB in {stored.bits} bits"
    )


def _stored(stored: Stored | None) -> dict[str, Any] | None:
    if stored is None:
        return None
    return {
        "name": stored.name,
        "bits": stored.bits,
        "bytes_before": stored.before,
        "bytes_after": stored.after,
    }
