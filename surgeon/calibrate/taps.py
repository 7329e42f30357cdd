"""What is read off while a program runs piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from surgeon.calibrate.moments import Moments, Sums
from surgeon.calibrate.parallel import World
from surgeon.calibrate.routing import Route, Routing, Uses
from surgeon.calibrate.running import not_finite
from surgeon.calibrate.segments import Segment
from surgeon.calibrate.similarity import Cosine, Span


@dataclass(frozen=True)
class Asked:
    """What a walk is to gather on its way forward.

    Attributes:
        second: values whose moments are asked for whole.
        norms: values whose moments are asked for without products between channels.
        spans: stretches of the residual stream, by branch or layer.
        routes: mixtures of experts, by the value that tells where tokens are sent.
    """

    second: frozenset[str] = frozenset()
    norms: frozenset[str] = frozenset()
    spans: Mapping[str, Span] = field(default_factory=dict[str, Span])
    routes: Mapping[str, Route] = field(default_factory=dict[str, Route])

    def __bool__(self) -> bool:
        return bool(self.second or self.norms or self.spans or self.routes)


@dataclass(frozen=True)
class Seen:
    """What was read off: moments by value, cosines by branch or layer, uses of experts."""

    moments: Mapping[str, Moments]
    similarity: Mapping[str, float]
    routing: Mapping[str, Routing] = field(default_factory=dict[str, Routing])


class Taps:
    """What is read off one piece.

    Attributes:
        values: those that the piece must give.
    """

    def __init__(
        self,
        piece: Segment,
        own: Iterable[str],
        asked: Asked,
        held: Held,
        crossing: Collection[str],
    ) -> None:
        self._held = held
        self._sums = {
            name: Sums(_width(piece, name), name in asked.second)
            for name in own
            if name in asked.second or name in asked.norms
        }
        here = {*piece.program.producer, *([piece.given] if piece.given else [])}
        self._begin = {n: s for n, s in asked.spans.items() if s.before in set(own)}
        self._end = {n: s for n, s in asked.spans.items() if s.after in set(own)}
        # A stretch that begins and ends here needs nothing held, nor one that begins with what the
        # piece in which it ends is given.
        self._begin = {n: s for n, s in self._begin.items() if n not in self._end and n in crossing}
        self._within = {n for n, s in self._end.items() if s.before is None or s.before in here}
        self._cosines = {name: Cosine() for name in self._end}
        self._routes = {n: r for n, r in asked.routes.items() if r.added in set(own)}
        self._uses = {n: Uses(_width(piece, r.sent)) for n, r in self._routes.items()}
        wanted = [*self._sums, *(s.before for s in self._begin.values())]
        for name, s in self._end.items():
            wanted += [s.after, s.part, *([s.before] if name in self._within else [])]
        wanted += [v for r in self._routes.values() for v in (r.sent, r.added)]
        self.values = tuple(dict.fromkeys(v for v in wanted if v is not None))

    def add(self, batch: int, found: Sequence[torch.Tensor]) -> None:
        """Takes these values of a batch, in the order of `values`."""
        by_name = dict(zip(self.values, found, strict=True))
        for name, sums in self._sums.items():
            sums.add(by_name[name])
        for name, route in self._routes.items():
            self._uses[name].add(by_name[route.sent], by_name[route.added])
        for name, span in self._begin.items():
            assert span.before is not None
            self._held[name, batch] = by_name[span.before].detach().cpu()
        for name, span in self._end.items():
            after = by_name[span.after]
            if name not in self._within:
                before = self._held.pop((name, batch)).to(after.device)
            elif span.before is not None:
                before = by_name[span.before]
            else:
                assert span.part is not None
                before = after - by_name[span.part]
            self._cosines[name].add(before, after)

    def rest(self) -> None:
        """Keeps what there is so far in memory, not on the device."""
        for sums in self._sums.values():
            sums.to("cpu")

    def done(self, world: World) -> Seen:
        """Returns what was read off, over the windows of all processes.

        Raises:
            SurgeonError: `bad-text-input` where it is not finite.
        """
        moments = {name: sums.done(world) for name, sums in self._sums.items()}
        for name, m in moments.items():
            if not bool(torch.isfinite(m.square).all()):
                raise not_finite(f"value %{name}")
        similarity = {name: c.done(world) for name, c in self._cosines.items()}
        return Seen(moments, similarity, {n: u.done(world) for n, u in self._uses.items()})


Held = dict[tuple[str, int], torch.Tensor]
"""Where a stretch over several pieces begins: by its name and the batch."""


def taps(pieces: Sequence[Segment], asked: Asked) -> list[Taps]:
    """Returns what is read off each piece; a value that several make is taken from the first."""
    held: Held = {}
    taken: set[str] = set()
    owned: list[list[str]] = []
    for piece in pieces:
        owned.append([name for name in piece.program.producer if name not in taken])
        taken.update(owned[-1])
    ends = {name: p for p, own in zip(pieces, owned, strict=True) for name in own}
    crossing = {
        name
        for name, span in asked.spans.items()
        if span.after in ends and ends[span.after].given != span.before
    }
    return [Taps(p, own, asked, held, crossing) for p, own in zip(pieces, owned, strict=True)]


def _width(piece: Segment, value: str) -> int:
    width = piece.program.types[value].shape[-1]
    assert isinstance(width, int), "the last dimension of what a map reads or makes is fixed"
    return width
