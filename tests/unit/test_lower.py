from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from surgeon.capture.model import capture_model
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program
from surgeon.runtime.lower import attend, attention, attention_bias, evaluate, lower

pytestmark = pytest.mark.slow


def spelled_out(q: Any, k: Any, v: Any, padding: Any, scale: float, **options: Any) -> torch.Tensor:
    """Attention one query at a time, in float64, over the keys it sees and no others."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, rows, _ = q.shape
    group, columns = heads // k.shape[1], k.shape[2]
    window, softcap, sinks = (options.get(n) for n in ("window", "softcap", "sinks"))
    out = torch.zeros(batch, heads, rows, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                at = i + columns - rows
                seen = [
                    j
                    for j in range(columns)
                    if (not options["causal"] or j <= at)
                    and (window is None or j > at - window)
                    and (padding is None or bool(padding[b, j]))
                ]
                if not seen:
                    continue
                scores = k[b, h // group, seen] @ q[b, h, i] * scale
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                if sinks is not None:
                    scores = torch.cat([scores, sinks[h : h + 1].double()])
                shares = torch.softmax(scores, 0)[: len(seen)]
                out[b, h, i] = shares @ v[b, h // group, seen]
    return out


CASES: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "every key": {"causal": False},
    "window": {"causal": True, "window": 3},
    "window, softcap": {"causal": True, "window": 2, "softcap": 1.5},
    "softcap": {"causal": True, "softcap": 0.7},
    "sinks": {"causal": True, "sinks": torch.tensor([0.3, -1.0, 2.0, 0.5])},
    "window of every key": {"causal": False, "window": 4},
}


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("rows", [6, 2], ids=["prompt", "with past"])
@pytest.mark.parametrize("case", CASES)
def test_attention_is_what_it_says(case: str, rows: int, padded: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, rows, 8, generator=draw)
    k = torch.randn(2, 2, 6, 8, generator=draw)
    v = torch.randn(2, 2, 6, 5, generator=draw)  # values of another width than keys
    padding = None
    if padded:
        padding = torch.ones(2, 6, dtype=torch.long)
        padding[0, :3] = 0
    found = attention(q, k, v, padding, scale=0.4, **CASES[case])
    wanted = spelled_out(q, k, v, padding, 0.4, **CASES[case])
    told = torch.ones(2, rows, dtype=torch.bool) if padding is None else padding[:, -rows:].bool()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(
        found.transpose(1, 2)[told].double(), wanted.transpose(1, 2)[told], rtol=0, atol=2e-6
    )


def test_a_query_that_sees_no_key_gives_numbers() -> None:
    q = torch.randn(1, 2, 3, 4)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    for options in ({}, {"softcap": 2.0}):
        out = attention(q, q, q, nothing, scale=0.5, causal=True, **options)
        assert torch.isfinite(out).all()


def left_padded(top: int) -> tuple[torch.Tensor, ...]:
    ids = torch.randint(0, top, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def captured(model: Any) -> tuple[Program, dict[str, torch.Tensor]]:
    found = capture_model(model)
    named = [*model.named_parameters(remove_duplicate=False)]
    named += [*model.named_buffers(remove_duplicate=False)]
    return found.program, {**{n: t.detach() for n, t in named}, **found.constants}


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2", "Phi3"])
def test_a_lowered_model_computes_what_the_model_does(name: str, tiny: Any) -> None:
    model = tiny(name)
    program, weights = captured(model)
    ids, mask, positions = left_padded(100)
    with torch.no_grad():
        wanted = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        found = lower(program, weights)(ids, mask, positions)
    valid = mask.bool()
    assert (found - wanted)[valid].abs().max() <= 1e-5 * wanted[valid].abs().max()


@pytest.mark.parametrize(("name", "kinds"), [("Llama", 1), ("Gemma2", 2)])
def test_layers_that_see_the_same_keys_share_their_mask(name: str, kinds: int, tiny: Any) -> None:
    program, weights = captured(tiny(name))
    nodes = [node.target for node in lower(program, weights).graph.nodes]
    assert nodes.count(attention_bias) == kinds
    assert nodes.count(attend) == 2


def test_a_tied_parameter_is_held_once(tiny: Any) -> None:
    program, weights = captured(tiny("Llama", tie_word_embeddings=True))
    held = lower(program, weights).state_dict()
    assert "model.embed_tokens.weight" in held
    assert "lm_head.weight" not in held
    assert held["model.embed_tokens.weight"].data_ptr() == weights["lm_head.weight"].data_ptr()


def test_operations_can_be_replaced_by_index(tiny: Any) -> None:
    program, weights = captured(tiny("Llama"))
    index = next(i for i, op in enumerate(program.ops) if op.target == "aten.silu.default")
    inputs = left_padded(100)
    with torch.no_grad():
        same = lower(program, weights, change={index: torch.nn.functional.silu})(*inputs)
        other = lower(program, weights, change={index: torch.zeros_like})(*inputs)
        wanted = lower(program, weights)(*inputs)
    assert torch.equal(same, wanted)
    assert (other - wanted).abs().max() > 0.1


def test_an_operation_that_torch_lacks_is_named(tiny: Any) -> None:
    program, weights = captured(tiny("Llama"))
    first = replace(program.ops[0], target="aten.no_such_thing.default")
    with pytest.raises(SurgeonError) as caught:
        lower(replace(program, ops=(first, *program.ops[1:])), weights)
    assert caught.value.code is Code.NO_OP_RULE
    assert "no_such_thing" in caught.value.what


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("batch", 3),
        ("batch*seq + 1", 16),
        ("seq//2", 2),
        ("-batch + 2*seq", 7),
        ("Max(0, 1 - seq)", 0),
        ("2*Min(batch, seq, 4)", 6),
    ],
)
def test_symbolic_sizes(text: str, value: int) -> None:
    assert evaluate(text, {"batch": 3, "seq": 5}.__getitem__) == value


def test_a_symbolic_size_beyond_arithmetic_is_refused() -> None:
    with pytest.raises(SurgeonError) as caught:
        evaluate("Mod(seq, 2)", {"seq": 5}.__getitem__)
    assert caught.value.code is Code.BAD_PROGRAM
