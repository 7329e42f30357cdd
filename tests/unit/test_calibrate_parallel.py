"""Two processes that share the windows come to what one comes to."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgeon.calibrate.data import Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.calibrate.parallel import World, join, rank
from surgeon.ir import to_text
from surgeon.opening import open_model
from surgeon.pipeline import prune
from tests import models
from tests.command import ROOT

pytestmark = pytest.mark.slow

GATHER = '''
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from surgeon.axes.plan import Plan, cut
from surgeon.axes.settle import analyse
from surgeon.calibrate.data import Windows
from surgeon.calibrate.gathered import Gathered
from surgeon.calibrate.parallel import World, by_first, join, rank
from surgeon.errors import Code, SurgeonError
from surgeon.ir import parse
from surgeon.report.agreement import Differences
from surgeon.report.evaluate import Windows as Texts, score

DOWN = "model.layers.{}.mlp.down_proj.weight"


def numbers(axes, get, ids):
    """Every statistic, by a name of its own."""
    names = [DOWN.format(i) for i in range(2)]
    plan = Plan((cut(axes.get("model.layers.0.mlp/ffn"), range(40)),))
    data = Gathered(axes, get, Windows(ids.numpy()))
    found = {}
    def solve(name, pair):
        found[f"{name} cross"], found[f"{name} pruned"] = pair.cross, pair.pruned
        found[f"{name} count"] = torch.tensor(pair.count)
        return get(name) + 1e-3 * (pair.cross - pair.pruned).float()[: len(get(name))]
    folds = (2, 3) if len(ids) > 2 else (1, 1)
    data.expect(["activations: distillation"])
    for name, tensor in data.sequential(plan, names, solve, folds=folds[0]).items():
        found[f"{name} solved"] = tensor
    for name in names:
        moments, gradients = data.moments(names)[name], data.gradients(names)[name]
        fisher = data.fisher(names)[name]
        found[f"{name} mean"], found[f"{name} second"] = moments.mean, moments.second
        found[f"{name} slope"], found[f"{name} square"] = gradients.mean, gradients.square
        found[f"{name} fisher"] = fisher.second
        counts = [moments.count, gradients.count, fisher.count]
        found[f"{name} counts"] = torch.tensor(counts)
    found["similarity"] = torch.tensor(list(data.similarity(["model.layers.0"]).values()))
    found["loss"] = torch.tensor(data.loss(plan))
    moved = data.divergences([(plan, lambda name: None), (Plan(), lambda name: None)])
    found["divergences"] = torch.tensor([[d.mean, d.deviation] for d in moved])
    gains, curve = data.distilled(plan, rate=1e-2, epochs=3, windows=2, folds=folds[1])
    found["gains"] = torch.cat([gains[name].flatten() for name in sorted(gains)])
    found["gains, steps"] = torch.tensor(curve)
    found |= scores(ids, join())
    return {name: tensor.clone().contiguous() for name, tensor in found.items()}


def scores(ids, world):
    """Perplexity of one model, and how far it is from another: exact, whoever computes them."""
    draw = torch.Generator().manual_seed(0)
    one, other = (torch.randn(100, 100, generator=draw) for _ in range(2))
    texts, apart = Texts("text", ids.numpy()), Differences()
    def add(window, logits):
        apart.add(other[ids[window, :-1]], logits, window)
    found = score(lambda ids: one[torch.as_tensor(ids)], texts, on_window=add, world=world)
    agreed = apart.result(world, len(ids))
    values = [found.perplexity, found.tokens, agreed.top1, agreed.kl, agreed.tokens]
    return {"exact": torch.tensor(values, dtype=torch.float64)}


def saves(folder):
    """What a process hears of two writings, of which the second is refused."""
    def write():
        with (folder / "writers.txt").open("a") as file:
            file.write(f"{rank()}\\n")
        return f"written by {rank()}"
    def refuse():
        raise SurgeonError(Code.DISK_FULL, "what", at="at", why="why", try_="try")
    def fault(ids):
        what = f"fault of {rank()}"
        raise SurgeonError(Code.RUNTIME_FAILED, what, at="at", why="why", try_="try")
    heard = [by_first("a", write)]
    texts = Texts("text", torch.zeros(1, 3, dtype=torch.int64).numpy())  # the first one's alone
    for failing in (lambda: by_first("a", refuse), lambda: score(fault, texts, world=join())):
        try:
            failing()
        except SurgeonError as error:
            heard.append(str(error))
    (folder / f"heard-{rank()}.txt").write_text("; ".join(heard))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    axes = analyse(parse((folder / "program.txt").read_text()))
    get = load_file(folder / "weights.safetensors").__getitem__
    ids = load_file(folder / "ids.safetensors")["ids"]
    for windows in (5, 1):
        out = folder / f"found-{windows}-{rank()}.safetensors"
        save_file(numbers(axes, get, ids[:windows]), out)
    saves(folder)
'''


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Of five windows one takes three; of one window the second takes none."""
    origin = open_model(models.tiny("Llama"))
    ids = models.tokens(100, 5, 9)
    script = tmp_path / "gather.py"
    script.write_text(GATHER)
    (tmp_path / "program.txt").write_text(to_text(origin.program))
    weights = {p.name: origin.read(p.name).clone() for p in origin.program.params}
    save_file(weights, tmp_path / "weights.safetensors")
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert ran.returncode == 0, ran.stderr
    scope: dict[str, Any] = {"__name__": "gather"}
    exec(compile(GATHER, "gather.py", "exec"), scope)
    for windows in (5, 1):
        alone = scope["numbers"](origin.axes, origin.read, ids[:windows])
        for number in (0, 1):
            found = load_file(tmp_path / f"found-{windows}-{number}.safetensors")
            assert found.keys() == alone.keys()
            for name, tensor in found.items():
                if "count" in name or name == "exact":
                    assert torch.equal(tensor, alone[name])
                    continue
                size = float(alone[name].abs().max())
                torch.testing.assert_close(tensor, alone[name], rtol=1e-4, atol=1e-5 * size)

    assert (tmp_path / "writers.txt").read_text().split() == ["0"]
    refused = "[disk-full] what\n  at  at\n  why why\n  try try"
    fault = refused.replace("disk-full", "runtime-failed").replace("] what", "] fault of 0")
    for number in (0, 1):
        heard = (tmp_path / f"heard-{number}.txt").read_text()
        assert heard == f"written by 0; {refused}; {fault}"


