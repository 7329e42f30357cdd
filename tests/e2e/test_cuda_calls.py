"""What a session asks of CUDA, without a GPU: allocation, binding, copies, recording of steps.

The CUDA libraries are the stand-ins of `tools/cuda_placement`. Copies work and kernels do nothing,
so what comes out means nothing; but every call that the runtime makes has to be accepted by ONNX
Runtime's own CUDA provider.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.command import ROOT
from tests.decoders import Tiny, write
from tools import cuda_placement

CHILD = """
import json, sys
import numpy as np
from surgeon.runtime import Decoder, device

device.missing_for_cuda = lambda: ()
path, recorded = sys.argv[1], sys.argv[2] == "recorded"
decoder = Decoder(path, device="cuda", cuda_graph=recorded)
cache = decoder.cache(3, 10)
found = [decoder.prefill(cache, [list(range(5, 14)), [4, 5], [9, 8, 7]], chunk=int(sys.argv[3]))]
recordings = []
for _ in range(4):
    found.append(decoder.extend(cache, np.array([[5], [6], [7]])))
    recordings.append(id(cache.replay) if cache.replay else None)
logits = decoder.run(np.array([[5, 6, 7]]))
print(json.dumps({
    "providers": decoder.providers,
    "where": sorted({value.device_name() for value in cache.values.values()}),
    "shapes": [list(f.shape) for f in found],
    "types": sorted({str(f.dtype) for f in found}),
    "run": [list(logits.shape), str(logits.dtype)],
    "capacity": cache.capacity,
    "recordings": recordings,
}))
cache.close()
"""

# Beyond what placement needs: flash attention asks how many multiprocessors there are, and a
# recorded graph must not be null.
PROPERTIES = cuda_placement._PROPERTIES.replace(
    "int major, minor;", "int major, minor; size_t texture[2]; int more[4];"
).replace("p->major = 9;", "for (int i = 0; i < 4; i++) p->more[i] = 132; p->major = 9;")
CALLS = {
    "cudaGetDeviceProperties": PROPERTIES,
    "cudaGetDeviceProperties_v2": PROPERTIES,
    "cudaStreamEndCapture": "int %s(void *s, void **g) { *g = object; return 0; }",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(cuda_placement.unavailable()), reason=cuda_placement.unavailable() or "available"
    ),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_placement, "_CALLS", {**cuda_placement._CALLS, **CALLS})
        cuda_placement._build_stand_ins(folder)
    return folder


def ran(libraries: Path, *args: object) -> dict[str, Any]:
    env = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", CHILD, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("how", ["recorded", "as it is"])
def test_buffers_shared_on_the_device(
    libraries: Path, tmp_path: Path, dtype: str, how: str
) -> None:
    path = write(tmp_path / "model.onnx", Tiny(), dtype=dtype)
    found = ran(libraries, path, how, 4)
    assert found["providers"][0] == cuda_placement.CUDA and found["where"] == ["cuda"]
    assert found["shapes"] == [[3, 101]] * 5 and found["types"] == ["float32"]
    assert found["run"] == [[1, 3, 101], "float16" if dtype == "fp16" else "float32"]
    assert found["capacity"] == 20, "it never grew"
    recordings = found["recordings"]
    if how == "recorded":
        # One for the small cache, one after it grew, which is used again.
        assert None not in recordings and recordings[1] == recordings[2] == recordings[3]
    else:
        assert recordings == [None] * 4


def test_caches_passed_on_on_the_device(libraries: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", Tiny(("concat", "concat")), dtype="fp16")
    found = ran(libraries, path, "as it is", 4)
    assert found["where"] == ["cuda"] and found["shapes"] == [[3, 101]] * 5
