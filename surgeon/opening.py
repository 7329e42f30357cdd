"""A source opened: captured, analysed, its tensors ready to be read."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.axes.axes import Axes
from surgeon.axes.plan import Plan
from surgeon.axes.settle import analyse
from surgeon.errors import Code, SurgeonError, no_weights
from surgeon.ir.program import Program

if TYPE_CHECKING:
    import torch

    from surgeon.capture.blocks import Buffers, Span
    from surgeon.capture.source import Source


@dataclass(frozen=True)
class Model:
    """A captured model: its program, its axes, and where its tensors are read."""

    source: Source | None
    program: Program
    axes: Axes
    tensors: Mapping[str, torch.Tensor] | None
    fixed: Mapping[str, torch.Tensor] = field(default_factory=dict[str, Any])
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """What people call the model."""
        return self.source.id if self.source else "module"

    def read(self, name: str) -> torch.Tensor:
        """Returns a parameter or buffer as fp32 (integers as they are), in full size.

        Raises:
            SurgeonError: `missing-file` where only the configuration is known, `capture-failed`
                for a literal whose values the trace lost.
        """
        found = self.fixed.get(name)
        if found is not None and found.is_meta:
            raise SurgeonError(
                Code.CAPTURE_FAILED,
                f"the values of {name} are not known",
                at=name,
                why="the model makes this tensor from a list of numbers while it runs, on the "
                "device of another tensor; in a trace that device holds no values",
                try_="make it a buffer in the model's code (register_buffer, persistent=False)",
            )
        if found is None:
            if self.tensors is None:
                raise no_weights(self.id)
            found = self.tensors[name]
        return found.float() if found.is_floating_point() else found

    def blocks(
        self, name: str, wanted: Sequence[Span], buffers: Buffers
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields rows of a parameter as they are stored, each with the number of its first row."""
        from surgeon.capture.blocks import rows_of

        if name in self.fixed or self.tensors is None:
            return rows_of({name: self.read(name)}, name, wanted, buffers)
        return rows_of(self.tensors, name, wanted, buffers)

    def stream(
        self, names: Iterable[str], size: int, instead: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, int, torch.Tensor]]:
        """Yields parameters in blocks of rows, in the order in which they are stored.

        Args:
            names: of the parameters.
            size: bytes of a block, which is good until the next is asked for.
            instead: tensors that stand for some of them.
        """
        from surgeon.capture.blocks import extent, in_order, rows_of, spans, stream

        def read(
            name: str, wanted: Sequence[Span], buffers: Buffers
        ) -> Iterator[tuple[int, torch.Tensor]]:
            if name in instead:
                return rows_of({name: instead[name].detach()}, name, wanted, buffers)
            return self.blocks(name, wanted, buffers)

        def rows(name: str) -> list[Span]:
            shape = tuple(int(s) for s in self.program.param[name].type.shape)
            dtype = instead[name].dtype if name in instead else self.dtype(name)
            return spans(*extent(shape, dtype.itemsize), size)

        given = tuple(names)
        every = in_order(self.tensors, [n for n in given if n not in self.fixed])
        fixed = [n for n in given if n in self.fixed]
        return stream(read, [(name, rows(name)) for name in (*every, *fixed)], size)

    def dtype(self, name: str) -> torch.dtype:
        """Returns the element type in which a parameter is stored."""
        if name in self.fixed:
            return self.fixed[name].dtype
        if self.tensors is None:
            raise no_weights(self.id)
        get = getattr(self.tensors, "dtype", None)
        return get(name) if get else self.tensors[name].dtype

    def fingerprint(self) -> str:
        """Returns a hash of the tensors' names, types, shapes and first bytes."""
        return self.source.hash() if self.source else ""


def open_model(
    source: Any,
    *,
    example_inputs: Sequence[Any] | None = None,
    dynamic_shapes: Any = None,
    trust_remote_code: bool = False,
) -> Model:
    """Returns a source captured and analysed.

    Args:
        source: a Transformers model, a checkpoint folder, a `config.json`, a GGUF file, a hub id,
            the alias `smollm2`, an `ExportedProgram`, or any module with `example_inputs`.
        example_inputs: what to trace any other module with.
        dynamic_shapes: as `torch.export.export` takes them.
        trust_remote_code: run modelling code that comes with a checkpoint.
    """
    if isinstance(source, Model):
        return source
    start = time.perf_counter()
    generic = _open_module(source, example_inputs, dynamic_shapes)
    if generic is not None:
        return replace(generic, seconds=time.perf_counter() - start)
    from surgeon.capture.model import capture_model
    from surgeon.capture.source import resolve

    found = resolve(source, trust_remote_code=trust_remote_code)
    captured = capture_model(found.meta_model())
    axes = analyse(captured.program)
    weights = found.weights
    fixed = {**captured.constants, **found.computed()}
    return Model(found, captured.program, axes, weights, fixed, time.perf_counter() - start)


def with_heads_apart(model: Model) -> Model:
    """Returns a model whose query heads are told from its key/value heads."""
    from surgeon.axes.grouped import heads_apart

    return replace(model, axes=heads_apart(model.program))


def for_plan(model: Model, plan: Plan) -> Model:
    """Returns a model with the axes that a plan speaks of."""
    return with_heads_apart(model) if plan.grouped else model


@contextmanager
def opening_origin(name: str, made: str, at: str) -> Generator[None]:
    """Turns the refusal of what a plan calls its source into one that says how to name it.

    Args:
        name: what the plan calls it; it may have been written from another folder.
        made: how the model is told of, such as `the plan was made from`.
        at: where the name stands.
    """
    try:
        yield
    except SurgeonError as error:
        if error.code is not Code.NOT_A_MODEL:
            raise
        raise SurgeonError(
            Code.NOT_A_MODEL,
            f"the model that {made}, {name!r}, can't be read from here",
            at=at,
            why=error.why,
            try_="name it with --source",
        ) from error


def _open_module(source: Any, example_inputs: Any, dynamic_shapes: Any) -> Model | None:
    if isinstance(source, str | Path):
        return None
    from torch import nn
    from torch.export import ExportedProgram

    from surgeon.capture.model import capture_exported, capture_module

    if isinstance(source, ExportedProgram):
        exported, captured = source, capture_exported(source)
    elif isinstance(source, nn.Module) and example_inputs is not None:
        captured, exported = capture_module(source, example_inputs, None, dynamic_shapes)
    else:
        return None
    tensors: dict[str, Any] = {**exported.state_dict, **exported.constants, **captured.constants}
    return Model(None, captured.program, analyse(captured.program), tensors)
