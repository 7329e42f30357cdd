"""A plan with its model: the smaller model, made when it is asked for, and the report."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes
from surgeon.axes.budget import count, decoder_params
from surgeon.axes.factors import Product
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.renumber import of_vocabulary
from surgeon.axes.surgery import operate
from surgeon.errors import Code, SurgeonError
from surgeon.ir.program import Program
from surgeon.ir.verify import verify as verify_program
from surgeon.memory import Memory
from surgeon.opening import Model

if TYPE_CHECKING:
    import torch
    from torch import nn

    from surgeon.capture.blocks import Buffers, Span
    from surgeon.capture.source import Source
    from surgeon.emit.huggingface import Emission
    from surgeon.emit.lowbit.scheme import Scheme
    from surgeon.packing import Measuring
    from surgeon.report.verify import Verification
    from surgeon.vocabulary.files import SmallerSource


@dataclass(frozen=True)
class Report:
    """What a prune did, as `surgeon.json` holds it.

    `recipe` tells of each pass: what it is called, its options, seconds, effect and notes.
    `as_recipe` is what a recipe's file would say, every option spelled out; it gives the same plan.
    `sparsity` tells of zeros among the weights, by parameter and in all, and what they save where;
    it is None where there are none to speak of.
    `vocabulary` is empty where all tokens stayed: otherwise how many there were and are, and what
    that did to embedding, head and corpus.
    `quantize` tells, where weights are stored in fewer bits, how, and of each step its bytes on
    disk and in memory, and its perplexity where a text was given.
    """

    source: Mapping[str, str]
    recipe: Sequence[Mapping[str, Any]]
    parameters: Mapping[str, Mapping[str, int]]
    ratio: Mapping[str, float]
    axes: Sequence[Mapping[str, Any]]
    branches: Sequence[str]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    target: Mapping[str, Any] = field(default_factory=dict[str, Any])
    verification: Mapping[str, Any] | None = None
    as_recipe: Mapping[str, Any] = field(default_factory=dict[str, Any])
    sparsity: Mapping[str, Any] | None = None
    vocabulary: Mapping[str, Any] = field(default_factory=dict[str, Any])
    quantize: Mapping[str, Any] | None = None

    def to_json(self) -> str:
        """Returns the report as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Returns the report that `to_json` wrote, its values as JSON has them."""
        data: dict[str, Any] = json.loads(text)
        data["notes"] = tuple(data["notes"])
        return cls(**data)


@dataclass(frozen=True)
class Pruned:
    """A plan together with the model it was made for; the smaller model is made when asked for."""

    origin: Model
    plan: Plan
    report: Report
    rewrites: Mapping[str, torch.Tensor] = field(default_factory=dict[str, Any])
    target: str = "transformers"
    quantize: Scheme | None = None
    memory: Memory = field(default_factory=lambda: Memory.of(None))

    @property
    def targets(self) -> tuple[str, ...]:
        """What it is written for, in the order in which that was asked for."""
        from surgeon.emit.target import names_of

        return names_of(self.target)

    @property
    def is_graph(self) -> bool:
        """Whether the result is a graph rather than a Transformers model."""
        from surgeon.emit.target import all_graphs

        return self.origin.source is None or all_graphs(self.targets)

    @property
    def changed(self) -> bool:
        """Whether anything is removed, or has other weights."""
        return bool(self.rewrites) or not self.plan.empty

    @property
    def fits(self) -> bool:
        """Whether the masked and the smaller model can be compared whole in the memory allowed.

        A graph has no other comparison, and always is.
        """
        if self.is_graph:
            return True
        total = self.report.parameters["total"]
        return self.memory.fits(4 * total["before"] + 8 * total["after"])

    @property
    def axes(self) -> Axes:
        """The axes of the model before."""
        return self.origin.axes

    @cached_property
    def program(self) -> Program:
        """The program after the plan."""
        return verify_program(operate(self.axes, self.plan))

    @cached_property
    def selection(self) -> Selection:
        """The plan's arithmetic on tensors."""
        return Selection(self.axes, self.plan)

    def full(self, name: str) -> torch.Tensor:
        """Returns a parameter in full size with rewrites applied, fp32.

        One that becomes two is their product; either of those has a name of its own.
        """
        found = self.rewrites.get(name)
        if found is not None:
            return found.float()
        split = self.selection.splits.get(name)
        if split is None:
            return self.origin.read(name)
        return Product(self.rewrites[split.rows.name], self.rewrites[split.columns.name]).whole

    def blocks(
        self, name: str, wanted: Sequence[Span], buffers: Buffers
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields rows of a parameter in full size, rewrites applied, as they are stored."""
        from surgeon.capture.blocks import rows_of

        found = self.rewrites.get(name)
        if found is None and name in self.selection.splits:
            found = self.full(name)
        if found is None:
            return self.origin.blocks(name, wanted, buffers)
        return rows_of({name: found}, name, wanted, buffers)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the element type that a parameter of `program` is stored in."""
        return self.origin.dtype(self.selection.source(name))

    def tensor(self, name: str) -> torch.Tensor:
        """Returns a parameter of `program`, fp32."""
        from surgeon.runtime.apply import removed

        return removed(self.selection, name, self.full(name))

    def sparsity(self) -> Mapping[str, Any] | None:
        """Returns what a report says of zeros among the weights that were replaced."""
        if not self.rewrites or self.origin.tensors is None:
            return None
        from surgeon.report.sparsity import sparsity_of
        from surgeon.runtime.apply import removed

        def before(name: str) -> torch.Tensor:
            return removed(self.selection, name, self.origin.read(name))

        def width(name: str) -> int:
            return self.origin.dtype(name).itemsize

        return sparsity_of(self.program, sorted(self.rewrites), self.tensor, before, width)

    @cached_property
    def emission(self) -> Emission:
        """How the result is written for Transformers.

        Raises:
            SurgeonError: `target-refused` where no class can express it.
        """
        from surgeon.emit.huggingface import choose

        source = self._source()
        return choose(self.axes, self.plan, source.config, source.model_class, self.origin.fixed)

    @property
    def source(self) -> Source | None:
        """What the result takes from its source: configuration and tokenizer, with their ids."""
        return self._smaller.source if self._smaller else self.origin.source

    @cached_property
    def _smaller(self) -> SmallerSource | None:
        if self.origin.source is None or not self.plan.renumbered:
            return None
        from surgeon.vocabulary.files import SmallerSource

        kept = self.plan.by_axis[self.plan.renumbered[0]].array
        return SmallerSource(self.origin.source, kept.tolist())

    def _source(self) -> Source:
        if self.source is None:
            raise SurgeonError(
                Code.TARGET_REFUSED,
                "this result is no Transformers model",
                at=self.origin.id,
                why="it was captured from a module or an exported program",
                try_="use `.model` or `.save(path)`, which writes a .pt2 file",
            )
        return self.source

    @cached_property
    def model(self) -> nn.Module:
        """The smaller model: of Transformers if that is the target, otherwise a `GraphModule`."""
        if self.is_graph:
            from surgeon.runtime.lower import lower

            # What is whole may be the source's own memory, which the result must not share.
            return lower(self.program, lambda name: self.tensor(name).clone())
        from surgeon.emit.in_memory import in_memory

        return in_memory(self.emission, self.selection, self.full, self.dtype)

    @cached_property
    def masked(self) -> nn.Module:
        """The original in full shape with zeros where channels go and dropped branches bypassed."""
        from surgeon.report.verify import reference

        return reference(self.axes, self.plan, self.full)

    def verify(self, tokenizer: Any = None) -> Verification:
        """Returns how the smaller model compares with the masked one.

        Raises:
            SurgeonError: `verify-failed` where they differ.
        """
        import torch

        from surgeon.report import verify as v
        from surgeon.runtime.logits import positions_of

        masked_model = self.masked
        if self.is_graph:
            return v.check_program(self.program, self.model, masked_model, self.axes, self.plan)
        from surgeon.emit.in_memory import in_memory

        wide = in_memory(self.emission, self.selection, self.full, lambda _: torch.float32)
        source = self._source()
        vocab, positions = _vocabulary(source.config), positions_of(source)
        inputs = v.probes(vocab, tokenizer, positions=positions)
        forward = v.transformers_forward(wide)
        found = v.check(forward, masked_model, inputs, self.axes, self.plan)
        if any(self.dtype(n) != torch.float32 for n in self.emission.names):
            stored = in_memory(self.emission, self.selection, self.full, self.dtype)
            rounded = v.transformers_forward(stored.float())
            cast = max(d.largest for d in v.differences(rounded, forward, inputs))
            found = replace(found, cast=cast)
        return found

    def save(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        verify: bool = True,
        quantize: str | Mapping[str, Any] | Scheme | None = None,
        measure: Measuring | None = None,
    ) -> Report:
        """Writes the checkpoint, the plan and the report; nothing is there until all of it is.

        Of the processes that a launcher started, the first one writes and the others wait for it.

        Args:
            path: a folder that doesn't exist yet, or is empty.
            overwrite: replace an earlier result.
            verify: compare with the masked reference first, and read back what was written.
            quantize: store weights in fewer bits: `int8`, `w8` or `int4`, or the keys of a recipe's
                section of that name; by default what the recipe says.
            measure: a text that both steps are scored on.

        Raises:
            SurgeonError: `bad-output`, `disk-full`, `target-refused` or `verify-failed`.
        """
        from surgeon import packing, saving
        from surgeon.calibrate.parallel import by_first, launched
        from surgeon.emit.lowbit.scheme import scheme_of

        scheme, folder = scheme_of(quantize) or self.quantize, Path(path)
        if scheme is None and measure is not None:
            raise packing.no_steps(measure, "nothing is quantised")

        def write() -> Report:
            if scheme is None:
                return saving.save(self, folder, overwrite=overwrite, verify=verify)
            return packing.save(
                self, folder, scheme, overwrite=overwrite, verify=verify, measure=measure
            )

        if not launched():
            return write()
        return Report.from_json(by_first(str(folder), lambda: write().to_json()))


def _vocabulary(config: Any) -> int:
    return int(config.vocab_size)


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    names = ("model-surgeon", "torch", "transformers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def report_of(
    origin: Model,
    plan: Plan,
    recipe: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
    ratio: float | None,
    seconds: Mapping[str, float],
) -> Report:
    """Returns what a prune did.

    Args:
        origin: the model.
        plan: what is removed of it.
        recipe: the record of its passes.
        notes: what there is to say to the user.
        ratio: what was asked for.
        seconds: by what they were spent on.
    """
    after = operate(origin.axes, plan)
    decoder = decoder_params(origin.axes)
    every = [p.name for p in origin.program.params if p.kind == "parameter"]
    selection = Selection(origin.axes, plan)
    parameters = {
        label: {
            "before": count(origin.program, names),
            "after": count(after, (part for name in names for part in selection.parts(name))),
        }
        for label, names in (("decoder", decoder), ("total", every))
    }
    gone = 1 - parameters["decoder"]["after"] / max(1, parameters["decoder"]["before"])
    sizes = [
        {
            "name": a.name,
            "role": a.role,
            "before": a.size,
            "after": selection.size(origin.axes.number[a.name]),
        }
        for a in origin.axes.axes
    ]
    return Report(
        {"id": origin.id, **dict(plan.source)},
        tuple(recipe),
        parameters,
        {"removed": gone, **({"asked": ratio} if ratio is not None else {})},
        sizes,
        plan.branches,
        seconds,
        versions(),
        tuple(notes),
        vocabulary=of_vocabulary(origin.axes, plan),
    )
