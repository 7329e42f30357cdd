"""What passes ask of calibration data: gathered when it is asked for, and once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from surgeon.axes.consumers import consumers
from surgeon.axes.contractions import Contraction, contractions
from surgeon.calibrate.gradients import Fisher, Gradients, there_and_back
from surgeon.calibrate.moments import Moments, together
from surgeon.calibrate.routing import Routing, routes
from surgeon.calibrate.similarity import spans
from surgeon.calibrate.smaller import TRIAL_WINDOWS, OnData
from surgeon.calibrate.statistics import walk
from surgeon.calibrate.taps import Asked
from surgeon.errors import Code, SurgeonError, near
from surgeon.memory import give_back

EXTRA_BYTES = 2**30
"""What is gathered besides what is asked for, as it will be asked for next, may take so much."""

TOKENS_A_CHANNEL = 16
"""Tokens for each channel of a second moment that is let go soon. For a change of basis, which is
exact whatever it is, some thousand tokens are as good as all."""


@dataclass
class _Known:
    """What was gathered of one model: by value, parameter, or branch and layer."""

    second: dict[str, Moments] = field(default_factory=dict[str, Moments])
    norms: dict[str, Moments] = field(default_factory=dict[str, Moments])
    gradients: dict[str, Gradients] = field(default_factory=dict[str, Gradients])
    fisher: dict[str, Fisher] = field(default_factory=dict[str, Fisher])
    similarity: dict[str, float] = field(default_factory=dict[str, float])
    routing: dict[str, Routing] = field(default_factory=dict[str, Routing])


class Gathered(OnData):
    """A model on calibration windows, as the protocol `Calibration` describes it."""

    @cached_property
    def _known(self) -> _Known:
        return _Known()

    @cached_property
    def _maps(self) -> tuple[Contraction, ...]:
        return contractions(self.axes.program)

    # --- between passes --------------------------------------------------------------------------

    def with_rewrites(self, rewrites: Mapping[str, torch.Tensor], *, dense: bool) -> Gathered:
        """Returns the same data on a model in which some tensors are replaced.

        Args:
            rewrites: full-size tensors by parameter.
            dense: replace them in the dense model too: what is known of it is then gathered anew.
                Without it they hold in the pruned model alone.
        """
        made = copy(self)
        made.pruned = {**self.pruned, **rewrites}
        if self._without is not None and rewrites.keys() != self._without.names:
            made._without = None  # it is of a model that other passes have changed since
        if dense and rewrites:
            made._streams = {}
            made.dense = {**self.dense, **rewrites}
            made._known = _Known()
        return made

    def expect(self, needs: Iterable[str], *, brief: bool = False) -> None:
        """Hears what passes will ask for, by their `needs`, so that one walk can gather it.

        What none of them needs is let go: matrices by the hundred, on top of which others train.

        Args:
            needs: of all passes that will look at this model.
            brief: it is replaced by another as soon as it was looked at once.
        """
        self._expected, self._brief = frozenset(needs), brief
        if self._expected.isdisjoint(("activations: second moment", "activations: norms")):
            self._known.second.clear()
        if "gradients: outputs" not in self._expected:
            self._known.fisher.clear()
        if "gradients: weights" not in self._expected:
            self._known.gradients.clear()
        give_back()

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
            self._there_and_back((), self._outputs(params, missing))
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

    # --- how it is gathered ----------------------------------------------------------------------

    @property
    def _made(self) -> Mapping[str, int]:
        return self.axes.program.producer

    def _uses(self, param: str) -> list[Contraction]:
        found = [c for c in self._maps if c.param == param]
        if not found:
            raise _unknown(param, "nothing is multiplied with a parameter of that name")
        return found

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
            if params:
                missing |= self._alike(params, full) - have.keys()
            values_ = frozenset(missing)
            self._forward(Asked(second=values_) if full else Asked(norms=values_))
            have = known.second if full else {**known.norms, **known.second}
        return have

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
        asked, known = self._also(asked), self._known
        windows = self._looked_at(asked)
        self._check_enough(asked.second, windows.numel())
        ids = self.machine.world.share(windows)
        for _, seen in walk(self.axes.program, self.read, ids, asked, self.machine):
            for name, found in seen.moments.items():
                (known.second if name in asked.second else known.norms)[name] = found
            known.similarity.update(seen.similarity)
            known.routing.update(seen.routing)

    def _looked_at(self, asked: Asked) -> torch.Tensor:
        """Returns the windows that statistics are gathered on."""
        every = torch.from_numpy(self.windows.ids)
        if "loss: divergence" in self._expected and len(every) > TRIAL_WINDOWS:
            every = every[:-TRIAL_WINDOWS]
        if self._brief and asked.second:
            wanted = TOKENS_A_CHANNEL * max(self._width(v) for v in asked.second)
            every = every[: math.ceil(wanted / every.shape[1])]
        return every

    def _there_and_back(self, params: Sequence[str], outputs: Sequence[str]) -> None:
        program, known = self.axes.program, self._known
        gradients, fisher = there_and_back(
            program,
            self.read,
            self.gradient_ids,
            params=params,
            outputs=outputs,
            machine=self.machine,
        )
        known.gradients.update(gradients)
        known.fisher.update(fisher)

    def _alike(self, params: Sequence[str], full: bool) -> set[str]:
        """Returns the values whose moments are gathered when those of `params` are."""
        if self._brief:
            return self._of_role(params)
        return self._inputs(params) if full else {c.value for c in self._maps}

    def _of_role(self, params: Sequence[str]) -> set[str]:
        """Returns the inputs of every map that is summed over an axis of the same role."""
        roles: dict[str, set[str]] = {}
        for axis in self.axes.axes:
            for consumer in consumers(self.axes, axis):
                roles.setdefault(axis.role, set()).add(consumer.param)
        like = {n for names in roles.values() if names & set(params) for n in names}
        return {c.value for c in self._maps if c.param in like}

    def _inputs(self, params: Sequence[str]) -> set[str]:
        """Returns those inputs, and those of other maps, narrow ones first, while there is room.

        Who asks for all of a role at once knows what he wants, and is given no more.
        """
        alike = self._of_role(params)
        return alike if self._whole(params) else self._with_room(alike, "value")

    def _whole(self, params: Sequence[str]) -> bool:
        """Tells whether all maps of a role, or several, are asked for at once."""
        alike = self._of_role(params)
        return bool(alike) and alike <= {c.value for c in self._maps if c.param in params}

    def _outputs(self, params: Sequence[str], missing: set[str]) -> list[str]:
        """Returns the values whose gradients' second moments are gathered with those missing."""
        widest = max(self._width(v) for v in missing)
        extra = self._inputs(params)
        like = {c.out for c in self._maps if c.value in extra and self._width(c.out) <= widest}
        every = missing | like if self._whole(params) else self._with_room(missing | like, "out")
        found = every - self._known.fisher.keys()
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
