"""Which execution provider takes each node of an ONNX file, found without a GPU.

ONNX Runtime decides where a node runs while it opens a session, and the decision is made by the
real CUDA provider library. That library only needs CUDA in order to be loaded. Here the CUDA
libraries that it links are replaced by stand-ins, compiled from its own list of undefined symbols:
memory calls work on the host's memory, every other call does nothing and reports success. A
session opened on top of them is partitioned as it would be on a GPU; running it would give
nonsense, so nothing ever runs it.

What this proves is placement alone: a kernel may still refuse, when it runs, what it was given.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import mmap
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

_LEVELS = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


class PlacementError(Exception):
    """Placement can't be found out here, or the file can't be opened; the message says why."""


@dataclass(frozen=True)
class Node:
    """One node of the graph that ONNX Runtime made of a file, and who runs it."""

    name: str
    op: str
    """The operator, with its domain unless that is ONNX's own: `com.microsoft.QuickGelu`."""
    provider: str


@dataclass(frozen=True)
class Placement:
    """Every node of one file's graph with the provider that takes it."""

    nodes: tuple[Node, ...]

    def on(self, provider: str) -> tuple[Node, ...]:
        """The nodes that `provider` takes."""
        return tuple(node for node in self.nodes if node.provider == provider)

    def counts(self) -> dict[str, dict[str, int]]:
        """The number of nodes by provider and operator."""
        out: dict[str, Counter[str]] = {}
        for node in self.nodes:
            out.setdefault(node.provider, Counter())[node.op] += 1
        return {provider: dict(sorted(ops.items())) for provider, ops in sorted(out.items())}


