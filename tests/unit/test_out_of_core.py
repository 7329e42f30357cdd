"""Checkpoints larger than memory: read in blocks of rows, sliced and written as they come."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from surgeon.ahead import ahead
from surgeon.axes.plan import Plan, Selection, cut
from surgeon.capture.blocks import GAP, Buffers, spans
from surgeon.capture.weights import SafetensorsWeights, same_bits
from surgeon.emit import hf_writing
from surgeon.emit.pieces import BEHIND, Room, full_shape, pieces
from surgeon.errors import Code, SurgeonError
from surgeon.memory import LEAST, Memory, resident
from surgeon.opening import Model, open_model
from surgeon.pipeline import prune
from surgeon.planning import Passes, planned
from surgeon.plugin import Budget
from surgeon.pruned import Pruned
from tests.models import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 checkpoint in several shards."""
    path = tmp_path_factory.mktemp("source") / "model"
    build("Llama").to(torch.bfloat16).save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture(scope="module")
def origin(folder: Path) -> Model:
    return open_model(folder)


@pytest.fixture(scope="module")
def pruned(origin: Model) -> Pruned:
    return prune(origin, roles={"ffn": 0.3, "kv_heads": 1 / 3, "hidden": 0.25}, verify=False)


# --- reading -------------------------------------------------------------------------------------


def test_rows_are_read_in_blocks_of_the_size_allowed() -> None:
    assert spans(10, 100, 350) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert spans(3, 100, 50) == [(0, 1), (1, 2), (2, 3)]
    assert spans(0, 100, 50) == []


def test_a_long_run_of_unwanted_rows_is_left_out_and_a_short_one_is_read_through() -> None:
    row = GAP // 4
    kept = np.array([0, 1, 3, 40, 41])
    assert spans(50, row, 100 * row, kept) == [(0, 4), (40, 42)]


def test_buffers_are_used_again() -> None:
    buffers = Buffers(2, 8)
    first, second = buffers.take(8), buffers.take(4)
    assert first.data_ptr() != second.data_ptr()
    assert buffers.take(6).data_ptr() == first.data_ptr()


def test_a_file_gives_the_rows_asked_for(folder: Path) -> None:
    weights = SafetensorsWeights(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    (start, rows), (last, end) = weights.blocks(name, [(2, 5), (40, 41)], Buffers(2, 10))
    assert (start, last) == (2, 40)
    assert torch.equal(rows, weights[name][2:5])
    assert torch.equal(end, weights[name][40:41])


# --- working ahead -------------------------------------------------------------------------------


def test_what_is_made_ahead_comes_in_order() -> None:
    assert list(ahead(iter(range(100)))) == list(range(100))


def test_an_error_of_the_thread_is_raised_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)


def test_the_thread_ends_when_nobody_waits_for_it() -> None:
    before = threading.active_count()
    found = ahead(iter(range(1000)))
    next(found)
    found.close()
    assert threading.active_count() == before


# --- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, "max"])
def test_scores_of_blocks_are_scores_of_whole_tensors(origin: Model, p: Any) -> None:
    from passes.score.magnitude import Magnitude
    from surgeon.plugin import Context

    names = tuple([a.name for a in origin.axes.axes] + [b.name for b in origin.axes.branches])
    want = Magnitude(p).score(Context(origin.axes, origin.read, names))
    small = Context(
        origin.axes,
        origin.read,
        names,
        reader=lambda params: origin.stream(params, 500, {}),
    )
    found = Magnitude(p).score(small)
    assert want.keys() == found.keys()
    for name in want:
        np.testing.assert_allclose(found[name], want[name], rtol=0 if p == "max" else 1e-12)


def test_the_driver_hands_out_blocks_and_never_a_whole_tensor(
    origin: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def whole(*_: Any) -> Any:
        pytest.fail("a tensor was read as a whole")

    monkeypatch.setattr(SafetensorsWeights, "_read", whole)
    passes = Passes.of([_Step("score", "magnitude"), _Step("select", "uniform")])
    budget = Budget(
        roles={"ffn": 0.25},
        axes=frozenset(a.name for a in origin.axes.axes),
    )
    assert planned(origin, passes, budget).plan.cuts


class _Step:
    def __init__(self, kind: str, name: str) -> None:
        self.kind, self.name, self.options = kind, name, dict[str, Any]()


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [100, 2**20])
def test_a_checkpoint_written_in_blocks_is_the_one_written_tensor_by_tensor(
    pruned: Pruned, tmp_path: Path, dtype: torch.dtype, block: int
) -> None:
    own = pruned.emission
    assert own.scales, "averages over kept channels are folded into some parameters"
    hf_writing.write(
        tmp_path,
        own,
        pruned.selection,
        pruned.full,
        lambda _: dtype,
        read=pruned.blocks,
        block=block,
    )
    stored = SafetensorsWeights(tmp_path)
    for old, new in own.names.items():
        want = hf_writing.final(own, pruned.selection, pruned.full, old, dtype)
        assert stored.dtype(new) == dtype
        assert torch.equal(stored[new], want), new


def test_a_piece_is_good_while_whoever_writes_is_behind(pruned: Pruned) -> None:
    """Rows that go lie between those that stay; each is a block that is read for nothing."""
    name, size = "model.layers.0.mlp.up_proj.weight", 100
    (kept, _), shape = pruned.selection.kept(name), full_shape(pruned.selection, name)
    assert kept is not None and (np.diff(kept) > 2).any()
    made = pieces(pruned.selection, (), pruned.blocks, name, torch.bfloat16, shape, Room(size))
    held = deque[tuple[torch.Tensor, torch.Tensor]](maxlen=BEHIND)
    for piece in (piece for piece in made if piece.numel()):
        held.append((piece, piece.clone()))
        assert all(torch.equal(now, then) for now, then in held)


