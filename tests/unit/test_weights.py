from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgeon.capture.buffers import computed_buffers
from surgeon.capture.gguf_file import GGUFHeader
from surgeon.capture.layered import OverlayWeights, RewrittenWeights
from surgeon.capture.model import all_params
from surgeon.capture.weights import SafetensorsWeights, StateDictWeights
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Param, TensorType
from tests import models
from tests.gguf_files import gguf_weights, write_llama


def checkpoint(folder: Path, model: Any, shard: str = "5GB") -> Path:
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def refused(code: Code, match: str) -> Any:
    class Refused:
        def __enter__(self) -> Refused:
            self.raises = pytest.raises(SurgeonError, match=match)
            self.info = self.raises.__enter__()
            return self

        def __exit__(self, *args: Any) -> bool | None:
            out = self.raises.__exit__(*args)
            assert self.info.value.code is code
            return out

    return Refused()


# --- safetensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "30KB"], ids=["single", "shards"])
def test_a_checkpoint_gives_the_models_tensors(tmp_path: Path, tiny: Any, shard: str) -> None:
    model = tiny("Llama")
    weights = SafetensorsWeights(checkpoint(tmp_path, model, shard))
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "30KB")
    state = model.state_dict()
    assert set(weights.names()) == set(state)
    for name, tensor in state.items():
        assert torch.equal(weights[name], tensor)
        assert weights.shape(name) == tuple(tensor.shape)
        assert weights.dtype(name) == tensor.dtype
        assert weights.nbytes(name) == tensor.numel() * tensor.element_size()
        if tensor.ndim:
            assert torch.equal(weights.rows(name, 2, 5), tensor[2:5])
    weights.check(all_params(model).values())