def unavailable() -> str:
    """The reason why placement can't be found out on this machine; empty where it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return f"needs Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    if _compiler() is None:
        return "needs a C compiler (cc, gcc or clang on PATH, or in CC)"
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return "needs onnxruntime-gpu, no onnxruntime is installed"
    if not _provider_library(Path(spec.origin).parent).exists():
        return "needs onnxruntime-gpu, the onnxruntime here has no CUDA provider library"
    return ""


def placement(path: Path | str, *, optimise: str = "all") -> Placement:
    """The provider that takes each node of one ONNX file; see `placements`."""
    [(_, found)] = placements([path], optimise=optimise)
    if isinstance(found, PlacementError):
        raise found
    return found


def placements(
    paths: Sequence[Path | str], *, optimise: str = "all"
) -> Iterator[tuple[Path, Placement | PlacementError]]:
    """Each file with its placement, or with the reason why no session could be opened.

    Args:
        paths: ONNX files. Each is opened in a process of its own.
        optimise: how far ONNX Runtime may rewrite the graph: none, basic, extended, all.

    Raises:
        PlacementError: if placement can't be found out on this machine.
    """
    if reason := unavailable():
        raise PlacementError(reason)
    with tempfile.TemporaryDirectory(prefix="cuda-stand-ins-") as folder:
        _build_stand_ins(Path(folder))
        for path in map(Path, paths):
            yield path, _in_child(path, Path(folder), optimise)


# ---- ELF: what the provider library asks of the libraries it links ------------------------------


@dataclass(frozen=True)
class _Symbol:
    name: str
    defined: bool
    weak: bool
    library: str
    """The library it is bound to by symbol versioning; empty if to none."""
    version: str


@dataclass(frozen=True)
class _Elf:
    needed: tuple[str, ...]
    symbols: tuple[_Symbol, ...]


def _read_elf(path: Path) -> _Elf:
    """The dynamic linking facts of a 64-bit little-endian ELF file.

    Reference: the System V ABI, chapters 4 and 5, and the symbol versioning part of the Linux
    Standard Base.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            raise PlacementError(f"{path} is not a 64-bit little-endian ELF file")
        table, entry, count = (
            struct.unpack_from("<Q", data, 40)[0],
            *struct.unpack_from("<HH", data, 58),
        )
        # name, type, flags, address, offset, size, link, info, alignment, entry size
        sections = [
            struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry) for i in range(count)
        ]
        by_type = {section[1]: section for section in sections}

        def text(section: tuple[int, ...], at: int) -> str:
            start = sections[section[6]][4] + at
            return data[start : data.find(b"\0", start)].decode()

        dynamic, symbols = by_type[6], by_type[11]
        pairs = struct.iter_unpack("<QQ", data[dynamic[4] : dynamic[4] + dynamic[5]])
        needed = tuple(text(dynamic, value) for tag, value in pairs if tag == 1)

        versions: dict[int, tuple[str, str]] = {}
        if needs := by_type.get(0x6FFFFFFE):
            at = needs[4]
            for _ in range(needs[7]):
                _, inner, library, first, following = struct.unpack_from("<HHIII", data, at)
                here = at + first
                for _ in range(inner):
                    _, _, index, name, step = struct.unpack_from("<IHHII", data, here)
                    versions[index] = (text(needs, library), text(needs, name))
                    here += step
                at += following

        numbers = by_type.get(0x6FFFFFFF)
        found: list[_Symbol] = []
        for i in range(1, symbols[5] // 24):
            name, info, _, section = struct.unpack_from("<IBBH", data, symbols[4] + i * 24)
            index = 0
            if numbers:
                index = struct.unpack_from("<H", data, numbers[4] + 2 * i)[0] & 0x7FFF
            library, version = versions.get(index, ("", ""))
            found.append(
                _Symbol(text(symbols, name), section != 0, info >> 4 == 2, library, version)
            )
    return _Elf(needed, tuple(found))


# ---- the stand-ins ------------------------------------------------------------------------------

# The first fields of cudaDeviceProp lie alike in CUDA 12 (a clock rate fills the gap before
# `constant`) and CUDA 13 (driver_types.h); both structures are at least 1000 bytes long.
_PROPERTIES = """
struct properties {
    char name[256], uuid[16], luid[8]; unsigned mask;
    size_t memory, shared; int registers, warp; size_t pitch; int threads, block[3], grid[3];
    size_t constant; int major, minor;
};
int %s(void *out, int device) {
    struct properties *p = out;
    memset(out, 0, 1000);
    strcpy(p->name, "stand-in");
    p->memory = (size_t)80 << 30; p->shared = 48 << 10; p->registers = 65536; p->warp = 32;
    p->threads = 1024; p->block[0] = p->block[1] = 1024; p->block[2] = 64;
    p->grid[0] = 2147483647; p->grid[1] = p->grid[2] = 65535; p->constant = 65536;
    p->major = 9; p->minor = 0;
    return 0;
}
"""

# The calls that must do more than report success. Every call takes its arguments as C passes them
# on this platform, so a definition may leave out the ones that it doesn't read.
_CALLS: Mapping[str, str] = {
    "cudaGetDeviceCount": "int %s(int *n) { *n = 1; return 0; }",
    "cudaGetDevice": "int %s(int *d) { *d = 0; return 0; }",
    "cudaGetDeviceProperties": _PROPERTIES,
    "cudaGetDeviceProperties_v2": _PROPERTIES,
    # cudaDeviceAttr: 1 threads per block, 10 warp size, 16 multiprocessors, 75/76 compute
    # capability, 97 shared memory that a block may ask for.
    "cudaDeviceGetAttribute": """
int %s(int *value, int attribute) {
    switch (attribute) {
    case 1: *value = 1024; break;
    case 10: *value = 32; break;
    case 16: *value = 132; break;
    case 75: *value = 9; break;
    case 97: *value = 227 << 10; break;
    default: *value = 0;
    }
    return 0;
}
""",
    "cudaRuntimeGetVersion": "int %s(int *v) { *v = VERSION; return 0; }",
    "cudaDriverGetVersion": "int %s(int *v) { *v = VERSION; return 0; }",
    "cudaMemGetInfo": "int %s(size_t *f, size_t *t) { *f = *t = (size_t)80 << 30; return 0; }",
    "cudaMalloc": "int %s(void **p, size_t n) { return (*p = calloc(1, n ? n : 1)) ? 0 : 2; }",
    "cudaMallocHost": "int %s(void **p, size_t n) { return (*p = calloc(1, n ? n : 1)) ? 0 : 2; }",
    "cudaHostAlloc": "int %s(void **p, size_t n) { return (*p = calloc(1, n ? n : 1)) ? 0 : 2; }",
    "cudaMallocAsync": "int %s(void **p, size_t n) { return (*p = calloc(1, n ? n : 1)) ? 0 : 2; }",
    "cudaMallocFromPoolAsync": (
        "int %s(void **p, size_t n) { return (*p = calloc(1, n ? n : 1)) ? 0 : 2; }"
    ),
    "cudaFree": "int %s(void *p) { free(p); return 0; }",
    "cudaFreeAsync": "int %s(void *p) { free(p); return 0; }",
    "cudaFreeHost": "int %s(void *p) { free(p); return 0; }",
    "cudaMemcpy": "int %s(void *d, const void *s, size_t n) { memmove(d, s, n); return 0; }",
    "cudaMemcpyAsync": "int %s(void *d, const void *s, size_t n) { memmove(d, s, n); return 0; }",
    "cudaMemset": "int %s(void *d, int v, size_t n) { memset(d, v, n); return 0; }",
    "cudaMemsetAsync": "int %s(void *d, int v, size_t n) { memset(d, v, n); return 0; }",
    "cudaMemcpy2DAsync": """
int %s(char *d, size_t dp, const char *s, size_t sp, size_t width, size_t height) {
    for (size_t i = 0; i < height; ++i) memmove(d + i * dp, s + i * sp, width);
    return 0;
}
""",
    "cudaPointerGetAttributes": "int %s(void *out) { memset(out, 0, 24); return 0; }",
    "cudaGetDriverEntryPointByVersion": (
        "static int nothing(void) { return 0; }\n"
        "int %s(const char *n, void **p, unsigned v, unsigned long long f, int *status) {"
        " *p = (void *)nothing; if (status) *status = 0; return 0; }"
    ),
    "cudaGetErrorString": 'const char *%s(void) { return "stand-in"; }',
    "cudaGetErrorName": 'const char *%s(void) { return "stand-in"; }',
    "cudnnGetErrorString": 'const char *%s(void) { return "stand-in"; }',
    "cublasGetStatusName": 'const char *%s(void) { return "stand-in"; }',
    "cublasGetStatusString": 'const char *%s(void) { return "stand-in"; }',
    "cudaStreamIsCapturing": "int %s(void *s, int *status) { *status = 0; return 0; }",
    "__cudaRegisterFatBinary": "void **%s(void) { return (void **)object; }",
}

# Calls whose first argument is where a new object goes: it must not stay uninitialised.
_CREATES = re.compile(r"(Create(_v2|WithFlags|WithPriority)?|Instantiate|__cudaGetKernel)$")


def _definition(symbol: str) -> str:
    if symbol in _CALLS:
        return _CALLS[symbol].replace("%s", symbol)
    if _CREATES.search(symbol):
        return f"int {symbol}(void **p) {{ *p = object; return 0; }}"
    return f"int {symbol}(void) {{ return 0; }}"


def _compiler() -> str | None:
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _provider_library(package: Path) -> Path:
    return package / "capi" / "libonnxruntime_providers_cuda.so"


@functools.cache
def wanted() -> dict[str, dict[str, str]]:
    """By library that is to be replaced: its symbols, each with its version (or an empty text)."""
    spec = importlib.util.find_spec("onnxruntime")
    assert spec is not None and spec.origin is not None, "checked by `unavailable`"
    provider = _provider_library(Path(spec.origin).parent)
    elf = _read_elf(provider)
    out: dict[str, dict[str, str]] = {
        library: {} for library in elf.needed if re.match(r"lib(cu|nv)", library)
    }
    # A symbol bound to no library may be the runtime's own, which exports it to its providers.
    own = {
        symbol.name
        for sibling in provider.parent.glob("*.so*")
        if sibling != provider
        for symbol in _read_elf(sibling).symbols
        if symbol.defined
    }
    versioned = {symbol.library for symbol in elf.symbols if symbol.library}
    anywhere = next((library for library in out if library not in versioned), next(iter(out), ""))
    for symbol in elf.symbols:
        if symbol.defined or symbol.weak:
            continue
        if symbol.library in out:
            out[symbol.library][symbol.name] = symbol.version
        elif not symbol.library and symbol.name not in own:
            out[anywhere][symbol.name] = ""
    return out


def _build_stand_ins(folder: Path) -> None:
    """`folder` holds a stand-in for each CUDA library that the provider library links."""
    compiler = _compiler()
    assert compiler is not None, "checked by `unavailable`"
    # The runtime's number says which CUDA this is: libcudart.so.13 belongs to 13.0.
    major = next((n.rsplit(".", 1)[1] for n in wanted() if n.startswith("libcudart.so.")), "12")
    head = (
        "#include <stddef.h>\n#include <stdlib.h>\n#include <string.h>\n"
        f"#define VERSION {int(major) * 1000}\nstatic char object[4096];\n"
    )
    for library, symbols in wanted().items():
        # One name may be wanted from several libraries, never with two versions from one.
        source, script = folder / f"{library}.c", folder / f"{library}.map"
        source.write_text(head + "\n".join(_definition(symbol) for symbol in symbols) + "\n")
        versions = sorted({version for version in symbols.values() if version})
        script.write_text(
            "".join(
                f"{version} {{ global: "
                + " ".join(f"{name};" for name, its in symbols.items() if its == version)
                + " };\n"
                for version in versions
            )
        )
        command = [
            compiler,
            "-shared",
            "-fPIC",
            "-O0",
            "-w",
            "-fno-builtin",
            f"-Wl,-soname,{library}",
        ]
        if versions:
            command.append(f"-Wl,--version-script={script}")
        done = subprocess.run(
            [*command, "-o", str(folder / library), str(source)], capture_output=True, text=True
        )
        if done.returncode:
            raise PlacementError(f"the stand-in for {library} can't be compiled: {done.stderr}")


# ---- the session, in a process of its own -------------------------------------------------------


def _in_child(path: Path, folder: Path, optimise: str) -> Placement | PlacementError:
    """The placement of one file. A crash of the process is a reason like any other."""
    result = folder / "result.json"
    result.unlink(missing_ok=True)
    env = dict(os.environ)
    env["LD_LIBRARY_PATH"] = os.pathsep.join(
        [str(folder), *filter(None, [env.get("LD_LIBRARY_PATH")])]
    )
    command = [sys.executable, __file__, "--child", str(result), "--optimise", optimise, str(path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if not result.exists():
        return PlacementError(f"{path}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    answer: dict[str, Any] = json.loads(result.read_text())
    if "error" in answer:
        said = done.stderr.strip()[-2000:]  # why a provider didn't load is only ever logged
        return PlacementError(f"{path}: {answer['error']}" + (f"\n{said}" if said else ""))
    return Placement(tuple(Node(**node) for node in answer["nodes"]))


def _child(path: str, optimise: str) -> dict[str, Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Prepacking runs kernels; where nodes go has been decided before.
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[optimise])
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=[CUDA, CPU])
    except Exception as error:  # noqa: BLE001 - every refusal is a result, and is passed on
        return {"error": f"no session: {error}"}
    if CUDA not in session.get_providers():
        return {
            "error": f"the CUDA provider didn't load; the session has {session.get_providers()}"
        }
    nodes = [
        {
            "name": node.name,
            "op": f"{node.domain}.{node.op_type}" if node.domain else node.op_type,
            "provider": part.ep_name,
        }
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    return {"nodes": nodes}


def main() -> int:
    """Prints the placement of the files that the command line names; 1 if one can't be opened."""
    parser = argparse.ArgumentParser(
        prog="cuda_placement",
        description="Says which provider of ONNX Runtime takes each node. Needs no GPU.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--optimise", choices=_LEVELS, default="all", help="how far the graph may be rewritten"
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        given.child.write_text(json.dumps(_child(str(given.files[0]), given.optimise)))
        return 0

    failed, everything = False, {}
    try:
        for path, found in placements(given.files, optimise=given.optimise):
            if isinstance(found, PlacementError):
                failed = True
                everything[str(path)] = {"error": str(found)}
                if not given.json:
                    print(found, file=sys.stderr)
                continue
            everything[str(path)] = {
                "counts": found.counts(),
                "nodes": [asdict(node) for node in found.nodes],
            }
            if not given.json:
                _print(path, found)
    except PlacementError as error:
        print(error, file=sys.stderr)
        return 2
    if given.json:
        print(json.dumps(everything, indent=1))
    return int(failed)


def _print(path: Path, found: Placement) -> None:
    print(path)
    for provider, ops in found.counts().items():
        print(f"  {provider}  {sum(ops.values())}")
        for op, count in ops.items():
            print(f"    {count:5}  {op}")
    for node in found.on(CPU):
        print(f"  on the CPU: {node.op}  {node.name}")


if __name__ == "__main__":
    sys.exit(main())
