"""The tiny models are what the exactness tests need: loud, and with no neutral parameter."""

import pytest
import torch

from tests import models


@pytest.mark.zoo
@pytest.mark.parametrize("name", models.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_matters(name, tied):
    model = models.tiny(name, tie_word_embeddings=tied)
    tied_now = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied_now == tied
    ids = models.tokens(model.config.vocab_size)
    with torch.no_grad():
        logits = model(ids).logits
    assert 0.5 < logits.std() < 15

    named = dict(model.named_parameters())
    for param in named.values():
        param.requires_grad_(True)
    model(ids).logits.square().mean().backward()
    for key, param in named.items():
        grad, param.grad = param.grad, None
        # A key's bias adds the same to all of a query's scores where nothing rotates it, and
        # softmax takes it out again.
        if not key.endswith("k_proj.bias"):
            assert grad is not None and grad.abs().max() > 1e-4, key


def test_eps_and_weights_are_not_neutral(tiny):
    model = tiny("Llama")
    assert model.config.rms_norm_eps == 0.1
    weight = model.model.norm.weight
    assert 0.5 <= weight.min() < 0.8 and 1.2 < weight.max() <= 1.5
    assert tiny("Llama") is model
    assert tiny("Llama", num_hidden_layers=1) is not model
    again = models.build("Llama")
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_tokenizer_round_trips(tiny_tokenizer):
    text = "The cat, 3 mats."
    ids = tiny_tokenizer(text)["input_ids"]
    assert ids[0] == 1 and len(ids) == 1 + len(text) and max(ids) < 101
    assert tiny_tokenizer.decode(ids, skip_special_tokens=True) == text
