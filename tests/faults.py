"""Kills every writing command at random moments, and says what each kill left behind.

    tools/faults [--kills 100] [--only prune,export-onnx] [--seed 0]

A server imports what the commands need and forks one process for each run, which is the command as
`surgeon` runs it, until SIGKILL ends it: one kill in five at any moment of the run, the others
after it has begun to write. Those are forked from a run that waits where it is about to write, so
that what it computes is computed once. Every other run finds an earlier result in its place. What
is there afterwards is the earlier result byte for byte, a whole new one, or nothing; anything else
is a defect, and so is a changed source, or a temporary name that the next run doesn't take away.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.forked import Parked, finish, start

SCHEDULE = """\
version: 1
budget: {ratio: 0.2}
schedule: {rounds: 2}
passes:
  - score: magnitude
  - select: uniform
"""
TEXT = "The heart is a muscle that pumps blood through the body. " * 40
WINDOWS = ("--window", "16", "--windows", "4")

MODELS = ("model", "pruned")

COMMANDS: dict[str, tuple[str, ...]] = {
    "prune": ("prune", "MODEL", "-o", "OUT/pruned", "--ratio", "0.2", "--no-verify"),
    "run": ("run", "rounds.yaml", "MODEL", "-o", "OUT/pruned", "--no-verify"),
    "recover": (
        *("recover", "PRUNED", "-o", "OUT/better", "--data", "text.txt", "--no-verify"),
        *("--steps", "2", "--batch", "2", "--length", "16", "--option", "save_every=1"),
    ),
    "quantize": ("quantize", "MODEL", "-o", "OUT/small", "--scheme", "int8", "--no-verify"),
    "calibrate": (
        *("calibrate", "MODEL", "-o", "OUT/stats.safetensors", "--calibration", "text.txt"),
        *("--samples", "4", "--length", "16"),
    ),
    "export-folder": ("export", "MODEL", "--to", "onnx", "-o", "OUT/onnx"),
    "export-onnx": ("export", "MODEL", "--to", "onnx", "-o", "OUT/model.onnx"),
    "export-pt2": ("export", "MODEL", "--to", "pt2", "-o", "OUT/model.pt2", "--no-check"),
    "latency": ("latency", "MODEL", "-o", "OUT/clock.json", "--repeat", "5", "--points", "5"),
    "eval": (
        *("eval", "MODEL", "--text", "text.txt", *WINDOWS),
        *("--markdown", "OUT/table.md", "--html", "OUT/page.html"),
    ),
    "compare": (
        *("compare", "MODEL", "PRUNED", "--text", "text.txt", *WINDOWS, "--no-speed"),
        *("--new-tokens", "4", "--markdown", "OUT/table.md", "--html", "OUT/page.html"),
    ),
    "graph": ("graph", "MODEL", "-o", "OUT/graph.json"),
}
"""The writing commands on a tiny model; all are told to overwrite. `demo` calls some of them."""

KEPT = {"run": (".pruned.rounds", "pruned.rounds"), "recover": ("better.training",)}
"""Names beside an output that are kept on purpose: an interrupted run goes on from them."""

THREADED = ("export-folder", "export-onnx", "recover")
"""ONNX Runtime and backward passes start threads, and what has threads must not be forked: these
run in forks alone.
"""


@dataclass
class Left:
    """What kills left behind."""

    kills: int = 0
    outcome: Counter[str] = field(default_factory=Counter)
    siblings: int = 0
    scratch: int = 0
    defects: list[str] = field(default_factory=list)


# --- what is there -------------------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of every file below a folder, by its path in it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def numbers(folder: Path) -> dict[str, int]:
    """Returns what tells the files and folders in a folder from others of the same content."""
    return {path.name: path.stat().st_ino for path in folder.iterdir() if path.name[0] != "."}


def readable(path: Path) -> bool:
    """Whether a file that differs from run to run is whole, as far as its format tells."""
    match path.suffix:
        case ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                return False
            return True
        case ".html":
            return path.read_text(encoding="utf-8").rstrip().endswith("</html>")
        case ".pt2":
            return zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip() is None
        case ".md":
            return path.read_text(encoding="utf-8").endswith("\n")
        case ".safetensors":
            from safetensors import SafetensorError, safe_open

            try:
                with safe_open(str(path), "pt"):
                    return True
            except (SafetensorError, OSError):
                return False
        case _:
            return False


@dataclass(frozen=True)
class Whole:
    """What a finished run leaves: the outputs, and their files that are the same every time.

    Attributes:
        outputs: names of files and folders.
        files: digests by path; None for what differs from run to run.
    """

    outputs: tuple[str, ...]
    files: Mapping[str, str | None]

    def new(self, out: Path) -> str:
        """Returns what is wrong with a result that a run has left; nothing if it is whole."""
        found = {k: v for k, v in digests(out).items() if k.split("/")[0] in self.outputs}
        if found.keys() != self.files.keys():
            return f"files {sorted(found.keys() ^ self.files.keys())} are missing or too many"
        for name, digest in self.files.items():
            if found[name] != digest and (digest is not None or not readable(out / name)):
                return f"{name} is not whole"
        return ""


def judged(out: Path, whole: Whole, old: Mapping[str, str]) -> tuple[str, str]:
    """Returns what a kill left (old, new, nothing, mixed), and what is wrong with it."""
    found = {k: v for k, v in digests(out).items() if k.split("/")[0] in whole.outputs}
    if not found:
        return ("nothing" if not old else "set aside"), ""
    if found == old:
        return "old", ""
    wrong = whole.new(out)
    if not wrong:
        return "new", ""
    if len(whole.outputs) > 1:
        # Files that are written one after the other: each by itself is old, new, or not there.
        for name in whole.outputs:
            one = Whole((name,), {k: v for k, v in whole.files.items() if k.split("/")[0] == name})
            mine = {k: v for k, v in found.items() if k.split("/")[0] == name}
            before = {k: v for k, v in old.items() if k.split("/")[0] == name}
            if mine and mine != before and one.new(out):
                return "defect", wrong
        return "one of two", ""
    return "defect", wrong


# --- faults --------------------------------------------------------------------------------------


class Command:
    """A writing command in a folder of its own."""

    def __init__(self, name: str, work: Path, draw: random.Random) -> None:
        self.name, self.draw = name, draw
        self.place = work / name
        self.out = self.place / "out"
        for folder in (self.out, self.place / "tmp"):
            folder.mkdir(parents=True)
        for file in ("text.txt", "rounds.yaml"):
            shutil.copy(work / file, self.place)
        self.source = {"MODEL": str(work / "model"), "PRUNED": str(work / "pruned")}
        self.arguments = tuple(
            self.source.get(a, a.replace("OUT/", "out/")) for a in COMMANDS[name]
        ) + ("--overwrite",)

    def run(self) -> None:
        finish(start(self.arguments, self.place), self.place)

    def park(self) -> None:
        self.began = time.perf_counter()
        self.parked = Parked(self.arguments, self.place)

    def write(self) -> None:
        """Lets the run that waits write all of it."""
        self.parked.fork()
        if code := self.parked.ended():
            raise RuntimeError(f"exit code {code}: {(self.place / 'log.txt').read_text()[-2000:]}")

    def measure(self) -> Whole:
        """Writes again and returns what it leaves."""
        first = digests(self.out)
        shutil.copytree(self.out, self.place / "first")
        self.write()
        self.seconds = time.perf_counter() - self.began
        begin = time.perf_counter()
        self.write()
        self.writing, again = time.perf_counter() - begin, digests(self.out)
        same = {name: d if d == again.get(name) else None for name, d in first.items()}
        outputs = tuple(sorted({name.split("/")[0] for name in first}))
        return Whole(outputs, same)

    def kill(self, early: bool) -> bool:
        """Starts a run and kills it; returns whether it was still running."""
        if early:
            pid = start(self.arguments, self.place)
            time.sleep(self.draw.uniform(0, self.seconds))
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        pid = self.parked.fork()
        code = self.parked.ended(self.draw.uniform(0, self.writing))
        if code is None:
            os.kill(pid, signal.SIGKILL)
            code = self.parked.ended()
        # How long it takes depends on what else the machine does.
        self.writing *= 1.2 if code == -signal.SIGKILL else 0.7
        return code == -signal.SIGKILL

    def clear(self) -> None:
        for path in (*self.out.iterdir(), *(self.place / "tmp").iterdir()):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def strangers(self, whole: Whole) -> list[str]:
        """Returns names beside the outputs that have no business there."""
        known = {*whole.outputs, *KEPT.get(self.name, ())}
        return sorted({p.name for p in self.out.iterdir()} - known)


def inject(command: Command, kills: int, sources: Callable[[], Any]) -> Left:
    """Kills a command so many times; returns what was left."""
    command.park()
    whole, before, left, number = command.measure(), sources(), Left(), 0
    while left.kills < kills and number < 5 * kills:
        number += 1
        command.clear()
        old: dict[str, str] = {}
        if number % 2 == 0:
            shutil.copytree(command.place / "first", command.out, dirs_exist_ok=True)
            old = digests(command.out)
        nodes = numbers(command.out)
        if not command.kill(number % 5 == 1):
            continue
        left.kills += 1
        what, wrong = judged(command.out, whole, old)
        if what == "old" and numbers(command.out) != nodes:
            what = "new"  # a run that ends in the same bytes has put others in their place
        strangers = command.strangers(whole)
        scratch = list((command.place / "tmp").iterdir())
        left.siblings += bool(strangers)
        left.scratch += bool(scratch)
        if wrong:
            left.defects.append(f"{command.name}, kill {left.kills}: {wrong}")
        if sources() != before:
            left.defects.append(f"{command.name}, kill {left.kills}: the source has changed")
        if strangers or what == "set aside":
            command.write()
            if wrong := whole.new(command.out):
                left.defects.append(f"{command.name}, the run after kill {left.kills}: {wrong}")
            if after := command.strangers(whole):
                left.defects.append(f"{command.name}: {', '.join(after)} stayed")
            if after := list((command.place / "tmp").iterdir()):
                left.defects.append(f"{command.name}: {after[0].name} stayed in the scratch folder")
        left.outcome[what] += 1
    command.parked.close()
    return left


# --- the server ----------------------------------------------------------------------------------


def prepare(work: Path) -> None:
    """Makes the tiny models and the texts that commands are given."""
    from tests import models

    model = models.tiny("Llama")
    model.save_pretrained(work / "model")
    models.tokenizer().save_pretrained(work / "model")
    (work / "text.txt").write_text(TEXT)
    (work / "rounds.yaml").write_text(SCHEDULE)
    first = ("prune", str(work / "model"), "-o", str(work / "pruned"), "--ratio", "0.1")
    finish(start(first, work), work)


def warm(command: Command) -> None:
    """Runs a command once, so that forks find imported and traced what it needs."""
    if command.name in THREADED:
        command.run()
        for name in json.loads((command.place / "modules.json").read_text()):
            if name not in sys.modules and not name.startswith(("transformers_modules", "__")):
                with contextlib.suppress(ImportError, AttributeError):
                    importlib.import_module(name)
        return
    from tests.command import surgeon

    with contextlib.chdir(command.place):
        found = surgeon(*command.arguments)
    if found.code:
        raise RuntimeError(found.err)


@contextlib.contextmanager
def working() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        work = Path(name).resolve()
        (work / "tmp").mkdir()
        yield work


COLUMNS = ("old", "new", "nothing", "set aside", "one of two")
HEAD = (
    "| command | kills | old result | new result | nothing | old one set aside |"
    " one file of two | anything else | temporary names | scratch |\n|---|" + "---:|" * 9
)


def row(name: str, left: Left) -> str:
    """Returns what was left as a row of Markdown."""
    cells = [str(left.outcome[c]) for c in COLUMNS]
    cells += [str(len(left.defects)), str(left.siblings), str(left.scratch)]
    return f"| {name} | {left.kills} | {' | '.join(cells)} |"


def together(found: Iterable[Left]) -> Left:
    total = Left()
    for left in found:
        total.kills += left.kills
        total.outcome += left.outcome
        total.siblings += left.siblings
        total.scratch += left.scratch
        total.defects += left.defects
    return total


def faults(names: tuple[str, ...], kills: int, seed: int) -> Iterator[tuple[str, Left]]:
    """Yields by command what so many kills, shared out among them, left behind."""
    import torch

    from surgeon.opening import open_model
    from tests import remembered

    torch.set_num_threads(1)  # what is forked must have no threads
    draw = random.Random(seed)
    with working() as work, remembered.captures():
        prepare(work)
        for model in MODELS:
            open_model(str(work / model))  # traced once, for all of them
        for index, name in enumerate(names):
            command = Command(name, work, draw)
            warm(command)
            gc.collect()
            gc.freeze()  # so that forks needn't copy what they only count
            share = kills // len(names) + (index < kills % len(names))
            yield name, inject(command, share, lambda: [digests(work / m) for m in MODELS])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", default=",".join(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    names = tuple(arguments.only.split(","))
    if unknown := set(names) - COMMANDS.keys():
        parser.error(f"no command {', '.join(sorted(unknown))}; there are {', '.join(COMMANDS)}")
    found: dict[str, Left] = {}
    print(HEAD, flush=True)
    for name, left in faults(names, arguments.kills, arguments.seed):
        found[name] = left
        print(row(name, left), *left.defects, sep="\n", flush=True)
    total = together(found.values())
    print(row("all", total))
    return int(bool(total.defects))


if __name__ == "__main__":
    sys.exit(main())
