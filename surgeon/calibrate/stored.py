"""Statistics in a file: gathered once, read by passes as often as they are run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from surgeon.axes.contractions import contractions
from surgeon.axes.plan import Plan
from surgeon.calibrate.gathered import Gathered
from surgeon.calibrate.gradients import Fisher, Gradients
from surgeon.calibrate.moments import Moments
from surgeon.calibrate.routing import Routing
from surgeon.calibrate.similarity import spans
from surgeon.errors import Code, SurgeonError, near

Statistic = Literal["moments", "norms", "gradients", "fisher", "similarity", "routing"]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)

WIDEST = 8192
"""Maps with more outputs than this have no Fisher matrix gathered."""

FORMAT = 1
_KEY = "surgeon.statistics"
"""The header's entry that says what the tensors are."""

_NEEDS: Mapping[Statistic, str] = {
    "moments": "activations: second moment",
    "norms": "activations: norms",
    "gradients": "gradients: weights",
    "fisher": "gradients: outputs",
    "similarity": "activations: similarity",
    "routing": "activations: routing",
}

_PARTS: Mapping[str, tuple[str, ...]] = {
    "moments": ("mean", "square", "second"),
    "norms": ("mean", "square"),
    "gradients": ("mean", "square"),
    "fisher": ("second",),
    "routing": ("sent", "norm"),
}


