"""Rotates the residual stream into its principal components, largest first.

Every map that writes to the stream gets the rotation, every map that reads it the inverse. The
scale of a norm doesn't commute with a rotation, so it first becomes part of the maps behind that
norm; what divides by the root mean square doesn't notice. One rotation serves the whole model: that
of the second moment of what the norms see, each of them counted alike. The last channels then carry
least, and `hidden` can be cut there.

Reference: Ashkboos et al., SliceGPT: Compress Large Language Models by Deleting Rows and Columns,
2024 (with a rotation per layer, for which residual connections need further matrices).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from passes.transform._basis import Changed, flat, open_to_change
from surgeon.plugin import Axis, Context, Gauge, TransformPass, limit, scales
from surgeon.plugin import consumers as consumers_of
from surgeon.plugin import producers as producers_of


@dataclass(frozen=True)
class RotateHidden(TransformPass):
    """One rotation of the residual width, where every use of it allows one."""

    needs: ClassVar[frozenset[str]] = frozenset({"weights", "activations: second moment"})
    exact: ClassVar[bool] = True

    def transform(self, context: Context) -> Mapping[str, Any]:
        """Returns every map that reads or writes the residual stream, and scales of one.

        Raises:
            SurgeonError: `bad-option` with the operation that allows no rotation, such as a head
                tied to the embedding, LayerNorm, or a norm behind a branch.
        """
        changed = Changed(context.weights)
        wide = [axis for axis in open_to_change(context) if axis.role == "hidden"]
        if not wide:
            raise context.unable("hidden", "no residual width is free to be changed")
        for axis in wide:
            reason = limit(context.axes, axis, Gauge.ROTATION)
            if reason:
                raise context.unable(axis.name, f"{reason.why} ({reason.where})")
            self._rotate(context, changed, axis)
        return changed.found

    def _rotate(self, context: Context, changed: Changed, axis: Axis) -> None:
        import torch

        made, read = producers_of(context.axes, axis), consumers_of(context.axes, axis)
        norms = scales(context.axes, axis)
        places = {(p.param, p.dim): flat(p.groups) for p in (*made, *read)}
        places |= {(p.bias, 0): flat(p.groups) for p in made if p.bias}
        others = {(m.param, m.dim) for m in axis.members} - {(n.param, 0) for n in norms}
        others -= places.keys()
        if others:
            why = f"{min(others)[0]} is neither a map nor a scale that can become part of one"
            raise context.unable(axis.name, why)
        dims = {consumer.param: consumer.dim for consumer in read}
        total = torch.zeros(axis.size, axis.size, dtype=torch.float64)
        scaled = {name for norm in norms for name in norm.readers}
        whole = torch.ones(axis.size, dtype=torch.float64)
        seen = [(norm.readers[0], changed.read(norm.param)) for norm in norms]
        seen += [(c.param, whole) for c in read if c.param not in scaled]
        moments = context.moments([name for name, _ in seen])
        for name, scale in seen:
            where = torch.from_numpy(places[name, dims[name]])[0].T
            second = moments[name].second.double()
            second = sum(second[p][:, p] for p in where)
            # A scale of zero hides its channel; the other norms have to say what is in it.
            undone = torch.where(scale == 0, 0.0, 1 / scale)
            second = undone[:, None] * second * undone
            total += second / second.trace().clamp(min=1e-30)
        for norm in norms:
            scale = changed.read(norm.param)
            for name in norm.readers:
                changed.along(name, dims[name], places[name, dims[name]], torch.diag(scale)[None])
            changed.found[norm.param] = torch.ones_like(scale).float()
        turn = torch.linalg.eigh(total).eigenvectors.flip(-1).mT[None]
        for (name, dim), groups in places.items():
            changed.along(name, dim, groups, turn)
