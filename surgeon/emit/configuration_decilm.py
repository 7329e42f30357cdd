# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
"""The configuration of decoders whose layers differ, as vLLM's DeciLMForCausalLM reads it.

This file travels beside a checkpoint and needs transformers alone. vLLM reads it with

    vllm serve FOLDER --trust-remote-code
"""

import copy
from types import SimpleNamespace

from transformers import PretrainedConfig


class Block(SimpleNamespace):
    """Part of a layer's description: its fields are attributes, and only those that are given."""


class DeciLMConfig(PretrainedConfig):
    """Describes a Llama whose layers have their own widths.

    ``block_configs`` has for each layer ``attention`` (``no_op``, ``n_heads_in_group``: query heads
    for each key/value head) and ``ffn`` (``no_op``, ``intermediate_size``). Query heads are
    ``num_attention_heads`` in every layer that has attention.
    """

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(self, block_configs=None, **fields):
        """Keeps every field as an attribute."""
        self.block_configs = [
            Block(attention=Block(**block["attention"]), ffn=Block(**block["ffn"]))
            if isinstance(block, dict)
            else block
            for block in block_configs or []
        ]
        super().__init__(**fields)

    def to_dict(self):
        """Returns the fields as plain data, as config.json has them."""
        plain = copy.copy(self)
        blocks = plain.__dict__.pop("block_configs")
        out = PretrainedConfig.to_dict(plain)
        out["block_configs"] = [
            {"attention": dict(vars(b.attention)), "ffn": dict(vars(b.ffn))} for b in blocks
        ]
        return out
