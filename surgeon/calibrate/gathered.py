"""What passes ask of calibration data: gathered when it is asked for, and once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from surgeon.axes.axes import Axes
from surgeon.axes.consumers import consumers
from surgeon.axes.contractions import Contraction, contractions
from surgeon.axes.plan import Plan, Selection, dropped
from surgeon.calibrate.data import Windows
from surgeon.calibrate.distil import Schedule, distilled, streams_of
from surgeon.calibrate.divergence import Divergence, Trial, divergences
from surgeon.calibrate.gradients import Fisher, Gradients, there_and_back
from surgeon.calibrate.loss import mean_loss
from surgeon.calibrate.moments import Moments, together
from surgeon.calibrate.parallel import join
from surgeon.calibrate.routing import Routing, routes
from surgeon.calibrate.running import TOKENS, Change, Get, Machine
from surgeon.calibrate.segments import segments, unchanged
from surgeon.calibrate.sequential import Solve, sequential
from surgeon.calibrate.similarity import spans
from surgeon.calibrate.statistics import walk
from surgeon.calibrate.taps import Asked
from surgeon.errors import Code, SurgeonError, near
from surgeon.runtime.apply import kept_only, masked, rewritten

EXTRA_BYTES = 2**30
"""What is gathered besides what is asked for, as it will be asked for next, may take so much."""

GRADIENT_WINDOWS = 12
"""Windows that the loss's gradients are taken on: of 64 windows of 512 tokens these are 6,000. What
every piece was given is kept for them on the way back."""

TRIAL_WINDOWS = 3
"""Windows that the divergence of trials is taken on. They are the last: the walk with gradients,
and what is gathered on it, has not seen them unless there are few."""

WIDEST = 8192
"""Maps with more outputs than this have no Fisher matrix gathered unless it is asked for."""


@dataclass
class _Known:
    """What was gathered of one model: by value, parameter, or branch and layer."""

    second: dict[str, Moments] = field(default_factory=dict[str, Moments])
    norms: dict[str, Moments] = field(default_factory=dict[str, Moments])
    gradients: dict[str, Gradients] = field(default_factory=dict[str, Gradients])
    fisher: dict[str, Fisher] = field(default_factory=dict[str, Fisher])
    similarity: dict[str, float] = field(default_factory=dict[str, float])
    routing: dict[str, Routing] = field(default_factory=dict[str, Routing])
    streams: list[torch.Tensor] = field(default_factory=list[torch.Tensor])

    def of(self, values: Collection[str]) -> _Known:
        """Returns what is known of some values, and nothing of parameters or branches."""
        return _Known(
            {n: found for n, found in self.second.items() if n in values},
            {n: found for n, found in self.norms.items() if n in values},
            fisher={n: found for n, found in self.fisher.items() if n in values},
        )


class Gathered:
    """A model on calibration windows, as the protocol `Calibration` describes it.

    Args:
        axes: of the model.
        get: its weights in fp32.
        windows: token ids [samples, length].
        device: `cpu`, `cuda`, or `auto`: a GPU where there is one.
        offload: a folder where states between pieces are kept, so that windows and layers without
            number need no more memory; they stay in memory without it.
        loss_windows: how many windows the loss is taken over; all without it.
        gradient_windows: how many windows the loss's gradients are taken on, with what is gathered
            on the same walk; it costs three times what a walk forwards does.
        notes: gets what there is to say to the user.
        tokens: how many go through a piece at a time, rounded to whole windows.
    """

    def __init__(
        self,
        axes: Axes,
        get: Get,
        windows: Windows,
        *,
        device: str = "cpu",
        offload: Path | None = None,
        loss_windows: int | None = None,
        gradient_windows: int = GRADIENT_WINDOWS,
        notes: list[str] | None = None,
        tokens: int = TOKENS,
    ) -> None:
        self.axes, self.get, self.windows = axes, get, windows
        if device != "cpu":
            from surgeon.runtime.device import choose_torch_device

            device = choose_torch_device(device).name
        self.machine = Machine(join(device), offload, tokens)
        every = torch.from_numpy(windows.ids)
        self.ids = self.machine.world.share(every)
        self.loss_ids = self.machine.world.share(every[:loss_windows])
        self.gradient_ids = self.machine.world.share(every[:gradient_windows])
        self.trial_ids = self.machine.world.share(every[-TRIAL_WINDOWS:])
        self._gradient_tokens = every[:gradient_windows].numel()
        self.notes = [] if notes is None else notes
        self.dense: Mapping[str, torch.Tensor] = {}
        self.pruned: Mapping[str, torch.Tensor] = {}
        self._known = _Known()
        self._expected: frozenset[str] = frozenset()
        self._maps = contractions(axes.program)

    # --- between passes --------------------------------------------------------------------------

    def with_rewrites(
        self, rewrites: Mapping[str, torch.Tensor], *, dense: bool, exact: bool = False
    ) -> Gathered:
        """Returns the same data on a model in which some tensors are replaced.

        Args:
            rewrites: full-size tensors by parameter.
            dense: replace them in the dense model too: what is known of it is then gathered anew.
                Without it they hold in the pruned model alone.
            exact: the dense model computes what it did, as after a change of basis: what is known
                of values that can't have changed is kept.
        """
        made = copy(self)
        made.pruned = {**self.pruned, **rewrites}
        if dense and rewrites:
            made.dense = {**self.dense, **rewrites}
            same = unchanged(segments(self.axes.program), rewrites) if exact else frozenset[str]()
            made._known = self._known.of(same)
        return made

    def expect(self, needs: Iterable[str]) -> None:
        """Hears what passes will ask for, by their `needs`, so that one walk can gather it.

        What none of them needs is let go: matrices by the hundred, on top of which others train.
        """
        self._expected = frozenset(needs)
        if self._expected.isdisjoint(("activations: second moment", "activations: norms")):
            self._known.second.clear()
        if "gradients: outputs" not in self._expected:
            self._known.fisher.clear()
        if "gradients: weights" not in self._expected:
            self._known.gradients.clear()

    def read(self, name: str) -> torch.Tensor:
        """Returns a parameter of the dense model, fp32."""
        return _fp32(rewritten(self.get, self.dense)(name))

    # --- what passes ask for ---------------------------------------------------------------------

    def moments(self, params: Sequence[str], *, full: bool = True) -> Mapping[str, Moments]:
        """Returns the moments of these parameters' inputs in the dense model.

        Args:
            params: parameters that something is multiplied with.
            full: with the products between channels.

        Raises:
            SurgeonError: `bad-option` for one that nothing is multiplied with.
        """
        values = {name: [c.value for c in self._uses(name)] for name in params}
        known = self._moments(values, params, full)
        return {name: together([known[v] for v in found]) for name, found in values.items()}

    def outputs(self, params: Sequence[str], *, full: bool = False) -> Mapping[str, Moments]:
        """Returns the moments of what these maps make, in the dense model."""
        values = {name: [c.out for c in self._uses(name)] for name in params}
        known = self._moments(values, (), full)
        return {name: together([known[v] for v in found]) for name, found in values.items()}

    def values(self, names: Sequence[str], *, full: bool = False) -> Mapping[str, Moments]:
        """Returns the moments of values of the program, such as what a normaliser reads.

        Raises:
            SurgeonError: `bad-option` for what no operation makes, or has no fixed width.
        """
        for name in names:
            shape = self.axes.program.types[name].shape if name in self._made else ()
            if not shape or not isinstance(shape[-1], int):
                raise _unknown(name, "no operation makes a value of that name and a fixed width")
        known = self._moments({name: [name] for name in names}, (), full)
        return {name: known[name] for name in names}

    def gradients(self, params: Sequence[str]) -> Mapping[str, Gradients]:
        """Returns the loss's gradients with respect to these parameters; see `Gradients`."""
        missing = [name for name in dict.fromkeys(params) if name not in self._known.gradients]
        if missing:
            # Every gradient takes as much room as its parameter: none but those asked for.
            self._there_and_back(missing, ())
        return {name: self._known.gradients[name] for name in params}

    def fisher(self, params: Sequence[str]) -> Mapping[str, Fisher]:
        """Returns the second moments of the loss's gradients at what these maps make."""
        values = {name: [c.out for c in self._uses(name)] for name in params}
        missing = {v for found in values.values() for v in found} - self._known.fisher.keys()
        if missing:
            asked = Asked()
            if "activations: second moment" in self._expected:
                asked = Asked(frozenset(self._inputs(params) - self._known.second.keys()))
            self._there_and_back((), self._outputs(params, missing), asked)
        known = self._known.fisher
        return {n: _averaged([known[v] for v in found]) for n, found in values.items()}

    def similarity(self, branches: Sequence[str]) -> Mapping[str, float]:
        """Returns the mean cosine of the residual stream before and after branches or layers.

        Reference: Men et al., ShortGPT, 2024, eq. 1: block influence is one less this.

        Raises:
            SurgeonError: `bad-option` for what is no branch, and no layer (by its module path).
        """
        every = spans(self.axes.program, self.axes.branches)
        for name in branches:
            if name not in every:
                raise _unknown(name, near(name, every))
        if any(name not in self._known.similarity for name in branches):
            self._forward(Asked(spans=every))
        return {name: self._known.similarity[name] for name in branches}

    def routing(self) -> Mapping[str, Routing]:
        """Returns how experts were used, by the value that tells where tokens are sent."""
        found = routes(self.axes.program)
        if found and not self._known.routing:
            self._forward(Asked(routes=found))
        return dict(self._known.routing)

    def loss(self, plan: Plan, rewrites: Mapping[str, Any] | None = None) -> float:
        """Returns the masked model's mean negative log-likelihood of a predicted token, in nats.

        Args:
            plan: what is masked.
            rewrites: tensors that replace those of the pruned model before they are masked.
        """
        now = rewritten(self.get, {**self.pruned, **(rewrites or {})})
        mask, change = self._masking(plan)
        machine, program = self.machine, self.axes.program
        return mean_loss(
            program, lambda n: mask(n, _fp32(now(n))), self.loss_ids, machine, change=change
        )

    def divergences(
        self, trials: Iterable[tuple[Plan, Callable[[str], Any]]]
    ) -> tuple[Divergence, ...]:
        """Returns how far the dense model's predictions move under each of several plans.

        Args:
            trials: what is masked, and what gives the tensor that replaces a parameter before it
                is masked, or None; it is called when the parameter is read.
        """
        machine, program = self.machine, self.axes.program
        made = [self._trial(plan, new) for plan, new in trials]
        return divergences(program, self.read, made, self.trial_ids, machine)

    def _trial(self, plan: Plan, replaced: Callable[[str], Any]) -> Trial:
        mask, change = self._masking(plan)
        selection, silent = Selection(self.axes, plan), dropped(self.axes, plan)
        names = (p.name for p in self.axes.program.params)
        touched = {n for n in names if any(k is not None for k in selection.kept(n))}

        def get(name: str) -> torch.Tensor:
            found = replaced(name) if name in touched else None
            return mask(name, self.read(name) if found is None else _fp32(found))

        return Trial(get, frozenset(touched | set(silent)), change)

    def sequential(
        self,
        plan: Plan,
        params: Sequence[str],
        solve: Solve,
        *,
        cross: bool = True,
        hold_out: float = 0.0,
    ) -> Mapping[str, Any]:
        """Returns the parameters solved for, each on what those before it produce.

        Args:
            plan: what is removed.
            params: to solve for.
            solve: from a name and a `Pair` to the tensor that replaces the parameter.
            cross: as `surgeon.calibrate.sequential` describes it.
            hold_out: share of the windows that takes no part: the last ones.

        Raises:
            SurgeonError: `bad-option` where a share of the windows would be none, or all.
        """
        mask, change = self._masking(plan)
        now = rewritten(self.get, self.pruned)
        # Who distils afterwards wants the dense stream at the head, which this walk comes by.
        distils = "activations: distillation" in self._expected and not hold_out
        streams: list[torch.Tensor] | None = [] if distils else None
        found = sequential(
            self.axes.program,
            self.read,
            lambda name: _fp32(now(name)),
            mask,
            self._parted(hold_out)[0],
            params,
            solve,
            self.machine,
            change=change,
            cross=cross,
            streams=streams,
        )
        self._known.streams = streams or self._known.streams
        return found

    def distilled(
        self, plan: Plan, *, rate: float, epochs: float, windows: int, hold_out: float = 0.0
    ) -> tuple[Mapping[str, Any], tuple[float, ...]]:
        """Returns maps with gains in their rows and columns, learnt from the dense model.

        Args:
            plan: what is removed; the smaller model is what learns.
            rate: Adam's largest step size.
            epochs: times that every window is seen.
            windows: in a step.
            hold_out: share of the windows that is learnt from, the last ones; 0 for all of them.

        Returns:
            The tensors in full size, and the divergence from the dense model at every step, nats.

        Raises:
            SurgeonError: `bad-option` where a share of the windows would be none, or all.
        """
        program, ids = self.axes.program, self._parted(hold_out)[1]
        streams = [] if hold_out else self._known.streams
        streams = streams or streams_of(program, self.read, ids, self.machine)
        if not hold_out:
            self._known.streams = streams
        now = rewritten(self.get, self.pruned)
        return distilled(
            self.axes,
            plan,
            self.read,
            lambda name: _fp32(now(name)),
            streams,
            ids,
            Schedule(rate, epochs, windows),
            self.machine,
        )

    # --- how it is gathered ----------------------------------------------------------------------

    def _parted(self, hold_out: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns this process's windows but the last ones, and those; without a share, all."""
        every, world = torch.from_numpy(self.windows.ids), self.machine.world
        if not hold_out:
            return self.ids, self.ids
        first = len(every) - round(hold_out * len(every))
        if not 0 < first < len(every):
            raise SurgeonError(
                Code.BAD_OPTION,
                "the calibration windows can't be parted",
                at=f"hold_out: {hold_out:g}",
                why=f"of {len(every)} windows that leaves {first} and {len(every) - first}",
                try_="more windows (--samples), or hold_out: 0 to use all of them twice",
            )
        return world.share(every[:first]), world.share(every[first:])

    @property
    def _made(self) -> Mapping[str, int]:
        return self.axes.program.producer

    def _uses(self, param: str) -> list[Contraction]:
        found = [c for c in self._maps if c.param == param]
        if not found:
            raise _unknown(param, "nothing is multiplied with a parameter of that name")
        return found

    def _masking(
        self, plan: Plan
    ) -> tuple[Callable[[str, torch.Tensor], torch.Tensor], Change | None]:
        """Returns what masks parameters, and normalisers that see kept channels only."""
        selection = Selection(self.axes, plan)
        silent = dropped(self.axes, plan)

        def mask(name: str, tensor: torch.Tensor) -> torch.Tensor:
            # A branch whose every parameter is zero adds nothing: that is what dropping it does.
            return torch.zeros_like(tensor) if name in silent else masked(selection, name, tensor)

        return mask, lambda where: kept_only(self.axes, selection, where)

    def _moments(
        self, values: Mapping[str, Sequence[str]], params: Sequence[str], full: bool
    ) -> Mapping[str, Moments]:
        """Returns moments by value, gathered where they aren't known."""
        known = self._known
        wanted = {v for found in values.values() for v in found}
        have = known.second if full else {**known.norms, **known.second}
        missing = wanted - have.keys()
        if missing:
            # One walk gives all: a caller that asks for one layer will ask for the next.
            more = self._inputs(params) if full else {c.value for c in self._maps}
            values_ = frozenset(missing | ((more if params else set()) - have.keys()))
            self._gather(Asked(second=values_) if full else Asked(norms=values_), params)
            have = known.second if full else {**known.norms, **known.second}
        return have

    def _gather(self, asked: Asked, params: Sequence[str]) -> None:
        """Gathers what is asked for, there and back if gradients are going to be asked for too."""
        made = {c.out for c in self._maps if c.param in params}
        if "gradients: outputs" in self._expected and made - self._known.fisher.keys():
            narrow = [v for v in self._outputs(params, made) if self._width(v) <= WIDEST]
            self._there_and_back((), narrow, asked)
        else:
            self._forward(asked)

    def _also(self, asked: Asked) -> Asked:
        """Adds what was announced and costs next to nothing."""
        spanned = "activations: similarity" in self._expected and not self._known.similarity
        if spanned and not asked.spans:
            asked = replace(asked, spans=spans(self.axes.program, self.axes.branches))
        if "activations: norms" in self._expected and not self._known.norms:
            every = {c.value for c in self._maps} - self._known.second.keys()
            asked = replace(asked, norms=asked.norms | every)
        return asked

    def _forward(self, asked: Asked) -> None:
        asked = self._also(asked)
        ids, tokens = self.ids, self.windows.ids.size
        if "gradients: outputs" in self._expected:
            # As what is gathered on the walk with gradients: all of it describes the same windows.
            ids, tokens = self.gradient_ids, self._gradient_tokens
        self._check_enough(asked.second, tokens)
        for _, seen in walk(self.axes.program, self.read, ids, asked, self.machine):
            self._keep(asked, seen.moments, seen.similarity)
            self._known.routing.update(seen.routing)

    def _there_and_back(
        self, params: Sequence[str], outputs: Sequence[str], asked: Asked | None = None
    ) -> None:
        asked = self._also(asked or Asked())
        self._check_enough(asked.second, self._gradient_tokens)
        found = there_and_back(
            self.axes.program,
            self.read,
            self.gradient_ids,
            params=params,
            outputs=outputs,
            asked=asked,
            machine=self.machine,
        )
        self._known.gradients.update(found.gradients)
        self._known.fisher.update(found.fisher)
        self._keep(asked, found.seen.moments, found.seen.similarity)

    def _keep(
        self, asked: Asked, moments: Mapping[str, Moments], similarity: Mapping[str, float]
    ) -> None:
        for name, found in moments.items():
            (self._known.second if name in asked.second else self._known.norms)[name] = found
        self._known.similarity.update(similarity)

    def _inputs(self, params: Sequence[str]) -> set[str]:
        """Returns the values whose second moments are gathered when those of `params` are.

        They are the inputs of every map that is summed over an axis of the same role, and of
        others, narrow ones first, while they take little room.
        """
        roles: dict[str, set[str]] = {}
        for axis in self.axes.axes:
            for consumer in consumers(self.axes, axis):
                roles.setdefault(axis.role, set()).add(consumer.param)
        like = {n for names in roles.values() if names & set(params) for n in names}
        return self._with_room({c.value for c in self._maps if c.param in like}, "value")

    def _outputs(self, params: Sequence[str], missing: set[str]) -> list[str]:
        """Returns the values whose gradients' second moments are gathered with those missing."""
        widest = max(self._width(v) for v in missing)
        extra = self._inputs(params)
        like = {c.out for c in self._maps if c.value in extra and self._width(c.out) <= widest}
        found = self._with_room(missing | like, "out") - self._known.fisher.keys()
        return [c.out for c in self._maps if c.out in found]

    def _with_room(self, values: set[str], which: str) -> set[str]:
        """Adds inputs (`value`) or outputs (`out`) of maps while they take little room."""
        found, room = set(values), EXTRA_BYTES
        others = {getattr(c, which): None for c in self._maps}
        for width in sorted({self._width(v) for v in others}):
            # All of a width or none: a caller goes through layers that are alike.
            more = [v for v in others if self._width(v) == width and v not in found]
            room -= 8 * width**2 * len(more)
            if room < 0:
                break
            found.update(more)
        return found

    def _width(self, value: str) -> int:
        return int(self.axes.program.types[value].shape[-1])

    def _check_enough(self, values: Iterable[str], tokens: int) -> None:
        """Notes second moments that have more dimensions than there are tokens in their walk."""
        widest = max((self._width(v) for v in values), default=0)
        note = (
            f"calibration: {tokens:,} tokens are too few for second moments of {widest:,} channels,"
            " which will be singular; give more --samples"
        )
        if widest > tokens and note not in self.notes:
            self.notes.append(note)


def _fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _averaged(found: Sequence[Fisher]) -> Fisher:
    """Returns the mean over the uses of one map."""
    if len(found) == 1:
        return found[0]
    count = sum(f.count for f in found)
    total = torch.stack([f.second * (f.count / count) for f in found]).sum(0)
    return Fisher(count, total)


def _unknown(name: str, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        f"there are no statistics of {name}",
        at=name,
        why=why,
        try_="names of the captured program: see 'surgeon ir' and 'surgeon inspect'",
    )