def save(
    path: str | Path,
    data: Gathered,
    statistics: Iterable[Statistic],
    about: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> Mapping[str, int]:
    """Gathers statistics of a whole model and writes them; returns how many of each.

    Where several processes share the windows, all gather and the first one writes.

    Args:
        path: the file; it is there when all of it is.
        data: what they are gathered from.
        statistics: which.
        about: what tells what they are of: `fingerprint`, `model`, `data`, `versions`, …
        overwrite: replace an existing file.

    Raises:
        SurgeonError: `bad-output`, `disk-full`, or why something can't be gathered.
    """
    from surgeon.capture.exported import DTYPES
    from surgeon.emit.files import output_file
    from surgeon.emit.safetensors_file import TensorSpec, write_safetensors_file

    index: dict[str, Any] = {}
    tensors: dict[str, torch.Tensor] = {}
    held: dict[int, str] = {}
    for kind, found in _gathered(data, tuple(statistics)).items():
        if kind == "similarity":
            index[kind] = dict(found)
            continue
        entries: dict[str, Any] = {}
        for name, one in found.items():
            keys: dict[str, str] = {}
            for part in _PARTS[kind]:
                tensor = getattr(one, part)
                # Maps that read one value share its moments.
                keys[part] = held.setdefault(id(tensor), f"{kind}/{name}/{part}")
                tensors[keys[part]] = tensor
            entries[name] = {"count": one.count, **keys}
        index[kind] = entries
    counts = {kind: len(found) for kind, found in index.items()}
    if data.machine.world.rank != 0:
        return counts
    header = {_KEY: json.dumps({"format": FORMAT, **about, "statistics": index}, sort_keys=True)}
    specs = [
        TensorSpec(name, DTYPES[t.dtype], tuple(t.shape), lambda t=t: t)
        for name, t in tensors.items()
    ]
    need = sum(spec.nbytes for spec in specs)
    with output_file(path, overwrite=overwrite, need_bytes=need) as partial:
        write_safetensors_file(partial, specs, metadata=header)
    return counts


def _gathered(data: Gathered, kinds: Sequence[Statistic]) -> dict[str, Mapping[str, Any]]:
    """Returns by statistic what there is of the whole model; announced, it takes few walks."""
    data.expect(_NEEDS[kind] for kind in kinds)
    program = data.axes.program
    maps = {c.param: int(program.types[c.out].shape[-1]) for c in contractions(program)}
    narrow = [name for name, width in maps.items() if width <= WIDEST]
    trained = [p.name for p in program.params if p.kind == "parameter"]
    gather: Mapping[Statistic, Callable[[], Mapping[str, Any]]] = {
        "fisher": lambda: data.fisher(narrow),
        "moments": lambda: data.moments(tuple(maps)),
        "norms": lambda: data.moments(tuple(maps), full=False),
        "gradients": lambda: data.gradients(trained),
        "similarity": lambda: data.similarity(tuple(spans(program, data.axes.branches))),
        "routing": data.routing,
    }
    wide = [name for name in maps if name not in narrow]
    if "fisher" in kinds and wide:
        data.notes.append(
            f"no Fisher matrix of {', '.join(wide)}: more than {WIDEST:,} outputs have no room"
        )
    return {kind: call() for kind, call in gather.items() if kind in kinds}


@dataclass(frozen=True)
class Stored:
    """Statistics as `surgeon calibrate` wrote them; what they hold, they answer.

    Attributes:
        path: the file.
        about: what they are of: `fingerprint`, `model`, `data`, `versions`, …
        statistics: by kind and name, which tensors there are.
    """

    path: Path
    about: Mapping[str, Any]
    statistics: Mapping[str, Mapping[str, Any]] = field(repr=False)

    def check(self, fingerprint: str) -> Stored:
        """Returns these statistics if they are of the model with this fingerprint.

        Raises:
            SurgeonError: `plan-mismatch`.
        """
        made_for = self.about.get("fingerprint")
        if made_for == fingerprint:
            return self
        raise SurgeonError(
            Code.PLAN_MISMATCH,
            "this is not the model that the statistics are of",
            at=str(self.path),
            why=f"they were gathered from {self.about.get('model', 'another one')}, whose tensors "
            "have another fingerprint",
            try_="surgeon calibrate this model, or name the right one",
            data={"expected": made_for, "found": fingerprint},
        )

    def moments(self, params: Sequence[str], *, full: bool = True) -> Mapping[str, Moments]:
        """Returns the moments of these parameters' inputs."""
        kind = "norms" if not full and "moments" not in self.statistics else "moments"
        parts = _PARTS["norms"] if not full else _PARTS["moments"]
        return {n: Moments(c, **t) for n, c, t in self._read(kind, params, parts)}

    def gradients(self, params: Sequence[str]) -> Mapping[str, Gradients]:
        """Returns the loss's gradients with respect to these parameters."""
        found = self._read("gradients", params, _PARTS["gradients"])
        return {n: Gradients(c, **t) for n, c, t in found}

    def fisher(self, params: Sequence[str]) -> Mapping[str, Fisher]:
        """Returns the second moments of the loss's gradients at these maps' outputs."""
        found = self._read("fisher", params, _PARTS["fisher"])
        return {n: Fisher(c, **t) for n, c, t in found}

    def similarity(self, branches: Sequence[str]) -> Mapping[str, float]:
        """Returns how alike the residual stream is before and after branches or layers."""
        held = self._held("similarity", branches)
        try:
            return {name: float(held[name]) for name in branches}
        except (TypeError, ValueError, OverflowError) as error:
            raise _damaged(self.path, f"{type(error).__name__}: {error}") from error

    def routing(self) -> Mapping[str, Routing]:
        """Returns how experts were used."""
        names = tuple(self._held("routing", ()))
        return {n: Routing(c, **t) for n, c, t in self._read("routing", names, _PARTS["routing"])}

    def loss(self, plan: Plan, rewrites: Mapping[str, Any] | None = None) -> float:
        """Refuses: a loss takes the model to run on data."""
        raise self._lacks("the loss of a plan", "it takes the model to run on the data")

    def divergences(self, trials: Iterable[tuple[Plan, Callable[[str], Any]]]) -> tuple[Any, ...]:
        """Refuses: predictions take the model to run on data."""
        raise self._lacks("the divergence of plans", "it takes the model to run on the data")

    def sequential(
        self,
        plan: Plan,
        params: Sequence[str],
        solve: Callable[[str, Any], Any],
        *,
        cross: bool = True,
        folds: int = 1,
    ) -> Mapping[str, Any]:
        """Refuses: what the pruned model computes takes data."""
        raise self._lacks("what a pruned model computes", "it takes that model to run on the data")

    def distilled(
        self, plan: Plan, *, rate: float, epochs: float, windows: int, folds: int = 1
    ) -> tuple[Mapping[str, Any], tuple[float, ...]]:
        """Refuses: learning from the dense model takes data."""
        raise self._lacks("what a pruned model learns", "it takes both models to run on the data")

    def with_rewrites(self, rewrites: Mapping[str, Any], *, dense: bool) -> Stored:
        """Returns the same statistics, which stay valid while the dense model is what it was.

        Raises:
            SurgeonError: `bad-option` where tensors of the dense model are replaced.
        """
        if dense and rewrites:
            raise self._lacks("a model in another basis", "they are of the model as it was")
        return self

    def _lacks(self, what: str, why: str) -> SurgeonError:
        return SurgeonError(
            Code.BAD_OPTION,
            f"stored statistics don't hold {what}",
            at=str(self.path),
            why=why,
            try_="--calibration FILE with a text",
        )

    def _held(self, kind: str, names: Sequence[str]) -> Mapping[str, Any]:
        held = self.statistics.get(kind)
        if held is None:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"the file holds no {kind}",
                at=str(self.path),
                why=f"it was made with --statistics {','.join(self.statistics)}",
                try_=f"surgeon calibrate MODEL --statistics {','.join([*self.statistics, kind])}",
            )
        for name in names:
            if name not in held:
                raise SurgeonError(
                    Code.BAD_OPTION,
                    f"the file holds no {kind} of {name}",
                    at=str(self.path),
                    why=near(name, held),
                    try_="--calibration FILE with a text",
                )
        return held

    def _read(
        self, kind: str, names: Sequence[str], parts: Sequence[str]
    ) -> list[tuple[str, int, dict[str, torch.Tensor]]]:
        """Returns name, count and tensors of each; those that are shared are read once."""
        from safetensors import SafetensorError, safe_open

        held = self._held(kind, names)
        read: dict[str, torch.Tensor] = {}
        out: list[tuple[str, int, dict[str, torch.Tensor]]] = []
        try:
            with safe_open(str(self.path), "pt") as file:
                for name in names:
                    entry = held[name]
                    keys = {part: entry[part] for part in parts}
                    for key in keys.values():
                        if key not in read:
                            read[key] = file.get_tensor(key)
                    tensors = {part: read[key] for part, key in keys.items()}
                    out.append((name, int(entry["count"]), tensors))
        except (
            *(OSError, SafetensorError, LookupError, TypeError, ValueError, OverflowError),
        ) as error:
            raise _damaged(self.path, f"{type(error).__name__}: {error}") from error
        return out


