"""Small decoders with a cache, made by hand as ONNX graphs, and the same in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, KV, WIDTH = 2, 1, 16
HIDDEN = HEADS * WIDTH
LONGEST = 48


@dataclass(frozen=True)
class Tiny:
    """A decoder: an embedding, attention layers with a residual, a head.

    Each layer is `gqa` (past and present may be one buffer, padding on the right) or `concat`
    (present is past and new, padding anywhere).
    """

    layers: tuple[str, ...] = ("gqa", "gqa")
    vocab: int = 101
    seed: int = 0

    def weights(self) -> dict[str, np.ndarray]:
        draw = np.random.default_rng(self.seed)

        def normal(*shape: int) -> np.ndarray:
            return (draw.normal(size=shape) * shape[0] ** -0.5).astype(np.float32)

        out = {
            "table": normal(self.vocab, HIDDEN) * self.vocab**0.5,
            "head": normal(HIDDEN, self.vocab),
        }
        out["head"] *= 3
        for n in range(len(self.layers)):
            out |= {
                f"q{n}": normal(HIDDEN, HIDDEN),
                f"k{n}": normal(HIDDEN, KV * WIDTH),
                f"v{n}": normal(HIDDEN, KV * WIDTH),
                f"o{n}": normal(HIDDEN, HIDDEN),
            }
        return out

    def logits(self, row: Sequence[int]) -> np.ndarray:
        """The reference: one row, no cache, no padding; [tokens, vocab]."""
        w, n = self.weights(), len(row)
        cos, sin = (np.tile(t[:n], 2)[:, None] for t in rotary())
        x = w["table"][list(row)]

        def turn(t: np.ndarray) -> np.ndarray:
            half = WIDTH // 2
            return t * cos + np.concatenate([-t[..., half:], t[..., :half]], axis=-1) * sin

        for layer in range(len(self.layers)):
            q = turn((x @ w[f"q{layer}"]).reshape(n, HEADS, WIDTH))
            k = turn((x @ w[f"k{layer}"]).reshape(n, KV, WIDTH)).repeat(HEADS // KV, axis=1)
            v = (x @ w[f"v{layer}"]).reshape(n, KV, WIDTH).repeat(HEADS // KV, axis=1)
            scores = np.einsum("ihd,jhd->hij", q, k) * WIDTH**-0.5
            scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            x = x + np.einsum("hij,jhd->ihd", p, v).reshape(n, HIDDEN) @ w[f"o{layer}"]
        return x @ w["head"]

    def greedy(self, row: Sequence[int], count: int) -> list[int]:
        text = list(row)
        for _ in range(count):
            text.append(int(self.logits(text)[-1].argmax()))
        return text[len(row) :]


def rotary() -> tuple[np.ndarray, np.ndarray]:
    angles = np.outer(np.arange(LONGEST), 10000.0 ** (-np.arange(WIDTH // 2) / (WIDTH // 2)))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


FLOATS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def write(
    path: Path,
    tiny: Tiny,
    *,
    dtype: str = "fp32",
    metadata: dict[str, str] | None = None,
    position_ids: bool = False,
    open_sizes: bool = False,
    external: bool = False,
) -> Path:
    """Writes the graph.

    Args:
        metadata: in place of what Surgeon would say of it; `{}` for a graph from elsewhere.
        position_ids: give it this input, as some graphs from elsewhere have it.
        open_sizes: leave head size and vocabulary open.
        external: keep the weights in a file of their own.
    """
    kind, nodes = FLOATS[dtype], []

    def node(op: str, inputs: list[str], *outputs: str, **more: Any) -> str:
        nodes.append(helper.make_node(op, inputs, list(outputs), **more))
        return outputs[0]

    weights: dict[str, np.ndarray] = dict(tiny.weights())
    weights["cos"], weights["sin"] = rotary()
    initializers = [
        helper.make_tensor(n, kind, w.shape, w.astype(np.float32).flatten().tolist())
        if dtype == "bf16"
        else numpy_helper.from_array(w.astype(helper.tensor_dtype_to_np_dtype(kind)), n)
        for n, w in weights.items()
    ]
    for name, value in {
        "one": [1],
        "minus": [-1],
        "zero": [0],
        "inner": [1, 2],
        "last": [-1],
    }.items():
        initializers.append(numpy_helper.from_array(np.array(value, np.int64), name))
    for name, value in {"s0": 0, "s1": 1}.items():
        initializers.append(numpy_helper.from_array(np.array(value, np.int64), name))
    # What GroupQueryAttention wants to know.
    node("ReduceSum", ["attention_mask", "one"], "sum", keepdims=0)
    node("Sub", ["sum", "one"], "less")
    node("Cast", ["less"], "seqlens_k", to=TensorProto.INT32)
    node("Shape", ["attention_mask"], "whole", start=1)
    node("Squeeze", ["whole"], "total64")
    node("Cast", ["total64"], "total", to=TensorProto.INT32)
    # What plain attention wants to know: positions, and who may see whom.
    node("Shape", ["input_ids"], "fresh", start=1)
    node("Squeeze", ["fresh"], "new64")
    if position_ids:
        node("Identity", ["position_ids"], "places")
    else:
        node("CumSum", ["attention_mask", "s1"], "counted")
        node("Sub", ["counted", "one"], "counted0")
        node("Max", ["counted0", "zero"], "allplaces")
        node("Neg", ["fresh"], "minusnew")
        node("Slice", ["allplaces", "minusnew", "whole", "one"], "places")
    node("Range", ["s0", "total64", "s1"], "columns")
    node("Sub", ["total64", "new64"], "past64")
    node("Range", ["past64", "total64", "s1"], "own")
    node("Unsqueeze", ["own", "minus"], "own1")
    node("LessOrEqual", ["columns", "own1"], "causal")
    node("Equal", ["columns", "own1"], "itself")
    node("Cast", ["attention_mask"], "real", to=TensorProto.BOOL)
    node("Unsqueeze", ["real", "inner"], "real4")
    node("And", ["causal", "real4"], "seen")
    node("Or", ["seen", "itself"], "visible")
    x = node("Gather", ["table", "input_ids"], "x")
    for n, layer in enumerate(tiny.layers):
        past = [f"past_key_values.{n}.key", f"past_key_values.{n}.value"]
        present = [f"present.{n}.key", f"present.{n}.value"]
        for name in "qkv":
            node("MatMul", [x, f"{name}{n}"], f"{name}{n}_")
        if layer == "gqa":
            node(
                "GroupQueryAttention",
                [f"q{n}_", f"k{n}_", f"v{n}_", *past, "seqlens_k", "total", "cos", "sin"],
                f"a{n}",
                *present,
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV,
                do_rotary=1,
            )
        else:
            for name, heads in (("q", HEADS), ("k", KV)):
                given = [f"{name}{n}_", "cos", "sin", "places"]
                node("RotaryEmbedding", given, f"{name}{n}r", num_heads=heads)
            node(
                "Attention",
                [f"q{n}r", f"k{n}r", f"v{n}_", "visible", *past],
                f"a{n}",
                *present,
                q_num_heads=HEADS,
                kv_num_heads=KV,
            )
        node("MatMul", [f"a{n}", f"o{n}"], f"a{n}o")
        x = node("Add", [x, f"a{n}o"], f"x{n}")
    node("MatMul", [x, "head"], "logits")
    info = helper.make_tensor_value_info
    ids = ["input_ids", "attention_mask", *(["position_ids"] if position_ids else [])]
    inputs = [
        info(n, TensorProto.INT64, ["batch_size", f"{'total_' * (n == ids[1])}sequence_length"])
        for n in ids
    ]
    outputs = [
        info("logits", kind, ["batch_size", "sequence_length", "v" if open_sizes else tiny.vocab])
    ]
    width: Any = "width" if open_sizes else WIDTH
    for n in range(len(tiny.layers)):
        for part in ("key", "value"):
            shape: list[Any] = ["batch_size", KV, "past_sequence_length", width]
            inputs.append(info(f"past_key_values.{n}.{part}", kind, shape))
            shape = ["batch_size", KV, "total_sequence_length", width]
            outputs.append(info(f"present.{n}.{part}", kind, shape))
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, told(tiny, dtype) if metadata is None else metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = f"{path.name}.data"
    onnx.save(model, path, save_as_external_data=external, location=data, size_threshold=200)
    return path


def told(tiny: Tiny, dtype: str = "fp32") -> dict[str, str]:
    """What Surgeon says of such a graph in its metadata."""
    shared = [n for n, layer in enumerate(tiny.layers) if layer == "gqa"]
    return {
        "surgeon.style": "ort" if shared else "standard",
        "surgeon.dtype": dtype,
        "surgeon.positions": str(LONGEST),
        "surgeon.padding": "right" if shared else "any",
        "surgeon.shared_cache": ",".join(map(str, shared)),
        "surgeon.cache": ",".join(map(str, range(len(tiny.layers)))),
    }


def load_to_bench(name: str, *, folder: str) -> Any:
    """Loads a model in the process of a comparison's worker, or fails as it is called."""
    from surgeon.errors import Code, SurgeonError
    from surgeon.runtime import Decoder

    print("this must not get between the answers")
    if name == "refused":
        raise SurgeonError(Code.BAD_TEXT_INPUT, "what", at="at", why="why", try_="try")
    if name == "dies":
        raise SystemExit(3)
    return Decoder(folder, device="cpu", threads=1)
