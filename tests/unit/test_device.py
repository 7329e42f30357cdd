"""Which device is taken, and what is said of one that is missing."""

from __future__ import annotations

import pytest
import torch

from surgeon.errors import Code, SurgeonError
from surgeon.runtime import device
from surgeon.runtime.device import CPU, CUDA, choose_device, choose_torch_device


def refused(code: Code, call, *args) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        call(*args)
    assert caught.value.code is code
    return caught.value


@pytest.fixture
def machine(monkeypatch):
    """Sets what the machine has: providers, a driver's fault, missing libraries."""
    import onnxruntime as ort

    def has(providers=(CUDA, CPU), fault=None, libraries=(), torch_cuda=False):
        monkeypatch.setattr(ort, "get_available_providers", lambda: list(providers))
        monkeypatch.setattr(device, "driver_fault", lambda: fault)
        monkeypatch.setattr(device, "missing_libraries", lambda _: tuple(libraries))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_cuda)

    return has


def test_auto_takes_cuda_where_it_works_and_says_which_it_took(machine):
    machine(torch_cuda=True)
    for choose in (choose_device, choose_torch_device):
        assert choose("auto").name == "cuda" and "works" in choose("auto").note
        assert choose("cpu").name == "cpu"
    assert choose_device("cuda").providers == (CUDA, CPU)
    assert choose_device("cpu").providers == (CPU,)
    machine(fault="the driver is asleep")
    assert choose_device("auto").name == "cpu"
    assert "the driver is asleep" in choose_device("auto").note


def test_cuda_without_a_gpu_names_all_that_is_missing(machine):
    machine(fault="no driver", libraries=["libcudart.so.13", "libcublasLt.so.13"])
    error = refused(Code.RUNTIME_FAILED, choose_device, "cuda")
    assert "no driver" in error.why
    assert "libcudart.so.13, libcublasLt.so.13" in error.why
    assert len(error.data["missing"]) == 2 and "model-surgeon[cuda]" in error.try_
    machine(providers=(CPU,))
    assert CUDA in refused(Code.RUNTIME_FAILED, choose_device, "cuda").why
    machine(fault="no driver")
    assert "no driver" in refused(Code.RUNTIME_FAILED, choose_torch_device, "cuda").why
    assert "no CUDA: " in choose_torch_device("auto").note


def test_an_unknown_device_is_refused_before_anything_is_tried():
    for choose in (choose_device, choose_torch_device):
        assert "auto, cuda, cpu" in refused(Code.BAD_OPTION, choose, "gpu").try_


class Driver:
    """A CUDA driver that answers as it is told."""

    def __init__(self, status: int = 0, devices: int = 1) -> None:
        self.status, self.devices = status, devices

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count) -> int:
        count._obj.value = self.devices
        return 0


@pytest.mark.parametrize(
    ("driver", "says"),
    [
        (Driver(), None),
        (object(), "no CUDA driver"),
        (Driver(status=100), "cuInit gives 100"),
        (Driver(devices=0), "no device"),
    ],
)
def test_the_driver_itself_is_asked(monkeypatch, driver, says):
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: driver)
    found = device.driver_fault()
    assert (found is None) if says is None else (found is not None and says in found)


def test_a_driver_that_can_t_be_loaded_is_named(monkeypatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(device.ctypes, "CDLL", absent)
    found = device.driver_fault()
    assert found is not None and "can't be loaded" in found and "cuda" in found


def test_libraries_that_the_runtime_could_not_load_are_named(capsys):
    class Runtime:
        @staticmethod
        def preload_dlls() -> None:
            print("Failed to load libcublasLt.so.13: cannot open shared object file")
            print("Failed to load /opt/env/nvidia/cu13/lib/libcublas.so.13: wrong ELF class")
            print("Failed to load libcublasLt.so.13: cannot open shared object file")
            print("Please follow the instructions")

    assert device.missing_libraries(Runtime) == ("libcublasLt.so.13", "libcublas.so.13")
    assert capsys.readouterr().out == ""


def test_the_runtime_installed_here_tells_what_it_can_t_load():
    import onnxruntime as ort

    found = device.missing_libraries(ort)
    assert found == () or any("cublas" in name for name in found)
