"""Makes key/value heads fewer, with all query heads left: multi-head to grouped-query attention.

Neighbouring key/value heads become one, which the query heads of all of them share; the cache
shrinks with it. By the mean of their weights, or so that what is lost is least: the values of a
group's g heads, of width d, are g·d numbers a token, and the d that tell most of them are their
principal components, weighed by what the output projection makes of them. With encoder E and
decoder D, heads of one group get E times their value maps, and every query head's output map is
multiplied with its head's part of D. Keys that are turned by rotary embedding are complex numbers,
one a pair, and what commutes with turning them is a complex factor: the g numbers of a pair become
the one that tells most of them, weighed by the queries that meet them, and each query takes over
its head's factor. Where a norm or another operation stands in between, keys take the mean.

Reference: Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints, 2023 (the mean); Jin et al., Align Attention Heads Before Merging Them, 2024 (changes
of basis that rotary embedding and values allow); Eckart and Young, 1936.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from passes.transform._basis import shared
from surgeon.plugin import (
    Axes,
    Axis,
    Context,
    Gauge,
    TransformPass,
    consumers,
    grouping,
    grouping_obstacles,
    places,
    producers,
    query_heads,
)


@dataclass(frozen=True)
class GroupHeads(TransformPass):
    """Fewer key/value heads, each shared by more query heads."""

    exact: ClassVar[bool] = False
    groups: ClassVar[bool] = True

    kv_heads: int | None = None
    """How many stay in every layer, a divisor of what there are; without it, the largest."""

    by: Literal["calibrated", "mean"] = "calibrated"
    """Whether bases are chosen so that least is lost on calibration data, or weights averaged."""

    def __post_init__(self) -> None:
        """Refuses options that mean nothing."""
        if self.kv_heads is not None and self.kv_heads < 1:
            raise ValueError(f"kv_heads is {self.kv_heads}, it has to be 1 or more")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What bases are chosen by."""
        found = {"weights"}
        if self.by == "calibrated":
            found.add("activations: second moment")
        return frozenset(found)

    def grouped(self, axes: Axes) -> Mapping[str, int]:
        """Returns by axis of key/value heads how many of them stay."""
        return {axis.name: self._count(axis) for axis in self._axes(axes)}

    def _axes(self, axes: Axes) -> list[Axis]:
        return [a for a in axes.of_role("kv_heads") if self._count(a) < a.size]

    def _count(self, axis: Axis) -> int:
        if self.kv_heads is not None:
            return self.kv_heads
        return next((n for n in range(axis.size // 2, 0, -1) if axis.size % n == 0), 1)

    def transform(self, context: Context) -> Mapping[str, Any]:
        """Returns the maps around every attention whose heads are grouped.

        Raises:
            SurgeonError: `bad-option` where no heads can be, or not to that number.
        """
        found = self._axes(context.axes)
        self._check(context, found)
        made = _Made(context, self.by == "calibrated")
        for axis in found:
            made.group(axis, self._count(axis))
        return made.tensors

    def _check(self, context: Context, found: Sequence[Axis]) -> None:
        every = context.axes.of_role("kv_heads")
        for axis in every:
            count = self._count(axis)
            if count > axis.size or axis.size % count:
                why = f"its {axis.size} heads don't make {count} groups of one size"
                raise context.unable(axis.name, why)
            for reason in grouping_obstacles(context.axes, axis, grouping(axis, count)):
                raise context.unable(axis.name, reason.why)
        if not found:
            raise context.unable(
                "the attention",
                "there are no key/value heads left to group"
                if every
                else "none of its operations tells query heads from key/value heads",
            )


@dataclass
class _Maps:
    """The maps of one attention's heads on one of its channel axes.

    Attributes:
        param: the weight.
        dim: the dimension that has the heads.
        at: [heads, channels] by appearance: two where the channels are pairs.
        bias: what the map adds.
    """

    param: str
    dim: int
    at: list[Any]
    bias: str | None


class _Made:
    """Tensors in the making."""

    def __init__(self, context: Context, calibrated: bool) -> None:
        self.context, self.calibrated = context, calibrated
        self.tensors: dict[str, Any] = {}
        self.done: set[tuple[str, int]] = set()

    def read(self, param: str) -> Any:
        if param not in self.tensors:
            self.tensors[param] = self.context.weights(param).clone()
        return self.tensors[param]

    def group(self, axis: Axis, count: int) -> None:
        """Makes the heads of every group alike, and their query heads follow."""
        axes = self.context.axes
        queries = query_heads(axes, axis)
        dims = set(axis.members)
        channels = [a for a in axes.axes if dims & set(a.members) and a != axis]
        for channel in channels:
            made = self._maps(producers(axes, channel), axis, channel)
            if not made:
                continue
            asked = [m for q in queries for m in self._maps(producers(axes, channel), q, channel)]
            read = [m for q in queries for m in self._maps(consumers(axes, channel), q, channel)]
            self._shared([*made, *asked, *read])
            if self.calibrated and channel.gauge is Gauge.ANY and read and not asked:
                self._values(axis, count, made, read)
            elif (
                self.calibrated
                and channel.gauge is Gauge.PAIRWISE
                and asked
                and all(len(m.at) == 2 for m in (*made, *asked))
            ):
                self._pairs(axis, count, made, asked)
            else:
                self._mean(axis, count, made)
        self._whole(axis)

    def _maps(self, found: Sequence[Any], heads: Axis, channel: Axis) -> list[_Maps]:
        out = [
            _Maps(f.param, f.dim, places(self.context.axes, heads, channel, f.param, f.dim), f.bias)
            for f in found
        ]
        return [m for m in out if m.at]

    def _shared(self, maps: Sequence[_Maps]) -> None:
        several = shared(self.context, [m.param for m in maps])
        if several:
            raise self.context.unable(several, "it is used in several places")

    def _rows(self, m: _Maps, number: int, param: str | None = None) -> Any:
        """Returns one appearance's rows, [heads, channels, inputs] (of a bias, inputs are 1)."""
        import torch

        tensor = self.read(param or m.param).movedim(m.dim if param is None else 0, 0)
        rows = tensor.double()[torch.from_numpy(m.at[number])]
        return rows if param is None else rows[..., None]

    def _write(self, m: _Maps, number: int, rows: Any, param: str | None = None) -> None:
        import torch

        dim = m.dim if param is None else 0
        moved = self.read(param or m.param).movedim(dim, 0)
        rows = rows if param is None else rows[..., 0]
        moved[torch.from_numpy(m.at[number])] = rows.float()

    def _each(self, m: _Maps, change: Any) -> None:
        """Puts `change` (of rows by appearance to such) on a weight and its bias."""
        self.done |= {(m.param, m.dim), *([(m.bias, 0)] if m.bias else [])}
        for param in (None, m.bias) if m.bias else (None,):
            after = change([self._rows(m, i, param) for i in range(len(m.at))])
            for i, rows in enumerate(after):
                self._write(m, i, rows, param)

    def _moment(self, m: _Maps) -> Any:
        return self.context.moments([m.param])[m.param].second.double()

    def _mean(self, axis: Axis, count: int, made: Sequence[_Maps]) -> None:
        def mean(found: list[Any]) -> list[Any]:
            return [_alike(rows.unflatten(0, (count, -1)).mean(1), axis.size) for rows in found]

        for m in made:
            self._each(m, mean)

    def _whole(self, axis: Axis) -> None:
        """Refuses heads of which something else than a map's rows would have to be made alike."""
        for member in axis.members:
            if (member.param, member.dim) not in self.done:
                why = f"{member.param} carries them, and is no map that makes keys or values"
                raise self.context.unable(axis.name, why)

    def _values(self, axis: Axis, count: int, made: Sequence[_Maps], read: Sequence[_Maps]) -> None:
        import torch

        (value,) = made
        rows = self._rows(value, 0)
        heads, width, _ = rows.shape
        size = heads // count
        stacked = rows.reshape(count, size * width, -1)
        covariance = stacked @ self._moment(value) @ stacked.mT
        weight = torch.zeros(heads, width, width, dtype=torch.float64)
        for m in read:
            out = self._rows(m, 0)  # [query heads, width, outputs]
            weight += (out @ out.mT).unflatten(0, (heads, -1)).sum(1)
        root, inverse = _roots(weight)
        root, inverse = (_blocks(t.unflatten(0, (count, size))) for t in (root, inverse))
        basis = torch.linalg.eigh(root @ covariance @ root).eigenvectors[..., -width:]
        encode, decode = basis.mT @ root, inverse @ basis
        # Weights keep their size: the basis has the values' own scale on average.
        scale = (encode.square().sum((-1, -2), keepdim=True) / width).sqrt().clamp(min=1e-30)
        encode, decode = encode / scale, decode * scale

        def change(found: list[Any]) -> list[Any]:
            (own,) = found
            return [_alike(encode @ own.reshape(count, size * width, -1), axis.size)]

        self._each(value, change)
        back = decode.unflatten(1, (size, width)).flatten(0, 1)  # [heads, width, width]
        for m in read:
            out = self._rows(m, 0)
            each = back.repeat_interleave(len(out) // heads, 0)
            self._write(m, 0, each.mT @ out)

    def _pairs(self, axis: Axis, count: int, made: Sequence[_Maps], asked: Sequence[_Maps]) -> None:
        import torch

        (key,), (query,) = made, asked
        keys = torch.complex(self._rows(key, 0), self._rows(key, 1))
        queries = torch.complex(self._rows(query, 0), self._rows(query, 1))
        heads, size = len(keys), len(keys) // count
        square = (queries @ self._moment(query).to(queries.dtype) * queries.conj()).sum(-1).real
        weight = square.unflatten(0, (heads, -1)).sum(1).clamp(min=1e-30)  # [heads, pairs]
        root = weight.sqrt().unflatten(0, (count, size)).mT  # [groups, pairs, size]
        own = keys.unflatten(0, (count, size)).transpose(1, 2)  # [groups, pairs, size, inputs]
        covariance = own @ self._moment(key).to(own.dtype) @ own.mH
        covariance = root[..., None] * covariance * root[..., None, :]
        main = torch.linalg.eigh(covariance).eigenvectors[..., -1]  # [groups, pairs, size]
        encode, decode = main.conj() * root, main / root
        scale = encode.abs().square().sum(-1, keepdim=True).sqrt()
        encode, decode = encode / scale, decode * scale

        def change(found: list[Any]) -> list[Any]:
            rows = torch.complex(*found).unflatten(0, (count, size)).transpose(1, 2)
            one = (encode[..., None] * rows).sum(2)  # [groups, pairs, inputs]
            return [_alike(part, axis.size) for part in (one.real, one.imag)]

        self._each(key, change)
        factor = decode.transpose(1, 2).flatten(0, 1).conj()  # [heads, pairs]

        def follow(found: list[Any]) -> list[Any]:
            rows = torch.complex(*found)
            rows = rows * factor.repeat_interleave(len(rows) // heads, 0)[..., None]
            return [rows.real, rows.imag]

        self._each(query, follow)


def _alike(groups: Any, heads: int) -> Any:
    """Returns what each head is, of what each group is."""
    return groups.repeat_interleave(heads // len(groups), 0)


def _roots(matrix: Any) -> tuple[Any, Any]:
    """Returns M^½ and its inverse; directions that nothing reads get a little weight."""
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    least = values.amax(-1, keepdim=True).clamp(min=1e-30) * 1e-8
    values = values.clamp(min=0) + least
    return tuple((vectors * v[..., None, :]) @ vectors.mT for v in (values.sqrt(), values.rsqrt()))


def _blocks(found: Any) -> Any:
    """Returns [n, size, d, d] as block-diagonal [n, size·d, size·d]."""
    import torch

    return torch.stack([torch.block_diag(*blocks) for blocks in found])
