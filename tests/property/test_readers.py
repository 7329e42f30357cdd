"""Texts and files that somebody has broken are read, or refused in four parts: nothing else."""

from __future__ import annotations

import copy
import json
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon import recipes
from surgeon.axes.clock import Table
from surgeon.axes.plan import Cut, Plan
from surgeon.calibrate import stored
from surgeon.capture.configs import read_config
from surgeon.capture.gguf_file import GGUFHeader
from surgeon.capture.weights import SafetensorsWeights
from surgeon.errors import SurgeonError
from surgeon.ir import parse

pytestmark = pytest.mark.slow


class Deep:
    """Stands for a list of 3,000 levels, which the JSON library reads no more than it writes."""


HOSTILE = (
    *(None, True, -1, 0, 2**31, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "../../x", "/etc/passwd", "\x00", "ü" * 40, [], {}, [[]], {"": {}}, [None], Deep()),
)
MOST = 32 * 2**20
"""Bytes that reading a text of a kilobyte may take at a time."""

PROGRAM = """\
surgeon.program 1
meta "class" "Tiny"
symbol batch
guard "batch > 1"
input %input_ids: i64[batch, {2*seq}]
parameter $w: f32[4, 3] = $tied
%mul: f32[batch, 4], %"a b": bool[] = aten.mul.Tensor(%input_ids, $w, [1, -2.5e3, inf], dim={s0}, t=#f32, s="x", b=None) @ "m" "x.py:3"
return %mul
"""  # noqa: E501
PLAN = Plan(
    (Cut("model.layers.0/ffn", 8, (0, 3)), Cut("v", 4, ((0, 1), (1, 2)), ("kv",))),
    ("model.layers.1/mlp",),
    (("fingerprint", "abc"), ("id", "m")),
    ("w",),
    ("vocab",),
    (("w", 2),),
).to_json()
RECIPE = """\
version: 1
about: what
budget: {ratio: 0.2, roles: {ffn: 1/3}, freeze: ['a*'], limits: {ffn: 0.5}}
calibration: {sources: [{source: a.txt, weight: 2}], samples: 4}
passes:
  - score: magnitude
    p: 2
  - select: uniform
"""
CONFIG = {"model_type": "llama", "hidden_size": 8, "rope_scaling": {"factor": 2.0}, "auto_map": {}}
HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}
INDEX = {"metadata": {"total_size": 24}, "weight_map": {"a": "model-1.safetensors"}}
STATISTICS = {
    "format": 1,
    "fingerprint": "abc",
    "statistics": {
        "moments": {"w": {"count": 3, "mean": "a", "square": "a", "second": "b"}},
        "similarity": {"model.layers.0": 0.5},
    },
}
TABLE = {
    "version": 1,
    "pieces": [
        {
            "places": [[["a/ffn"], ["b"]]],
            "sizes": [8],
            "grids": [
                {"dropped": [], "dims": [0], "counts": [[4, 8]], "seconds": [0.1, 0.2]},
            ],
        }
    ],
    "others": {"h": 8},
    "rest": 0.1,
    "tokens": 8,
    "batch": 1,
    "repeat": 1,
    "device": "cpu",
    "versions": {},
}