def test_all_but_the_first_process_hear_of_what_it_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = prune(models.tiny("Llama"), ratio=0.2, verify=False)
    told = replace(pruned.report, notes=("from the first",)).to_json()
    monkeypatch.setattr("surgeon.calibrate.parallel.launched", lambda: True)
    monkeypatch.setattr("surgeon.calibrate.parallel.by_first", lambda what, write: told)
    report = pruned.save(tmp_path / "o")
    assert report.notes == ("from the first",) and report.to_json() == told
    assert list(tmp_path.iterdir()) == []


def test_one_alone_shares_nothing_and_waits_for_nobody() -> None:
    assert join("cpu", {}) == World()
    launched = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert join("cpu", launched) == World() and rank(launched) == 0
    assert rank({**launched, "RANK": "3"}) == 3
    assert rank({"RANK": "3"}) == 0  # some other scheduler's variable
    windows = torch.arange(10).reshape(5, 2)
    assert torch.equal(World().share(windows), windows)
    shares = [World(i, 2).share(windows) for i in range(2)]
    assert [len(s) for s in shares] == [3, 2]
    assert sorted(torch.cat(shares)[:, 0].tolist()) == windows[:, 0].tolist()


def test_what_one_process_takes_is_all_of_it() -> None:
    origin = open_model(models.tiny("Llama"))
    ids = models.tokens(100, 5, 9)
    data = Gathered(origin.axes, origin.read, Windows(ids.numpy()))
    assert torch.equal(data.ids, ids)
