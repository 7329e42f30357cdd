"""What a plan leaves is trained, in terms of the original model.

In a schedule's later rounds the passes work on what earlier rounds left, which is a program and no
model of Transformers. What is trained is the smaller model all the same: this module knows what the
rounds before did, and tells what was learnt in the sizes of the round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.axes.compose import compose
from surgeon.axes.plan import Plan, Selection
from surgeon.axes.surgery import operate
from surgeon.effects import options_of
from surgeon.errors import Code, SurgeonError, no_weights
from surgeon.opening import Model

if TYPE_CHECKING:
    import torch

    from surgeon.calibrate.data import Places, Recipe, Windows
    from surgeon.calibrate.stored import Stored
    from surgeon.recovery.small import Small

Train = Callable[[Plan, Any], tuple[Mapping[str, Any], Mapping[str, Any]]]
"""From a plan and a training's options to tensors that replace others, and figures."""

PASS = "recover"
"""The compensation that trains, as plug-ins call it."""


@dataclass(frozen=True)
class Ground:
    """What passes stand on: the original model, and what rounds before them did.

    Attributes:
        origin: the original model.
        plan: what is gone of it.
        rewrites: its full-size tensors that replace others.
        scheduled: whether this is a round of several.
    """

    origin: Model
    plan: Plan = field(default_factory=Plan)
    rewrites: Mapping[str, Any] = field(default_factory=dict[str, Any])
    scheduled: bool = False

    def then(self, plan: Plan, rewrites: Mapping[str, Any]) -> Ground:
        """Returns the ground after a further plan of what is left.

        Args:
            plan: in indices of what is left.
            rewrites: tensors of what is left, in its sizes, that replace others before the plan.
        """
        import torch

        selection = Selection(self.origin.axes, self.plan)
        found = dict(self.rewrites)
        for name, tensor in rewrites.items():
            before = found.get(name)
            full = (self.origin.read(name).detach() if before is None else before).float().clone()
            flat = torch.from_numpy(selection.flat(name))
            full.reshape(-1)[flat] = tensor.reshape(-1).float()
            found[name] = full
        whole = compose(self.origin.axes, self.plan, plan)
        return replace(self, plan=whole, rewrites=found)

    def left(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the original's tensors in the sizes of what is left."""
        from surgeon.runtime.apply import removed

        selection = Selection(self.origin.axes, self.plan)
        return {name: removed(selection, name, tensor) for name, tensor in tensors.items()}

    def full(self, name: str) -> torch.Tensor:
        """Returns a tensor of the original in full size with rewrites applied, fp32."""
        found = self.rewrites.get(name)
        return self.origin.read(name) if found is None else found.float()

    def small(self) -> Small:
        """Returns the model that is left, to be trained; the original for an empty plan."""
        from surgeon.emit.huggingface import choose
        from surgeon.recovery.small import of_program, of_transformers

        origin = self.origin
        if origin.tensors is None:
            raise no_weights(origin.id)
        if (source := origin.source) is not None:
            try:
                emission = choose(
                    origin.axes, self.plan, source.config, source.model_class, origin.fixed
                )
            except SurgeonError as error:
                # A graph target writes what no class can express; then its program is trained.
                if error.code is not Code.TARGET_REFUSED:
                    raise
            else:
                return of_transformers(origin.axes, self.plan, emission, self.full)
        program = operate(origin.axes, self.plan)
        return of_program(origin.axes, self.plan, program, self.full)

    def training(
        self,
        rewrites: Mapping[str, Any],
        *,
        calibration: Recipe | Windows | Stored | None,
        dense: Mapping[str, Any] | None = None,
        basis: str = "",
        notes: list[str],
    ) -> Train:
        """Returns what trains the model that a plan leaves.

        Args:
            rewrites: tensors that replace others of what is left, before the plan.
            calibration: the data where a training names none of its own.
            dense: full-size tensors that replace others in the teacher: an exact change of basis.
            basis: why layers of the teacher aren't told in the student's basis; empty if they are.
            notes: gets what there is to say to the user.
        """

        def train(plan: Plan, settings: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
            from surgeon.calibrate.parallel import rank
            from surgeon.recovery.training import Job, trained
            from surgeon.runtime.apply import alike

            if basis and settings.distill in ("hidden", "both"):
                raise SurgeonError(
                    Code.BAD_OPTION,
                    "hidden states can't be compared with the dense model's",
                    at=f"compensate/{PASS}: distill",
                    why=basis,
                    try_="distill=logits",
                )
            after = self.then(plan, rewrites)
            student = after.small()
            teacher = None
            if settings.distill != "none":
                teacher = Ground(self.origin, rewrites=dense or {}).small()
            places = _places(self.origin, settings, calibration, notes)
            folder = _folder(settings, after, places)
            found = trained(Job(student, teacher, places, settings, folder))
            # Shards are gathered on the first process alone, and only that one writes.
            state = found.state if found.state or rank() == 0 else student.model.state_dict()
            facts = {
                **found.to_json(),
                "trained": type(student.model).__name__,
                "data": {name: list(seen) for name, seen in places.origin.items()},
            }
            learnt = {
                # Heads that are one in the student stay alike in the original's sizes.
                name: alike(self.origin.axes, after.plan, name, tensor)
                for name, tensor in student.learnt(state).items()
            }
            return self.left(learnt), facts

        return train


def _places(
    origin: Model,
    settings: Any,
    calibration: Recipe | Windows | Stored | None,
    notes: list[str],
) -> Places:
    """Returns where a training's windows lie."""
    from surgeon.calibrate.data import Piece, Places, Recipe, Windows, places

    count, own = settings.steps * settings.batch, settings.data
    named = (own,) if isinstance(own, str) and own else tuple(own)
    if named:
        pieces = tuple(Piece(name) for name in named)
    elif isinstance(calibration, Windows):
        return Places.of(calibration)  # what is held out to judge by is in none of them
    elif calibration is None or isinstance(calibration, Recipe):
        pieces = calibration.pieces if calibration is not None else ()
    else:
        raise SurgeonError(
            Code.BAD_OPTION,
            "there is no text to train on",
            at=f"compensate/{PASS}: data",
            why="statistics stand in place of calibration data, and hold no text",
            try_="data=FILE, a text or JSON lines",
        )
    source = origin.source
    tokenizer = source.load_tokenizer() if source else None
    if not pieces and tokenizer is None:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"compensate/{PASS} needs a text",
            at=f"compensate/{PASS}: data",
            why="none was given, and there is no tokenizer for the text of last resort",
            try_="data=FILE: token ids in a .npy file, or a text for a model with a tokenizer",
        )
    vocab = int(source.config.vocab_size) if source else None
    recipe = Recipe(pieces, count, settings.length, settings.seed)
    return places(recipe, tokenizer, vocab=vocab, notes=notes)


def _folder(settings: Any, ground: Ground, places: Places) -> Path | None:
    """Returns where checkpoints of this very training lie, or None where none are wanted.

    Another plan, other weights to begin with or other options get a folder of their own.
    """
    if not settings.checkpoints:
        return None
    told = {
        name: value
        for name, value in options_of(settings).items()
        if name not in ("checkpoints", "save_every")
    }
    digest = hashlib.sha256(ground.plan.to_json().encode())
    digest.update(json.dumps([told, places.origin], sort_keys=True, default=str).encode())
    for name, tensor in sorted(ground.rewrites.items()):
        digest.update(name.encode() + tensor.reshape(-1)[:64].float().numpy().tobytes())
    digest.update(ground.origin.fingerprint().encode())
    return Path(settings.checkpoints) / digest.hexdigest()[:16]