def safetensors(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(24)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


GGUF = b"".join(
    [
        *(b"GGUF", struct.pack("<IQQ", 3, 1, 3)),
        *(text("general.architecture"), struct.pack("<I", 8), text("llama")),
        *(text("general.alignment"), struct.pack("<II", 4, 32)),
        *(text("tokens"), struct.pack("<IIQ", 9, 8, 2), text("a"), text("b")),
        *(text("w"), struct.pack("<IQIQ", 1, 4, 0, 0), bytes(64)),
    ]
)

# --- readers of bytes ----------------------------------------------------------------------------


def _file(folder: Path, name: str, data: bytes) -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def _weights(folder: Path, data: bytes) -> None:
    _file(folder, "model.safetensors", data)
    weights = SafetensorsWeights(folder)
    for name in weights:
        weights[name]
    weights.fingerprint()


def _index(folder: Path, data: bytes) -> None:
    _file(folder, "model-1.safetensors", safetensors(json.dumps(HEADER).encode()))
    _file(folder, "model.safetensors.index.json", data)
    assert all(file.parent == folder for file in SafetensorsWeights(folder).files)


def _statistics(folder: Path, data: bytes) -> None:
    """Reads a header's entry of valid tensors; the tensors are safetensors' own to read."""
    metadata = {"surgeon.statistics": data.decode("utf-8", "replace")}
    header = json.dumps({**HEADER, "__metadata__": metadata}).encode()
    found = stored.load(_file(folder, "s.safetensors", safetensors(header)))
    found.moments(["w"])
    found.similarity(["model.layers.0"])


def _recipe(folder: Path, data: bytes) -> None:
    recipes.load_recipe(str(_file(folder, "r.yaml", data)))


def _decoded(read: Callable[[str], Any]) -> Callable[[Path, bytes], Any]:
    return lambda _, data: read(data.decode("utf-8", "surrogateescape"))


READERS: dict[str, tuple[bytes, Callable[[Path, bytes], Any]]] = {
    "program": (PROGRAM.encode(), _decoded(parse)),
    "plan": (PLAN.encode(), _decoded(Plan.from_json)),
    "recipe": (RECIPE.encode(), _recipe),
    "config": (json.dumps(CONFIG).encode(), lambda f, d: read_config(_file(f, "config.json", d))),
    "weights": (safetensors(json.dumps(HEADER).encode()), _weights),
    "index": (json.dumps(INDEX).encode(), _index),
    "statistics": (json.dumps(STATISTICS).encode(), _statistics),
    "timings": (json.dumps(TABLE).encode(), _decoded(Table.from_json)),
    "gguf": (GGUF, lambda f, d: GGUFHeader(_file(f, "m.gguf", d))),
}


def survives(name: str, data: bytes) -> None:
    """Reads it, or sees it refused, in little memory."""
    with tempfile.TemporaryDirectory() as folder:
        tracemalloc.start()
        try:
            READERS[name][1](Path(folder), data)
        except SurgeonError as error:
            assert all((error.what, error.at, error.why, error.try_)), str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MOST


@pytest.mark.parametrize("name", READERS)
def test_what_is_whole_is_read(name: str, tmp_path: Path) -> None:
    valid, read = READERS[name]
    read(tmp_path, valid)


SPANS = st.tuples(
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 12),
    st.one_of(
        st.binary(max_size=12),
        st.sampled_from(
            [b'"', b"{", b"}", b"[", b"]", b"\\", b"\xff", b"\n", b"[" * 3000, b"9" * 40]
        ),
    ),
)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60)
@given(edits=st.lists(SPANS, min_size=1, max_size=4))
def test_bytes_that_were_changed(name: str, edits: list[tuple[float, int, bytes]]) -> None:
    data = READERS[name][0]
    for place, removed, added in edits:
        at = int(place * len(data))
        data = data[:at] + added + data[at + removed :]
    survives(name, data)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=15)
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_bytes_that_are_nothing(name: str, data: bytes) -> None:
    survives(name, data)


# --- values of JSON ------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yields the path of every value inside one."""
    yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    out = copy.copy(value)
    out[path[0]] = replaced(value[path[0]], path[1:], new)
    return out


def spelled(value: Any) -> bytes:
    """Returns the JSON of a value."""
    text = json.dumps(value, default=lambda _: "the deep one")
    return text.replace('"the deep one"', "[" * 3000 + "]" * 3000).encode()


JSONS = {
    "plan": json.loads(PLAN),
    "config": CONFIG,
    "weights": HEADER,
    "index": INDEX,
    "statistics": STATISTICS,
    "timings": TABLE,
}


@pytest.mark.parametrize(
    "line",
    [
        "%x: f32[" + "9" * 9000 + "] = a.b(1)",
        "%x: f32[1] = a.b(" + "9" * 9000 + ")",
        "%x: f32[1] = a.b(" + "[" * 9000 + "]" * 9000 + ")",
        '%x: f32[1] = a.b("\\ud800")',
        "%x: f32[1] = a.b({" + "(" * 9000 + "})",
    ],
)
def test_operations_without_end(line: str) -> None:
    survives("program", f"surgeon.program 1\n{line}\nreturn %x\n".encode())


@pytest.mark.parametrize("name", JSONS)
def test_values_that_make_no_sense(name: str) -> None:
    for path in places(JSONS[name]):
        for value in HOSTILE:
            data = spelled(replaced(JSONS[name], path, value))
            survives(name, safetensors(data) if name == "weights" else data)
