"""Weights of an emitted Transformers checkpoint in fewer bits, as torchao and vLLM store them."""
