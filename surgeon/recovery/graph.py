"""A program as a module that a trainer takes: maps are modules, layers can be listened to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from surgeon.errors import Code, SurgeonError
from surgeon.ir import ParamRef, Program
from surgeon.ir.program import op_refs
from surgeon.runtime.lower import lower

INPUTS = 3
"""A language model's program takes token ids, which of them count, and positions."""


@dataclass
class Output:
    """What a language model makes, under the name that Transformers has for it."""

    logits: torch.Tensor


class ProgramModel(nn.Module):
    """A program's model, called as a model of Transformers is.

    Args:
        graph: the lowered program.
        listened: by value, the module of the graph that passes it on.
    """

    def __init__(self, graph: fx.GraphModule, listened: dict[str, str]) -> None:
        super().__init__()
        self.graph = graph
        self._listened = listened

    def forward(self, input_ids: torch.Tensor) -> Output:
        """Returns the logits [batch, tokens, vocabulary]."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        positions = positions.expand(len(input_ids), -1)
        return Output(self.graph(input_ids, torch.ones_like(input_ids), positions))

    def name(self, param: str) -> str:
        """Returns the module's name of the program's parameter."""
        return f"graph.{param}"

    def stream(self, value: str) -> str:
        """Returns the path of the module that passes on a value that is listened to."""
        return f"graph.{self._listened[value]}"


def trainable(
    program: Program, get: Callable[[str], torch.Tensor], values: Sequence[str]
) -> ProgramModel:
    """Returns a program's model, whose parameters are trained.

    A linear map whose weight (and bias) nothing else uses is a module of its own, as adapters want
    it.

    Args:
        program: a language model's.
        get: its tensors, which become the model's own.
        values: what is to be listened to.

    Raises:
        SurgeonError: `bad-option` where it takes other inputs than a language model.
    """
    if len(program.inputs) != INPUTS or len(program.outputs) != 1:
        raise SurgeonError(
            Code.BAD_OPTION,
            "the model can't be trained on tokens",
            at="compensate/recover",
            why=f"it takes {', '.join(i.name for i in program.inputs) or 'nothing'}, not token ids",
            try_="a language model of Transformers, or a train_fn of your own",
        )
    module = lower(program, get)
    for parameter in module.parameters():
        parameter.requires_grad_()
    made = {str(node.name): node for node in module.graph.nodes}
    listened: dict[str, str] = {}
    for number, value in enumerate(v for v in values if v in made):
        listened[value] = f"after_{number}"
        _listen(module, made[value], listened[value])
    _maps(module, program)
    module.graph.lint()
    module.recompile()
    return ProgramModel(module, listened)


def _listen(module: fx.GraphModule, node: fx.Node, path: str) -> None:
    """Puts a module behind a value that passes it on as it is."""
    module.add_submodule(path, nn.Identity())
    with module.graph.inserting_after(node):
        passed = module.graph.call_module(path, (node,))
    node.replace_all_uses_with(passed, delete_user_cb=lambda user: user is not passed)


def _maps(module: fx.GraphModule, program: Program) -> None:
    """Turns linear maps that own their parameters into modules of the same names."""
    refs = (ref for op in program.ops for ref in op_refs(op))
    uses = Counter(ref.name for ref in refs if isinstance(ref, ParamRef))
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.aten.linear.default:
            continue
        x, *params = node.args
        names = [_param(arg) for arg in params if arg is not None]
        path = (names[0] or "").rpartition(".")[0]
        wanted = [f"{path}.weight", f"{path}.bias"][: len(names)]
        if not path or names != wanted or any(uses[name] != 1 for name in wanted):
            continue
        owner = module.get_submodule(path)
        if dict(owner.named_parameters()).keys() != {n.rpartition(".")[2] for n in wanted}:
            continue
        _own(module, path, owner)
        with module.graph.inserting_before(node):
            called = module.graph.call_module(path, (x,))
        node.replace_all_uses_with(called)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()


def _param(arg: Any) -> str | None:
    return str(arg.target) if isinstance(arg, fx.Node) and arg.op == "get_attr" else None


def _own(module: fx.GraphModule, path: str, owner: nn.Module) -> None:
    weight: Any = owner.get_parameter("weight")
    bias: Any = dict(owner.named_parameters()).get("bias")
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = weight
    if bias is not None:
        made.bias = bias
    module.set_submodule(path, made)