def test_metadata_and_fingerprint_read_no_values(
    tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = SafetensorsWeights(checkpoint(tmp_path, tiny("Llama")))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("values were read")

    monkeypatch.setattr("surgeon.capture.weights._values", refuse)
    weights.check(all_params(tiny("Llama")).values())
    weights.fingerprint()
    with pytest.raises(AssertionError, match="values were read"):
        weights["model.norm.weight"]


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn],
)
def test_the_stored_type_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.ones(3, 2).to(dtype)
    save_file({"w": tensor}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    assert weights.dtype("w") == dtype and weights["w"].dtype == dtype
    assert weights.nbytes("w") == 6 * dtype.itemsize


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_tensor_answers_to_both_names(tmp_path: Path, stored: str) -> None:
    save_file({stored: torch.arange(6.0).reshape(3, 2)}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path, {"lm_head.weight": "model.embed_tokens.weight"})
    assert weights.names() == (stored,)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        assert name in weights
        assert weights.shape(name) == (3, 2)
        assert torch.equal(weights[name], torch.arange(6.0).reshape(3, 2))
    assert "model.norm.weight" not in weights
    assert weights.get("model.norm.weight") is None


def test_tied_names_with_different_values_are_refused(tmp_path: Path) -> None:
    param = Param("a", TensorType("f32", (2,)), aliases=("b",))
    same = {"a": torch.ones(2), "b": torch.ones(2)}
    StateDictWeights(same, {"b": "a"}).check([param])
    with refused(Code.BAD_CHECKPOINT, "tied and stored with different values"):
        StateDictWeights({**same, "b": torch.zeros(2)}, {"b": "a"}).check([param])


def test_a_missing_shard_is_named(tmp_path: Path, tiny: Any) -> None:
    checkpoint(tmp_path, tiny("Llama"), "30KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with refused(Code.MISSING_FILE, shard.name) as caught:
        SafetensorsWeights(tmp_path)
    assert caught.info.value.data["files"] == [shard.name]


def test_a_shard_whose_name_no_file_can_have_is_missing(tmp_path: Path) -> None:
    index = {"weight_map": {"w": "a" * 300}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(Code.MISSING_FILE, "1 of 1 shards"):
        SafetensorsWeights(tmp_path)


def test_a_missing_index_is_named(tmp_path: Path, tiny: Any) -> None:
    checkpoint(tmp_path, tiny("Llama"), "30KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    with refused(Code.MISSING_FILE, "without an index"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize("lost", [1, 100, "into the header", "all but 5", "all"])
def test_a_truncated_file_says_expected_and_found_bytes(
    tmp_path: Path, tiny: Any, lost: int | str
) -> None:
    path = checkpoint(tmp_path, tiny("Llama")) / "model.safetensors"
    data = path.read_bytes()
    keep = {"into the header": 500, "all but 5": 5, "all": 0}.get(str(lost))
    keep = len(data) - int(lost) if keep is None else keep
    path.write_bytes(data[:keep])
    expected = len(data) if isinstance(lost, int) else 8
    if lost == "into the header":
        expected = 8 + int.from_bytes(data[:8], "little")
    with refused(Code.BAD_CHECKPOINT, rf"{expected} bytes expected, {keep} found"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (struct.pack("<Q", 4) + b"{[}]", "header"),
        (struct.pack("<Q", 2) + b"[]", "header"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "longer than its header says"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes, match: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with refused(Code.BAD_CHECKPOINT, match):
        SafetensorsWeights(tmp_path)


def test_a_header_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    with refused(Code.BAD_CHECKPOINT, "contradicts itself"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        ("{", "can't be read"),
        ("[]", "can't be read"),
        ('{"weight_map": 3}', "can't be read"),
        ('{"weight_map": {"w": "../other/model.safetensors"}}', "outside the folder"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "outside the folder"),
        ('{"weight_map": {"other": "a.safetensors"}}', "disagree"),
    ],
)
def test_a_bad_index_is_refused(tmp_path: Path, index: str, match: str) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with refused(Code.BAD_CHECKPOINT, match):
        SafetensorsWeights(tmp_path)


# --- checking against a model ----------------------------------------------------------------


def test_missing_and_misshapen_tensors_are_listed(tiny: Any) -> None:
    model = tiny("Llama")
    params = list(all_params(model).values())
    state = dict(model.state_dict())
    gone = state.pop("model.layers.1.mlp.up_proj.weight")
    with refused(Code.BAD_CHECKPOINT, r"1 tensors .* missing") as caught:
        StateDictWeights(state).check(params)
    assert caught.info.value.data["tensors"] == ["model.layers.1.mlp.up_proj.weight"]
    assert "layers.1.mlp.up_proj" in str(caught.info.value)
    state["model.layers.1.mlp.up_proj.weight"] = gone[:-1]
    wrong = rf"is \[{gone.shape[0] - 1}, \d+\] and should be \[{gone.shape[0]}, "
    with refused(Code.BAD_CHECKPOINT, wrong):
        StateDictWeights(state).check(params)
    state["model.layers.1.mlp.up_proj.weight"] = gone.to(torch.int8)
    with refused(Code.BAD_CHECKPOINT, "packed or quantised"):
        StateDictWeights(state).check(params)


def test_only_what_checkpoints_store_is_checked() -> None:
    size = TensorType("f32", (2,))
    weights = StateDictWeights({"w": torch.ones(2)})
    weights.check([Param("w", size), Param("freq", size, "computed"), Param("c", size, "constant")])
    with refused(Code.BAD_CHECKPOINT, "missing"):
        weights.check([Param("w", size), Param("mask", size, "buffer")])


def test_many_faults_are_counted() -> None:
    params = [Param(f"w{i}", TensorType("f32", (2,))) for i in range(9)]
    with refused(Code.BAD_CHECKPOINT, r"w0; w1; w2; w3, and 5 more"):
        StateDictWeights({}).check(params)


# --- fingerprints ----------------------------------------------------------------------------


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    def saved(folder: str, **tensors: torch.Tensor) -> tuple[str, str]:
        (tmp_path / folder).mkdir()
        apart = {name: t.clone() for name, t in tensors.items()}
        save_file(apart, tmp_path / folder / "model.safetensors")
        return SafetensorsWeights(tmp_path / folder).fingerprint(), StateDictWeights(
            tensors
        ).fingerprint()

    w = torch.arange(12.0).reshape(3, 4)
    first = saved("first", w=w, v=w)
    assert saved("again", v=w.clone(), w=w.clone()) == first
    changed = w.clone()
    changed[0, 0] += 1
    others = [
        saved("value", w=changed, v=w),
        saved("name", u=w, v=w),
        saved("shape", w=w.reshape(4, 3), v=w),
        saved("dtype", w=w.half(), v=w),
        saved("size", w=w, v=w, x=w),
    ]
    for at in range(2):
        assert len({found[at] for found in [first, *others]}) == 6


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_and_its_checkpoints_have_one_fingerprint(tmp_path: Path, tied: bool) -> None:
    model = models.tiny("Gemma", tie_word_embeddings=tied)
    ties = {alias: p.name for p in all_params(model).values() for alias in p.aliases}
    assert bool(ties) == tied
    found = [
        StateDictWeights(model.state_dict(), ties),
        SafetensorsWeights(checkpoint(tmp_path / "one", model), ties),
        SafetensorsWeights(checkpoint(tmp_path / "shards", model, "20KB"), ties),
    ]
    assert len({weights.fingerprint() for weights in found}) == 1


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(5000.0).reshape(5, 10, 100),
        torch.arange(5000.0).reshape(5, 1000).T,
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.ones(3, 2, dtype=torch.bool),
        torch.ones(300, dtype=torch.bfloat16),
    ],
)
def test_a_tensors_first_bytes_are_those_of_its_file(tensor: torch.Tensor) -> None:
    from surgeon.capture.weights import _first_bytes

    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert _first_bytes(tensor) == raw[:64]


# --- weights made of weights -----------------------------------------------------------------


def test_an_overlay_adds_and_replaces() -> None:
    base = StateDictWeights({"a": torch.ones(3), "b": torch.ones(4)}, {"c": "a"})
    over = OverlayWeights(base, {"b": torch.zeros(5), "freq": torch.arange(6.0)})
    assert over.names() == ("a", "b", "freq")
    assert over.shape("b") == (5,) and torch.equal(over["b"], torch.zeros(5))
    assert torch.equal(over["c"], torch.ones(3))
    assert torch.equal(over.rows("freq", 1, 3), torch.tensor([1.0, 2.0]))
    other = OverlayWeights(base, {"b": torch.zeros(5), "freq": torch.ones(6)})
    assert len({w.fingerprint() for w in (base, over, other)}) == 3


def test_a_rewrite_happens_when_a_tensor_is_read() -> None:
    seen: list[str] = []

    def half(name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return tensor[:2] if name == "a" else tensor

    base = StateDictWeights({"a": torch.arange(4.0), "b": torch.ones(4)}, {"tied": "a"})
    weights = RewrittenWeights(base, half, key="plan", shapes={"a": (2,)})
    assert weights.shape("a") == weights.shape("tied") == (2,) and not seen
    assert torch.equal(weights["tied"], torch.tensor([0.0, 1.0])) and seen == ["a"]
    assert torch.equal(weights.rows("b", 0, 1), torch.ones(1))
    other = RewrittenWeights(base, half, key="another plan", shapes={"a": (2,)})
    assert len({w.fingerprint() for w in (base, weights, other)}) == 3


def test_a_rewrite_other_than_announced_is_refused() -> None:
    base = StateDictWeights({"a": torch.ones(4)})
    with refused(Code.PLAN_MISMATCH, "not what was announced"):
        RewrittenWeights(base, lambda name, t: t[:2], key="plan")["a"]
    with refused(Code.PLAN_MISMATCH, "not what was announced"):
        RewrittenWeights(base, lambda name, t: t.half(), key="plan")["a"]


def test_weights_are_a_mapping_compared_by_identity() -> None:
    first, second = (StateDictWeights({"a": torch.ones(2)}) for _ in range(2))
    assert dict(first).keys() == {"a"} and len(first) == 1
    assert first == first and first != second and len({first, second}) == 2
    with refused(Code.BAD_CHECKPOINT, "no tensor b"):
        first["b"]


# --- GGUF ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_gives_the_original_tensors(tmp_path: Path, tied: bool) -> None:
    model = models.build("Llama", tie_word_embeddings=tied)
    path = write_llama(tmp_path / "tiny.gguf", model)
    with torch.device("meta"):
        meta = type(model)(model.config)
    weights = gguf_weights(path, meta)
    weights.check(all_params(model).values())
    assert ("lm_head.weight" in weights.names()) != tied
    for name, tensor in model.state_dict().items():
        assert weights.shape(name) == tuple(tensor.shape)
        assert torch.equal(weights[name], tensor), name


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    model = models.build("Llama")
    path = write_llama(tmp_path / "tiny.gguf", model, leave_out="blk.1.ffn_up.weight")
    with refused(Code.BAD_CHECKPOINT, r"no model\.layers\.1\.mlp\.up_proj\.weight"):
        gguf_weights(path, model)["model.norm.weight"]


@pytest.mark.parametrize("keep", [0, 3, 20, 300, -1])
def test_a_truncated_gguf_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_llama(tmp_path / "tiny.gguf", models.build("Llama"))
    data = path.read_bytes()
    last = max(t.start + t.nbytes for t in GGUFHeader(path).tensors)
    path.write_bytes(data[: last - 1 if keep < 0 else keep])
    found = last - 1 if keep < 0 else keep
    with refused(Code.BAD_CHECKPOINT, str(found)) as caught:
        GGUFHeader(path)
    if keep < 0:
        assert f"{last} bytes expected, {last - 1} found" in str(caught.info.value)


def test_a_gguf_fingerprint_sees_a_changed_value(tmp_path: Path) -> None:
    model = models.build("Llama")
    first = GGUFHeader(write_llama(tmp_path / "a.gguf", model)).fingerprint()
    assert GGUFHeader(write_llama(tmp_path / "b.gguf", model)).fingerprint() == first
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert GGUFHeader(write_llama(tmp_path / "c.gguf", model)).fingerprint() != first


# --- computed buffers ------------------------------------------------------------------------

ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 16,
    },
}
CASES = [(name, {}) for name in models.ARCHITECTURES] + [
    ("Llama", {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **values}})
    for kind, values in ROPES.items()
]


@pytest.mark.parametrize(
    ("name", "overrides"),
    CASES,
    ids=[o["rope_parameters"]["rope_type"] if o else n for n, o in CASES],
)
def test_computed_buffers_are_those_of_a_model_made_on_the_cpu(
    name: str, overrides: dict[str, Any]
) -> None:
    model = models.build(name, **overrides)
    stored = model.state_dict()
    expected = {n: b for n, b in model.named_buffers() if n not in stored}
    generator = torch.get_rng_state()
    found = computed_buffers(type(model), model.config)
    assert torch.equal(torch.get_rng_state(), generator)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].device.type == "cpu" and found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key
    if name not in ("GPT2", "OPT"):
        assert any("inv_freq" in key for key in found)


