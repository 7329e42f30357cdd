"""An ONNX file as a function from token ids to logits, in ONNX Runtime."""

from __future__ import annotations

import ctypes
import importlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgeon.errors import Code, SurgeonError, near

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""The inputs that a graph may have, by name. The last two are optional."""

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


class OrtSession:
    """An open ONNX graph, called with the inputs that the graph itself names.

    Args:
        path: the ONNX file.
        providers: the execution providers to use, in this order of preference, each of which must
            load. Without it, CUDA where the machine has a device for it, else the CPU.
        threads: threads inside an operation; ONNX Runtime's own choice without it.

    Raises:
        SurgeonError: the file is missing or is no model, the graph's inputs are not those of a
            language model, or a provider that was asked for is missing.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        import onnxruntime as ort

        self.path = Path(path)
        if not self.path.is_file():
            raise SurgeonError(
                Code.MISSING_FILE,
                f"there is no ONNX file '{self.path}'",
                at=str(self.path),
                why="it is a folder" if self.path.is_dir() else "no such file",
                try_="give the path of the .onnx file",
            )
        asked = tuple(providers) if providers is not None else _default_providers(ort)
        _check_known(asked, ort.get_available_providers(), self.path)
        settings: Any = ort.SessionOptions()
        settings.log_severity_level = 3
        if threads is not None:
            settings.intra_op_num_threads = threads
        if CUDA in asked:
            # The libraries of the `cuda` extra lie inside the environment, where no loader looks.
            ort.preload_dlls()
        try:
            self._session: Any = ort.InferenceSession(self.path, settings, providers=list(asked))
        except _ort_errors() as error:
            raise SurgeonError(
                Code.NOT_A_MODEL,
                f"ONNX Runtime can't open '{self.path.name}'",
                at=str(self.path),
                why=_one_line(error),
                try_="export the model again, or check the file with onnx.checker.check_model",
            ) from error
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self._check_loaded(asked, explicit=providers is not None)
        self._types: dict[str, str] = {i.name: i.type for i in self._session.get_inputs()}
        self._check_inputs()
        names = [output.name for output in self._session.get_outputs()]
        self._output = "logits" if "logits" in names else names[0]

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
            return self._session.run([self._output], feed)[0]
        except _ort_errors() as error:
            raise SurgeonError(
                Code.RUNTIME_FAILED,
                f"ONNX Runtime failed in '{self.path.name}'",
                at=f"{self.path}, input_ids {list(ids.shape)}, on {self.providers[0]}",
                why=_one_line(error),
                try_="a shorter sequence, or another execution provider",
            ) from error

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
                try_="export with 'surgeon export'; its inputs are " + ", ".join(INPUTS),
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

    def _check_loaded(self, asked: Sequence[str], *, explicit: bool) -> None:
        absent = [name for name in asked if name not in self.providers]
        if not absent:
            return
        if not explicit:
            warnings.warn(
                f"this machine has a CUDA device, but {absent[0]} did not load; using {CPU}. "
                "The extra 'model-surgeon[cuda]' brings the libraries that it needs.",
                stacklevel=3,
            )
            return
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            f"the execution provider {absent[0]} did not load",
            at=str(self.path),
            why="ONNX Runtime has it, but not the device or the libraries that it needs; "
            f"only {', '.join(self.providers)} came up",
            try_=f"pip install 'model-surgeon[cuda]' on a machine with the device, or {CPU}",
            data={"asked": list(asked), "loaded": list(self.providers)},
        )


def _check_known(asked: Sequence[str], known: Sequence[str], path: Path) -> None:
    unknown = [name for name in asked if name not in known]
    if unknown or not asked:
        raise SurgeonError(
            Code.RUNTIME_FAILED,
            f"there is no execution provider '{unknown[0]}'"
            if unknown
            else "no execution provider was named",
            at=str(path),
            why=f"the ONNX Runtime installed here has {', '.join(known)}",
            try_=near(unknown[0], known) if unknown else CPU,
            data={"asked": list(asked), "known": list(known)},
        )


def _default_providers(ort: Any) -> tuple[str, ...]:
    # The GPU build lists CUDA on every machine, and asking for it without a device prints an error.
    if CUDA in ort.get_available_providers() and _has_cuda_device():
        return (CUDA, CPU)
    return (CPU,)


def _has_cuda_device() -> bool:
    """Asks the driver itself, so that neither torch nor a CUDA toolkit is needed to know."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return (
        driver.cuInit(0) == 0
        and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
        and count.value > 0
    )


def _positions(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Counts the tokens of a mask [batch, sequence]; padding on the left gets position 0."""
    return np.maximum(np.cumsum(mask.astype(np.int64), axis=-1) - 1, 0)


def _ort_errors() -> tuple[type[Exception], ...]:
    """The exceptions of ONNX Runtime, which share no base class of their own."""
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    own = [
        kind
        for kind in vars(state).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    return (*own, RuntimeError, ValueError)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
