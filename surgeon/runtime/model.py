"""A graph with its tokenizer: opened by path, asked by text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from surgeon.runtime import generate as g
from surgeon.runtime.decoder import Decoder
from surgeon.runtime.graph_file import open_graph
from surgeon.runtime.sampling import Sampling
from surgeon.runtime.session import OrtSession
from surgeon.runtime.signature import is_cached


def open_session(
    path: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    cuda_graph: bool = False,
) -> Decoder | OrtSession:
    """Returns an open graph: a `Decoder` where it has a cache, otherwise an `OrtSession`.

    Args:
        path: an ONNX file or a folder with one.
        device: `auto`, `cuda` or `cpu`.
        threads: threads inside an operation; ONNX Runtime's own choice without it.
        cuda_graph: record a decoding step once on CUDA and replay it.

    Raises:
        SurgeonError: why it can't be opened.
    """
    graph = open_graph(path, device=device, threads=threads, cuda_graph=cuda_graph)
    if is_cached(graph):
        return Decoder(graph, cuda_graph=cuda_graph)
    return OrtSession(graph)


def tokenizer_beside(path: Path) -> Any:
    """Returns the tokenizer in the folder of a graph, or None where there is none."""
    if not (path.parent / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    # Left out, it would ask the user about the code of a checkpoint in the same folder.
    return AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)


def open(
    path: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    cuda_graph: bool = False,
    tokenizer: Any = None,
) -> LanguageModel:
    """Returns an exported model, ready to write.

        model = surgeon.runtime.open("folder", device="auto")
        print(model.generate("The capital of France is").text)

    Args:
        path: a folder that `surgeon export --to onnx` wrote, or an ONNX file.
        device: `cuda`, `cpu`, or `auto` for CUDA where it works; `model.device` says which it is
            and `model.note` why.
        threads: threads inside an operation; ONNX Runtime's own choice without it.
        cuda_graph: record a decoding step once on CUDA and replay it.
        tokenizer: a tokenizer in place of the one beside the graph.

    Raises:
        SurgeonError: why it can't be opened.
    """
    session = open_session(path, device=device, threads=threads, cuda_graph=cuda_graph)
    return LanguageModel(session, tokenizer or tokenizer_beside(session.path))


class LanguageModel:
    """An exported model with its tokenizer.

    Attributes:
        session: the open graph.
        tokenizer: None where there is none beside the graph.
    """

    def __init__(self, session: Decoder | OrtSession, tokenizer: Any) -> None:
        self.session, self.tokenizer = session, tokenizer

    def __repr__(self) -> str:
        return f"LanguageModel({str(self.session.path)!r}, device={self.device!r})"

    @property
    def device(self) -> str:
        """`cuda` or `cpu`."""
        return self.session.device

    @property
    def note(self) -> str:
        """Why it runs on this device."""
        return self.session.note

    def logits(
        self, input_ids: NDArray[np.integer[Any]], attention_mask: NDArray[Any] | None = None
    ) -> NDArray[np.floating[Any]]:
        """Returns the logits [batch, sequence, vocab] of token ids [batch, sequence]."""
        return self.session.run(input_ids, attention_mask)

    @overload
    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> g.Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[g.Generation]: ...
    def generate(
        self,
        prompt: str | list[str] | tuple[str, ...],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> g.Generation | list[g.Generation]:
        """Returns what the model writes after the prompt, or after each of a batch.

        Raises:
            SurgeonError: an empty prompt, no tokenizer, settings that mean nothing, a length that
                the model has no positions for.
        """
        return g.generate(
            self.session,
            self.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, seed),
        )

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """Yields what the model writes after the prompt, piece by piece as it is written.

        Raises:
            SurgeonError: as `generate`, when the first piece is asked for.
        """
        return g.stream(
            self.session,
            self.tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, seed),
        )