def test_the_parameters_of_a_large_model_are_not_allocated() -> None:
    """Two layers of a 70B model would take 20 GB; an allocation on the CPU is refused."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Small(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu":
                assert out.numel() < 1_000_000, func
            return out

    settings = models.config(
        "Llama",
        hidden_size=8192,
        intermediate_size=28672,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
    )
    import transformers

    with Small():
        found = computed_buffers(transformers.LlamaForCausalLM, settings)
    assert found["model.rotary_emb.inv_freq"].shape == (64,)


def test_a_buffer_that_its_class_leaves_unset_is_refused() -> None:
    import transformers

    class Forgetful(transformers.LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.register_buffer("table", torch.arange(3), persistent=False)

    with refused(Code.CAPTURE_FAILED, "what table should hold"):
        computed_buffers(Forgetful, models.config("Llama"))


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    tensor = torch.arange(30, dtype=torch.float16).reshape(5, 2, 3)
    save_file({"w": tensor, "none": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    weights = SafetensorsWeights(tmp_path)
    for start, stop in ((0, 5), (1, 3), (4, 9), (3, 3)):
        assert torch.equal(weights.rows("w", start, stop), tensor[start:stop])
    assert weights["none"].shape == (0, 4)


def test_a_file_that_shrinks_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64)}, path)
    weights = SafetensorsWeights(tmp_path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(SurgeonError) as caught:
        weights["w"]
    assert "truncated" in caught.value.what
