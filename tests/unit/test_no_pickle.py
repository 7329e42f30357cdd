"""Nothing that is read can run code: no pickle, and no code of a checkpoint unless asked for."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import ROOT

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
LOADERS = {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle"}
CHECKED = {Path("surgeon/runtime/program_file.py"): "torch.export.load"}
"""`.pt2` files that the user names, after `check_archive`."""

TRUSTED = {Path("surgeon/capture/configs.py"): 1}
"""Where `trust_remote_code=True` is written: after it was found to be asked for, or our own."""

FILES = [f.relative_to(ROOT) for p in ("surgeon", "passes") for f in (ROOT / p).rglob("*.py")]


def faults(path: Path, tree: ast.AST) -> Iterator[str]:
    trusted = 0
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                found = {name.name.split(".")[0] for name in names}
            case ast.ImportFrom(module=module):
                found = {(module or "").split(".")[0]}
            case _:
                found = set[str]()
        yield from (f"imports {name}" for name in found & MODULES)
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).replace("numpy.", "np.")
            values = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if name in SAFE and values.get(SAFE[name][0]) is not SAFE[name][1]:
                yield f"{name} without {SAFE[name][0]}={SAFE[name][1]}"
            if name in LOADERS or (name == "torch.export.load" and CHECKED.get(path) != name):
                yield f"calls {name}"
            trusted += values.get("trust_remote_code") is True
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            given = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            places = arguments.posonlyargs + arguments.args
            last = places[len(places) - len(arguments.defaults) :]
            for argument, default in (*given, *zip(last, arguments.defaults, strict=True)):
                on = default is not None and getattr(default, "value", False) is not False
                if "trust" in argument.arg and on:
                    yield f"{node.name} trusts by default"
    if trusted > TRUSTED.get(path, 0):
        yield "trusts code that nobody asked for"


def test_no_module_reads_what_can_run_code() -> None:
    trees = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in FILES}
    assert {p: found for p, tree in trees.items() if (found := list(faults(p, tree)))} == {}


@pytest.mark.parametrize(
    "code",
    [
        *("import pickle", "from joblib import load", "torch.load(f)", "torch.export.load(f)"),
        *("torch.load(f, weights_only=False)", "np.load(f)", "numpy.load(f, allow_pickle=True)"),
        *("yaml.load(t)", "load(m, trust_remote_code=True)"),
        *("def f(trust_remote_code=True): pass", "def f(*, trust=1): pass"),
    ],
)
def test_such_a_module_would_be_found(code: str) -> None:
    assert list(faults(Path("x.py"), ast.parse(code)))
