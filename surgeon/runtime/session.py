"""An ONNX graph without a cache as a function from token ids to logits, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.device import CPU, CUDA
from surgeon.runtime.graph_file import OfGraph, OpenGraph, failed, open_graph, ort_errors
from surgeon.runtime.signature import stop_tokens

__all__ = ["CPU", "CUDA", "INPUTS", "OrtSession"]

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""The inputs that a graph may have, by name. The last two are optional."""

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class OrtSession(OfGraph):
    """An open ONNX graph, called with the inputs that the graph itself names.

    Args:
        source: an ONNX file, a folder with one, or a graph that is open already. What else is
            given says how to open the former.
        device: `auto`, `cuda` or `cpu`.
        providers: execution providers in order of preference in place of a device, each of which
            must load.
        threads: threads inside an operation; ONNX Runtime's own choice without it.

    Raises:
        SurgeonError: the file is missing or is no model, the graph's inputs are not those of a
            language model, or a device or provider that was asked for doesn't work here.
    """

    def __init__(
        self,
        source: str | Path | OpenGraph,
        *,
        device: str = "auto",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.graph = (
            source
            if isinstance(source, OpenGraph)
            else open_graph(source, device=device, providers=providers, threads=threads)
        )
        self.stop_tokens: tuple[int, ...] = stop_tokens(self.path.parent)
        """Tokens that end a text, as the files beside the graph say; empty if they don't."""
        self._types = self.graph.types
        self._check_inputs()
        names = [output.name for output in self.graph.session.get_outputs()]
        self._output = "logits" if "logits" in names else names[0]

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model has positions for, if the graph says."""
        found = self.graph.metadata.get("surgeon.positions")
        return int(found) if found else None

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs, in the graph's order."""
        return tuple(self._types)

    def run(
        self,
        input_ids: NDArray[np.integer[Any]],
        attention_mask: NDArray[Any] | None = None,
        position_ids: NDArray[np.integer[Any]] | None = None,
    ) -> NDArray[np.floating[Any]]:
        """Returns the logits [batch, sequence, vocab] of token ids [batch, sequence].

        Args:
            input_ids: token ids [batch, sequence].
            attention_mask: 1 for a token and 0 for padding, [batch, sequence]; all 1 without it.
            position_ids: [batch, sequence]; counted over the mask's tokens without it.

        Raises:
            SurgeonError: shapes that don't fit, a mask or positions that matter but that the graph
                has no input for, or a failure inside ONNX Runtime.
        """
        ids = np.asarray(input_ids)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        positions = _positions(mask) if position_ids is None else np.asarray(position_ids)
        given: dict[str, NDArray[Any]] = dict(zip(INPUTS, (ids, mask, positions), strict=True))
        self._check_shapes(given)
        feed = {
            name: given[name].astype(_DTYPES[type_], copy=False)
            for name, type_ in self._types.items()
        }
        try:
            return self.graph.session.run([self._output], feed)[0]
        except ort_errors() as error:
            raise failed(self.graph, ids.shape, error) from error

    def _check_inputs(self) -> None:
        unknown = [
            f"{name}: {type_}"
            for name, type_ in self._types.items()
            if name not in INPUTS or type_ not in _DTYPES
        ]
        if unknown or "input_ids" not in self._types:
            raise SurgeonError(
                Code.NOT_A_MODEL,
                f"'{self.path.name}' has not the inputs of a language model without a cache",
                at=str(self.path),
                why="unknown: " + ", ".join(unknown) if unknown else "it has no input 'input_ids'",
                try_="export with 'surgeon export --to onnx'; without a cache the inputs are "
                + ", ".join(INPUTS),
                data={"inputs": dict(self._types)},
            )

    def _check_shapes(self, given: dict[str, NDArray[Any]]) -> None:
        shape = given["input_ids"].shape
        wrong = {name: list(array.shape) for name, array in given.items() if array.shape != shape}
        if len(shape) != 2 or 0 in shape or wrong:
            raise SurgeonError(
                Code.BAD_TEXT_INPUT,
                f"the inputs don't all have one shape [batch, sequence], input_ids {list(shape)}",
                at=str(self.path),
                why="; ".join(f"{name} has {size}" for name, size in wrong.items())
                or "input_ids needs two dimensions and at least one token",
                try_="pad the sequences of a batch to one length and say so in attention_mask",
            )
        neutral = {"attention_mask": np.ones(shape), "position_ids": _positions(np.ones(shape))}
        for name, value in neutral.items():
            # A graph that can't be told of padding would silently attend to it.
            if name not in self._types and not np.array_equal(given[name], value):
                raise SurgeonError(
                    Code.RUNTIME_FAILED,
                    f"'{self.path.name}' has no input '{name}', which these inputs need",
                    at=str(self.path),
                    why=f"its inputs are {', '.join(self._types)}",
                    try_="run one sequence at a time, without padding",
                )


def _positions(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Counts the tokens of a mask [batch, sequence]; padding on the left gets position 0."""
    return np.maximum(np.cumsum(mask.astype(np.int64), axis=-1) - 1, 0)
