"""An ONNX decoder with a cache: prefill, chunked prefill, decode, any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.cache import Cache
from surgeon.runtime.device_ops import ELEMENTS, Ops
from surgeon.runtime.graph_file import OfGraph, OpenGraph, failed, open_graph, ort_errors
from surgeon.runtime.replay import Replay
from surgeon.runtime.signature import Signature, read_signature, stop_tokens

CHUNK = 1024
"""Tokens of a prompt that go through the model at once: the logits of all of them exist in
memory, and the vocabulary is large."""

_NUMPY: dict[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16}
_INTEGERS: dict[str, type[np.generic]] = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}

Ints = NDArray[np.integer[Any]]


class Decoder(OfGraph):
    """An open ONNX graph that keeps keys and values between steps.

        decoder = Decoder("folder", device="auto")
        cache = decoder.cache(batch=1, capacity=128)
        logits = decoder.prefill(cache, [[1, 2, 3]])
        logits = decoder.extend(cache, np.array([[4]]))

    Args:
        source: an ONNX file, a folder with one, or a graph that is open already. What else is
            given says how to open the former.
        device: `auto`, `cuda` or `cpu`.
        providers: execution providers by name in place of a device.
        threads: threads inside an operation; ONNX Runtime's own choice without it.
        cuda_graph: record a decoding step once on CUDA and replay it. Its mask is then as wide as
            the cache, so every layer must share past and present.

    Raises:
        SurgeonError: no file, no decoder, or a device that doesn't work here.
    """

    def __init__(
        self,
        source: str | Path | OpenGraph,
        *,
        device: str = "auto",
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        graph = (
            source
            if isinstance(source, OpenGraph)
            else open_graph(
                source, device=device, providers=providers, threads=threads, cuda_graph=cuda_graph
            )
        )
        signature = read_signature(graph)
        self.graph = _off_cuda(graph, signature) if graph.device == "cuda" else graph
        self.signature = signature
        if cuda_graph:
            _check_replays(self.graph, signature)
        self.stop_tokens: tuple[int, ...] = stop_tokens(graph.path.parent)
        """Tokens that end a text, as the files beside the graph say; empty if they don't."""
        self._ops = Ops(self.graph)
        self._replays = cuda_graph
        self._session = self.graph.session

    # --- what it is ------------------------------------------------------------------------------

    @property
    def positions(self) -> int | None:
        """The longest sequence that the model has positions for, if it says."""
        return self.signature.positions

    @property
    def vocab(self) -> int | None:
        """How many tokens the model knows, if the graph says."""
        return self.signature.vocab

    # --- running it ------------------------------------------------------------------------------

    def cache(self, batch: int, capacity: int) -> Cache:
        """Returns an empty cache for a batch, with room for so many positions before it grows."""
        if batch < 1 or capacity < 0:
            raise _bad_input(
                f"there is no cache for {batch} rows of {capacity} positions", self.path, "too few"
            )
        return Cache(self.signature, self.device, batch, capacity, self._ops)

    def run(
        self,
        input_ids: Ints,
        attention_mask: NDArray[Any] | None = None,
        position_ids: Ints | None = None,
    ) -> NDArray[np.floating[Any]]:
        """Returns the logits [batch, sequence, vocab] of token ids [batch, sequence].

        Args:
            input_ids: token ids [batch, sequence].
            attention_mask: 1 for a token and 0 for padding, anywhere; all 1 without it. Where
                the mask has a 0, the logits mean nothing.
            position_ids: refused unless they are what the mask implies.

        Raises:
            SurgeonError: shapes or token ids that don't fit, or a failure inside ONNX Runtime.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        if position_ids is not None and not np.array_equal(
            np.asarray(position_ids)[mask == 1], _positions(mask)[mask == 1]
        ):
            raise _bad_input("positions can't be chosen", self.path, "the graph counts them itself")
        if self.signature.padding == "any" or not _has_gap(mask):
            return self._once(ids, mask)
        # Tokens first, padding after them, and the logits back to where the tokens were.
        order = np.argsort(1 - mask, axis=1, kind="stable")
        packed = self._once(
            np.take_along_axis(ids, order, axis=1), np.take_along_axis(mask, order, axis=1)
        )
        logits = np.empty_like(packed)
        np.put_along_axis(logits, order[:, :, None], packed, axis=1)
        return logits

    def prefill(
        self, cache: Cache, rows: Sequence[Sequence[int]], *, chunk: int = CHUNK
    ) -> NDArray[np.float32]:
        """Reads one prompt a row, of any lengths; returns each one's last logits [batch, vocab].

        Raises:
            SurgeonError: an empty prompt, or one that is longer than the model's positions.
        """
        if len(rows) != cache.batch or not all(rows) or chunk < 1:
            raise _bad_input(
                f"{len(rows)} prompts don't fill a cache of {cache.batch} rows",
                self.path,
                "every row needs at least one token",
            )
        longest = max(map(len, rows))
        left = self.signature.padding == "any"
        ids = np.zeros((len(rows), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, tokens in enumerate(rows):
            place = slice(longest - len(tokens), None) if left else slice(len(tokens))
            ids[row, place], mask[row, place] = tokens, 1
        self._check_ids(ids)
        self._check_room(cache, mask)
        # Rows of several lengths can be cut up where each row can be run by itself.
        whole = not left and len(rows) > 1 and not self.signature.shared
        step = longest if whole else chunk
        out: NDArray[np.float32] | None = None
        for start in range(0, longest, step):
            part = mask[:, start : start + step]
            found = self._extend(cache, ids[:, start : start + step], part)
            if out is None:
                out = found
            else:
                seen = part.any(axis=1)
                out[seen] = found[seen]
        assert out is not None
        return out

    def extend(
        self, cache: Cache, input_ids: Ints, attention_mask: NDArray[Any] | None = None
    ) -> NDArray[np.float32]:
        """Reads further tokens [batch, new]; returns the logits of each row's last [batch, vocab].

        Args:
            cache: what came before; it holds the new tokens too afterwards.
            input_ids: token ids.
            attention_mask: of the new tokens alone, 0 for padding; all 1 without it.

        Raises:
            SurgeonError: shapes or token ids that don't fit, padding where the graph can't have
                it, more positions than the model has.
        """
        ids, mask = self._checked(input_ids, attention_mask)
        if len(ids) != cache.batch:
            raise _bad_input(f"{len(ids)} rows for a cache of {cache.batch}", self.path, "one each")
        if self.signature.padding == "right" and _has_gap(mask):
            raise _bad_input(
                "padding stands before a token", self.path, "this graph takes it on the right only"
            )
        self._check_room(cache, mask)
        return self._extend(cache, ids, mask)

    # --- one step --------------------------------------------------------------------------------

    def _extend(
        self, cache: Cache, ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Reads checked tokens and returns the last logits of the rows that have any."""
        batch, new = ids.shape
        first, full = cache.width == 0, bool(mask.all())
        cache.append(mask)
        try:
            if self._replays and new == 1 and full and not first:
                return self._replayed(cache, ids)
            last = new - 1 - np.argmax(mask[:, ::-1], axis=1)
            # After a past, GroupQueryAttention counts a row's tokens from the end of the new ones,
            # and takes several of them only in a batch of one.
            simple = full and (new == 1 or batch == 1)
            if first or simple or self.signature.padding == "any":
                return self._last(self._step(cache, ids, cache.mask), last)
            if self.signature.shared:
                return self._by_row(cache, ids, mask)
        except BaseException:
            cache.retract(new)
            raise
        cache.retract(new)
        # A row of a cache that isn't one buffer can't be had by itself.
        if not full:
            raise _bad_input(
                f"{new} columns with padding after a past of {cache.width}",
                self.path,
                "this graph takes one token a step then",
            )
        return [self._extend(cache, ids[:, i : i + 1], mask[:, i : i + 1]) for i in range(new)][-1]

    def _by_row(
        self, cache: Cache, ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        lengths, news = cache.lengths, mask.sum(axis=1)
        found: list[NDArray[np.float32]] = []
        for row, (length, new) in enumerate(zip(lengths, news, strict=True)):
            if new == 0:
                found.append(np.full((1, 1), np.nan, np.float32))
                continue
            whole = np.ones((1, int(length)), np.int64)
            logits = self._step(cache, ids[row : row + 1, :new], whole, row=row)
            found.append(self._last(logits, np.array([new - 1])))
        vocab = max(part.shape[1] for part in found)
        return np.concatenate([np.broadcast_to(part, (1, vocab)) for part in found])

    def _replayed(self, cache: Cache, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        if cache.replay is None:
            cache.replay = Replay(self.graph, self.signature, cache)
        return self._last(cache.replay(ids, cache.lengths), np.zeros(len(ids), np.int64))

    def _step(
        self, cache: Cache, ids: NDArray[np.int64], mask: NDArray[np.int64], row: int | None = None
    ) -> Any:
        """Runs the graph once and returns the logits as an `OrtValue` or an array."""
        binding = self._session.io_binding() if row is not None else cache.binding
        fresh = binding is None
        if fresh:
            binding = cache.binding = self._session.io_binding()
        given = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in self.signature.types:
            given["position_ids"] = _positions(mask)[:, -ids.shape[1] :]
        for name, array in given.items():
            kind = _INTEGERS[self.signature.types[name]]
            binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=kind))
        logits = self._bind_logits(binding, ids.shape)
        element = ELEMENTS[self.signature.dtype]
        for slot in self.signature.slots:
            if row is not None:
                shape, address = cache.row(slot, row)
                binding.bind_input(slot.past, self.device, 0, element, shape, address)
                binding.bind_output(slot.present, self.device, 0, element, shape, address)
            elif not slot.shared:
                binding.bind_ortvalue_input(slot.past, cache.values[slot.past])
                binding.bind_output(slot.present, self.device)
            elif fresh:  # one buffer for both, which stays bound
                binding.bind_ortvalue_input(slot.past, cache.values[slot.past])
                binding.bind_ortvalue_output(slot.present, cache.values[slot.past])
        try:
            self._session.run_with_iobinding(binding, self._options())
        except ort_errors() as error:
            raise failed(self.graph, ids.shape, error) from error
        if logits is not None and self.signature.shared:
            return logits
        # In the order in which they were bound: the logits came first.
        outputs = binding.get_outputs()
        for slot, present in zip(self.signature.slots, outputs[1:], strict=True):
            if not slot.shared:
                cache.values[slot.past] = present
        return outputs[0] if logits is None else logits

    def _bind_logits(self, binding: Any, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """Binds the logits as the first output; to an array of ours where that saves a copy."""
        kind = _NUMPY.get(self.signature.logits_dtype)
        if self.device != "cpu" or self.vocab is None or kind is None:
            binding.bind_output("logits", self.device)
            return None
        array = np.empty((*shape, self.vocab), kind)
        address = array.ctypes.data
        binding.bind_output("logits", "cpu", 0, kind, array.shape, address)
        return array

    def _options(self) -> Any:
        """The options of a run that isn't recorded."""
        if not self._replays:
            return None
        import onnxruntime as ort

        options: Any = ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "-1")
        return options

    def _last(self, logits: Any, columns: NDArray[np.int64]) -> NDArray[np.float32]:
        if isinstance(logits, np.ndarray):
            return logits[np.arange(len(columns)), columns].astype(np.float32, copy=False)
        return self._ops.rows(logits, columns)

    def _once(self, ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.floating[Any]]:
        cache = self.cache(len(ids), ids.shape[1])
        self._check_room(cache, mask)
        cache.append(mask)
        logits = self._step(cache, ids, mask)
        return logits if isinstance(logits, np.ndarray) else self._ops.host(logits)

    # --- checks ----------------------------------------------------------------------------------

    def _checked(
        self, input_ids: Ints, attention_mask: NDArray[Any] | None
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids = np.asarray(input_ids).astype(np.int64, copy=False)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        if ids.ndim != 2 or 0 in ids.shape or mask.shape != ids.shape:
            raise _bad_input(
                "the inputs don't all have one shape [batch, sequence]",
                self.path,
                f"input_ids has {list(ids.shape)}, attention_mask {list(mask.shape)}",
            )
        mask = (mask != 0).astype(np.int64)
        empty = np.flatnonzero(~mask.any(axis=1))
        if len(empty):
            raise _bad_input(f"row {empty[0]} is nothing but padding", self.path, "it has no token")
        self._check_ids(ids)
        return ids, mask

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        # Gather checks this on the CPU alone; on CUDA it reads what lies beyond the table.
        if ids.min() < 0 or (self.vocab is not None and ids.max() >= self.vocab):
            wrong = int(ids.min()) if ids.min() < 0 else int(ids.max())
            raise _bad_input(
                f"there is no token {wrong}", self.path, f"the model knows {self.vocab} of them"
            )

    def _check_room(self, cache: Cache, mask: NDArray[np.int64]) -> None:
        longest = int((cache.lengths + mask.sum(axis=1)).max())
        if self.positions is not None and longest > self.positions:
            raise SurgeonError(
                Code.BAD_TEXT_INPUT,
                f"a sequence of {longest} tokens is too long",
                at=str(self.path),
                why=f"the model was made for {self.positions} positions",
                try_="a shorter prompt, or fewer new tokens",
                data={"positions": self.positions, "tokens": longest},
            )


def _off_cuda(graph: OpenGraph, signature: Signature) -> OpenGraph:
    """Returns the graph, on the CPU where it isn't made for CUDA and that wasn't insisted on."""
    clash = signature.no_cuda
    if clash is None:
        return graph
    if graph.asked != "auto":
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            "this graph is not made for CUDA",
            at=str(graph.path),
            why=clash,
            try_="export with --dtype fp16 (quantised: w8 or int4), or take --device cpu",
        )
    return replace(open_graph(graph.path, device="cpu", threads=graph.threads), note=clash)


def _check_replays(graph: OpenGraph, signature: Signature) -> None:
    growing = [slot.past for slot in signature.slots if not slot.shared]
    why = (
        f"it would run on {graph.device} ({graph.note})"
        if graph.device != "cuda"
        else f"{growing[0]} grows with every step, and a recorded step has fixed shapes"
        if growing
        else "the graph doesn't say how large its vocabulary is"
        if signature.vocab is None
        else None
    )
    if why is not None:
        raise SurgeonError(
            Code.BAD_OPTION,
            "this graph's steps can't be recorded and replayed",
            at=str(graph.path),
            why=why,
            try_="leave cuda_graph out",
        )


def _positions(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Counts the tokens of a mask [batch, sequence]; padding on the left gets position 0."""
    return np.maximum(np.cumsum(mask.astype(np.int64), axis=-1) - 1, 0)


def _has_gap(mask: NDArray[np.int64]) -> bool:
    """Whether a row has padding before a token."""
    return bool((np.diff(mask, axis=1) > 0).any())


def _bad_input(what: str, path: Path, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_TEXT_INPUT,
        what,
        at=str(path),
        why=why,
        try_="token ids [batch, sequence] of this model's own tokenizer, with their mask",
    )