def load(path: str | Path, *, fingerprint: str | None = None) -> Stored:
    """Returns the statistics in a file; tensors are read when they are asked for.

    Args:
        path: what `surgeon calibrate` wrote.
        fingerprint: that of the model they are to be of.

    Raises:
        SurgeonError: `missing-file`, `bad-checkpoint` for another or a damaged file,
            `plan-mismatch` for another model's.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise SurgeonError(
            Code.MISSING_FILE,
            "there are no statistics",
            at=str(path),
            why="there is no such file",
            try_="surgeon calibrate MODEL -o STATS.safetensors --calibration FILE",
        )
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            keys = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise _damaged(path, str(error)) from error
    if text is None:
        raise _damaged(path, f"its header has no entry {_KEY}, so it is something else")
    try:
        header: dict[str, Any] = json.loads(text)
        version = header.pop("format")
        found_in = cast(dict[str, Any], header.pop("statistics"))
        if not all(isinstance(entries, dict) for entries in found_in.values()):
            raise TypeError("a statistic is no table of names")
        statistics = cast(dict[str, dict[str, Any]], found_in)
        named = {
            key
            for kind, parts in _PARTS.items()
            for entry in statistics.get(kind, {}).values()
            for key in (entry[part] for part in parts)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header can't be read ({error})") from error
    if version != FORMAT:
        raise _damaged(path, f"it is of format {version}, and this version reads {FORMAT}")
    if not named <= keys:
        raise _damaged(path, f"it lacks the tensor {min(named - keys)}")
    found = Stored(path, header, statistics)
    return found if fingerprint is None else found.check(fingerprint)


def _damaged(path: Path, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_CHECKPOINT,
        "these are no statistics that can be read",
        at=str(path),
        why=why,
        try_="surgeon calibrate MODEL -o STATS.safetensors --calibration FILE",
    )
