"""Where a model runs: on a CUDA device or on the CPU, and what is missing for the former."""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
import sys
from dataclasses import dataclass
from typing import Any

from surgeon.errors import Code, SurgeonError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

DEVICES = ("auto", "cuda", "cpu")
"""What a user may ask for. `auto` takes CUDA where all of it works, and says which it took."""


@dataclass(frozen=True)
class Device:
    """The device that a model is to run on."""

    name: str
    """`cuda` or `cpu`."""
    note: str
    """Why this one, in a few words."""

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers of ONNX Runtime, in order of preference."""
        # The CPU computes shapes under CUDA too.
        return (CUDA, CPU) if self.name == "cuda" else (CPU,)


def choose_device(asked: str) -> Device:
    """Returns the device for ONNX Runtime, after trying what it needs.

    Raises:
        SurgeonError: an unknown name, or `cuda` where something that it needs is missing.
    """
    _check_name(asked)
    if asked == "cpu":
        return Device("cpu", "asked for")
    missing = missing_for_cuda()
    if not missing:
        return Device("cuda", "asked for" if asked == "cuda" else "a CUDA device works")
    if asked == "auto":
        return Device("cpu", f"no CUDA: {missing[0]}")
    raise _no_cuda(
        missing, "a GPU with its driver, and pip install 'model-surgeon[cuda]'; or --device cpu"
    )


def choose_torch_device(asked: str) -> Device:
    """Returns the device for a model in torch.

    Raises:
        SurgeonError: an unknown name, or `cuda` where torch can't use it.
    """
    import torch

    _check_name(asked)
    if asked == "cpu":
        return Device("cpu", "asked for")
    if torch.cuda.is_available():
        return Device("cuda", "asked for" if asked == "cuda" else "a CUDA device works")
    missing: list[str] = []
    if not torch.backends.cuda.is_built():
        missing.append(f"torch {torch.__version__} is built without CUDA")
    driver = driver_fault()
    missing += [driver] if driver else []
    missing = missing or ["torch finds no CUDA device that it supports"]
    if asked == "auto":
        return Device("cpu", f"no CUDA: {missing[0]}")
    raise _no_cuda(missing, "a build of torch with CUDA on a machine with a GPU; or --device cpu")


def missing_for_cuda() -> tuple[str, ...]:
    """Returns what ONNX Runtime lacks to run on a GPU here, each in words; empty if nothing."""
    import onnxruntime as ort

    if CUDA not in ort.get_available_providers():
        return (f"the ONNX Runtime installed here has no {CUDA} (package onnxruntime-gpu has)",)
    found: list[str] = []
    driver = driver_fault()
    if driver is not None:
        found.append(driver)
    libraries = missing_libraries(ort)
    if libraries:
        found.append(f"CUDA libraries that can't be loaded: {', '.join(libraries)}")
    return tuple(found)


def driver_fault() -> str | None:
    """Returns why the CUDA driver is of no use here, or None if it sees a device."""
    # The driver itself is asked, so that neither torch nor a CUDA toolkit is needed to know.
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
        init, device_count = driver.cuInit, driver.cuDeviceGetCount
    except OSError:
        return f"the CUDA driver can't be loaded ({name})"
    except AttributeError as error:
        return f"{name} is no CUDA driver ({error})"
    status = init(0)
    if status != 0:
        return f"the CUDA driver finds no device it can use (cuInit gives {status})"
    count = ctypes.c_int(0)
    if device_count(ctypes.byref(count)) != 0 or count.value < 1:
        return "the CUDA driver sees no device"
    return None


def missing_libraries(ort: Any) -> tuple[str, ...]:
    """Loads the CUDA libraries that ONNX Runtime needs and returns those that it can't find."""
    # The libraries of the `cuda` extra lie inside the environment, where no loader looks. What
    # can't be loaded is only printed.
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    names = re.findall(r"^Failed to load (.+?): ", said.getvalue(), flags=re.MULTILINE)
    return tuple(dict.fromkeys(re.split(r"[\\/]", name)[-1] for name in names))


def _check_name(asked: str) -> None:
    if asked not in DEVICES:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"there is no device {asked!r}",
            at="--device",
            why="models run on a CUDA device or on the CPU",
            try_="one of: " + ", ".join(DEVICES),
            data={"asked": asked},
        )


def _no_cuda(missing: Any, try_: str) -> SurgeonError:
    return SurgeonError(
        Code.RUNTIME_FAILED,
        "CUDA was asked for, but it doesn't work on this machine",
        at="--device cuda",
        why="; ".join(missing),
        try_=try_,
        data={"missing": list(missing)},
    )