def test_rewritten_tensors_are_written_in_blocks_too(origin: Model, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    changed = origin.read(name) * 1.7
    axis = next(a for a in origin.axes.of_role("ffn") if a.name.startswith("model.layers.1"))
    again = prune(
        origin,
        plan=Plan((cut(axis, range(0, 80, 2)),), rewrites=(name,)),
        rewrites={name: changed},
        verify=False,
    )
    again.save(tmp_path / "out", verify=False)
    stored = SafetensorsWeights(tmp_path / "out")
    assert torch.equal(stored[name], changed[:, ::2].to(torch.bfloat16))


def test_indices_chosen_anew_in_every_group_are_sliced_as_a_whole_tensor(
    origin: Model, tmp_path: Path
) -> None:
    axis = origin.axes.of_role("q_per_kv")[0]
    (outer,) = axis.outer
    kept = [[0], [1], [0]]
    again = prune(origin, plan=Plan((cut(axis, kept, (outer,)),)), verify=False)
    for name in again.emission.names:
        assert Selection(origin.axes, again.plan).separable(name)
    again.save(tmp_path / "out", verify=False)
    query = "model.layers.0.self_attn.q_proj.weight"
    whole = origin.read(query).reshape(3, 2, 8, -1)
    want = torch.stack([whole[0, 0], whole[1, 1], whole[2, 0]]).reshape(24, -1)
    assert torch.equal(SafetensorsWeights(tmp_path / "out")[query].float(), want)


@pytest.mark.parametrize("narrow", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_in_eight_bit_floats_stay_what_they_are(
    folder: Path, tmp_path: Path, narrow: torch.dtype
) -> None:
    weights = SafetensorsWeights(folder)
    tensors = {n: weights[n].to(narrow if "proj" in n else torch.bfloat16) for n in weights}
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_bytes((folder / "config.json").read_bytes())
    found = prune(source, roles={"ffn": 0.25}, verify=False)
    report = found.save(out)
    assert report.verification is not None and report.target["dtype"] == "bfloat16"
    name = "model.layers.0.mlp.up_proj.weight"
    kept = found.plan.by_axis["model.layers.0.mlp/ffn"].array
    stored = SafetensorsWeights(out)
    assert stored.dtype(name) == narrow
    assert same_bits(stored[name], tensors[name].view(torch.uint8)[kept].view(narrow))
    largest = tensors[name].float().abs().amax(1)
    for other in ("gate", "down"):
        side = tensors[name.replace("up", other)].float().abs()
        largest = largest.maximum(side.amax(1 if other == "gate" else 0))
    gone = np.setdiff1d(np.arange(80), kept)
    assert largest[gone].max() <= largest[torch.from_numpy(kept)].min()


# --- how much memory -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1.5 gib", 3 * 2**29), ("300000000", 3 * 10**8), ("512M", 512 * 10**6)],
)
def test_sizes_are_written_as_people_write_them(text: str, size: int) -> None:
    assert Memory.of(text) == Memory(size, asked=True)


@pytest.mark.parametrize("text", ["", "much", "2 XB", "-1GB", "0"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SurgeonError, match="no amount of memory") as caught:
        Memory.of(text)
    assert caught.value.code is Code.BAD_OPTION


def test_too_little_is_refused_with_the_number_that_is_needed(origin: Model) -> None:
    with pytest.raises(SurgeonError, match="memory is too small") as caught:
        prune(origin, roles={"ffn": 0.25}, memory="10MB")
    need = caught.value.data["need_bytes"]
    assert need > LEAST + 10**8
    given = caught.value.try_.removeprefix("--memory ")
    assert 0 <= Memory.of(given).limit - need <= 10**7


def test_what_needs_a_text_says_what_it_needs(
    origin: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgeon.asking.START", 0)
    with pytest.raises(SurgeonError, match="looks at what the model computes") as caught:
        prune(origin, ratio=0.2, recipe="width", memory=resident() + 2**20)
    assert caught.value.data["need_bytes"] > resident() + 64 * 512 * 48 * 4


def test_a_limit_that_nobody_named_refuses_nothing() -> None:
    Memory(1).check(2**50, "everything is held")


def test_the_index_of_many_shards_is_read_back(pruned: Pruned, tmp_path: Path) -> None:
    from surgeon.emit.safetensors_file import TensorSpec, write_safetensors

    def blocks() -> Iterator[torch.Tensor]:
        yield torch.zeros(3, 2)
        yield torch.ones(2, 2)

    spec = TensorSpec("x", "f32", (5, 2), lambda: torch.empty(0), blocks)
    write_safetensors(
        tmp_path, [spec, TensorSpec("y", "f32", (2,), lambda: torch.ones(2))], max_shard_bytes=16
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert SafetensorsWeights(tmp_path)["x"].sum() == 4


def test_blocks_that_are_not_what_was_announced_are_refused(tmp_path: Path) -> None:
    from surgeon.emit.safetensors_file import TensorSpec, write_safetensors

    spec = TensorSpec("x", "f32", (5, 2), lambda: torch.empty(0), lambda: iter([torch.zeros(4, 2)]))
    with pytest.raises(SurgeonError, match="4 rows") as caught:
        write_safetensors(tmp_path, [spec])
    assert caught.value.code is Code.PLAN_MISMATCH
