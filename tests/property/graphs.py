"""Random small torch modules, as data that hypothesis can shrink and a person can read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st

from tests.property.modules import (
    BATCH,
    BINARY,
    LARGEST,
    SIZES,
    UNARY,
    VOCAB,
    Graph,
    Shape,
    Step,
    alive,
)


def _broadcasts(a: Shape, b: Shape) -> bool:
    return all(x == y or 1 in (x, y) for x, y in zip(a[::-1], b[::-1], strict=False))


def _broadcast(a: Shape, b: Shape) -> Shape:
    return tuple(torch.broadcast_shapes(a, b))


class _Drawing:
    """Shapes of what has been drawn so far, and one method an operation."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw
        self.params: list[Shape] = []
        self.steps: list[Step] = []
        self.values: list[Shape] = []
        self.results: list[int] = []

    def pick(self, items: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(items)))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def param(self, shape: Shape) -> int:
        """A parameter of this shape: a new one or one that is already there."""
        same = [i for i, s in enumerate(self.params) if s == shape]
        if same and self.draw(st.integers(0, 2)) == 0:
            return self.pick(same)
        self.params.append(shape)
        return len(self.params) - 1

    def value(self, wanted: Callable[[Shape], bool] = lambda shape: True) -> int | None:
        """A value of a wanted shape, the latest most often."""
        found = [i for i, s in enumerate(self.values) if wanted(s)][::-1]
        if not found:
            return None
        return self.pick(found[:3] if self.draw(st.integers(0, 2)) else found)

    def add(self, step: Step, *shapes: Shape) -> bool:
        if any(prod(s) > LARGEST or len(s) > 5 or 0 in s for s in shapes):
            return False
        self.steps.append(step)
        self.results.append(len(shapes))
        self.values.extend(shapes)
        return True

    # --- operations ---

    def op_param(self) -> None:
        shape = tuple(self.pick(SIZES) for _ in range(self.pick((1, 2, 3))))
        self.add(Step("param", (), (self.param(shape),)), shape)

    def op_linear(self) -> None:
        x = self.value(lambda s: len(s) > 0 and s[-1] % BATCH != 0 and s[-1] > 1)
        if x is None:
            return
        s = self.values[x]
        tied = [i for i, p in enumerate(self.params) if len(p) == 2 and p[1] == s[-1]]
        if tied and self.flag():
            w = self.pick(tied)
        else:
            size = self.pick((s[-1], *SIZES))
            w = self.param((size, s[-1]))
        out = self.params[w][0]
        bias = (self.param((out,)),) if self.flag() else ()
        self.add(Step("linear", (x,), (w, *bias)), (*s[:-1], out))

    def op_heads(self) -> None:
        """A projection into heads of some width, as a dimension of their own."""
        x = self.value(lambda s: len(s) == 3 and s[-1] % BATCH != 0 and s[-1] > 1)
        if x is None:
            return
        s = self.values[x]
        heads, width = self.pick((2, 3, 4)), self.pick((2, 3, 4))
        w = self.param((heads * width, s[-1]))
        if self.add(Step("linear", (x,), (w,)), (*s[:-1], heads * width)):
            new = (*s[:-1], heads, width)
            self.add(Step("view", (len(self.values) - 1,), (), new), new)

    def op_matmul(self) -> None:
        x = self.value(lambda s: len(s) > 1)
        if x is None:
            return
        s = self.values[x]
        kind = self.pick(("values", "right", "left"))
        if kind == "values":
            flip = self.flag()
            inner = -1 if flip else -2
            y = self.value(
                lambda t: len(t) > 1 and t[inner] == s[-1] and _broadcasts(s[:-2], t[:-2])
            )
            if y is None:
                return
            t = self.values[y]
            out = (*_broadcast(s[:-2], t[:-2]), s[-2], t[-2 if flip else -1])
            self.add(Step("matmul", (x, y), (), (True, flip)), out)
            return
        size = s[-1] if kind == "right" else s[-2]
        if size % BATCH == 0:
            return
        batch = (s[-3],) if len(s) > 2 and s[-3] % BATCH and self.flag() else ()
        new = self.pick((size, *SIZES))
        if kind == "right":
            w = self.param((*batch, size, new))
            self.add(Step("matmul", (x,), (w,), (True, False)), (*s[:-1], new))
        else:
            w = self.param((*batch, new, size))
            self.add(Step("matmul", (x,), (w,), (False, False)), (*s[:-2], new, s[-1]))

    def op_unary(self) -> None:
        x = self.value()
        if x is not None:
            self.add(Step(self.pick(list(UNARY)), (x,)), self.values[x])

    def op_residual(self) -> None:
        x = self.value()
        if x is None:
            return
        y = self.value(lambda t: t == self.values[x])
        assert y is not None
        self.add(Step("add", (x, y)), self.values[x])

    def op_binary(self) -> None:
        x = self.value()
        if x is None:
            return
        s, name = self.values[x], self.pick(list(BINARY))
        if self.flag():
            y = self.value(lambda t: _broadcasts(s, t))
            assert y is not None
            self.add(Step(name, (x, y)), _broadcast(s, self.values[y]))
            return
        rank = self.draw(st.integers(1, len(s))) if s else 0
        shape = tuple(
            size if size % BATCH and self.draw(st.integers(0, 3)) else 1
            for size in s[len(s) - rank :]
        )
        if shape:
            self.add(Step(name, (x,), (self.param(shape),)), s)

    def op_view(self) -> None:
        x = self.value(lambda s: len(s) > 0)
        if x is None:
            return
        s = self.values[x]
        dim = self.draw(st.integers(0, len(s) - 1))
        if self.flag() and dim + 1 < len(s):
            new = (*s[:dim], s[dim] * s[dim + 1], *s[dim + 2 :])
        else:
            cuts = [f for f in (2, 3, 4, 6) if s[dim] % f == 0 and s[dim] > f]
            if not cuts:
                return
            f = self.pick(cuts)
            pair = (s[dim] // f, f) if s[dim] % BATCH == 0 or self.flag() else (f, s[dim] // f)
            new = (*s[:dim], *pair, *s[dim + 1 :])
        if sum(size % BATCH == 0 for size in new) <= 1 and max(new) < BATCH * BATCH:
            self.add(Step("view", (x,), (), new), new)

    def op_permute(self) -> None:
        x = self.value(lambda s: len(s) > 1)
        if x is None:
            return
        s = self.values[x]
        i, j = self.pick(range(len(s))), self.pick(range(len(s)))
        order = list(range(len(s)))
        order[i], order[j] = order[j], order[i]
        self.add(Step("permute", (x,), (), tuple(order)), tuple(s[k] for k in order))

    def _cuttable(self) -> tuple[int, int, int] | None:
        x = self.value(lambda s: any(size > 1 and size % BATCH for size in s))
        if x is None:
            return None
        s = self.values[x]
        dim = self.pick([i for i, size in enumerate(s) if size > 1 and size % BATCH])
        return x, dim, s[dim]

    def op_split(self) -> None:
        found = self._cuttable()
        if not found:
            return
        x, dim, size = found
        s = self.values[x]
        if self.flag():
            n = self.pick((2, 3))
            pieces = [t.shape[0] for t in torch.empty(size).chunk(n)]
            step = Step("chunk", (x,), (), (dim, n))
        else:
            at = self.draw(st.integers(1, size - 1))
            pieces = [at, size - at]
            step = Step("split", (x,), (), (dim, tuple(pieces)))
        self.add(step, *((*s[:dim], piece, *s[dim + 1 :]) for piece in pieces))

    def op_slice(self) -> None:
        found = self._cuttable()
        if not found:
            return
        x, dim, size = found
        s = self.values[x]
        start = self.draw(st.integers(0, size - 1))
        end = self.draw(st.integers(start + 1, size))
        low: int | None = start - size if self.flag() else start
        high: int | None = end if end == size or not self.flag() else end - size
        if end == size and self.flag():
            high = None
        step = Step("slice", (x,), (), (dim, low, high))
        self.add(step, (*s[:dim], end - start, *s[dim + 1 :]))

    def op_select(self) -> None:
        found = self._cuttable()
        if found:
            x, dim, size = found
            s = self.values[x]
            step = Step("select", (x,), (), (dim, self.draw(st.integers(0, size - 1))))
            self.add(step, (*s[:dim], *s[dim + 1 :]))

    def op_cat(self) -> None:
        x = self.value(lambda s: any(size % BATCH for size in s))
        if x is None:
            return
        s = self.values[x]
        dim = self.pick([i for i, size in enumerate(s) if size % BATCH])
        of = [x]
        for _ in range(self.pick((1, 1, 2))):
            y = self.value(
                lambda t: (
                    len(t) == len(s)
                    and t[dim] % BATCH != 0
                    and (*t[:dim], *t[dim + 1 :]) == (*s[:dim], *s[dim + 1 :])
                )
            )
            assert y is not None
            of.append(y)
        if self.flag():
            of.reverse()
        size = sum(self.values[i][dim] for i in of)
        if size < BATCH:
            self.add(Step("cat", tuple(of), (), (dim,)), (*s[:dim], size, *s[dim + 1 :]))

    def op_unsqueeze(self) -> None:
        x = self.value()
        if x is not None:
            s = self.values[x]
            dim = self.draw(st.integers(0, len(s)))
            self.add(Step("unsqueeze", (x,), (), (dim,)), (*s[:dim], 1, *s[dim:]))

    def op_expand(self) -> None:
        x = self.value(lambda s: 1 in s)
        if x is not None:
            new = tuple(self.pick(SIZES) if size == 1 else size for size in self.values[x])
            self.add(Step("expand", (x,), (), new), new)

    def op_reduce(self) -> None:
        x = self.value(lambda s: len(s) > 1)
        if x is None:
            return
        s = self.values[x]
        dims = {self.pick(range(len(s))) for _ in range(self.pick((1, 1, 2)))}
        keep = self.flag()
        out = tuple(1 if i in dims else n for i, n in enumerate(s) if keep or i not in dims)
        name = self.pick(("sum", "mean"))
        self.add(Step(name, (x,), (), (tuple(sorted(dims)), keep)), out)

    def op_norm(self) -> None:
        x = self.value(lambda s: len(s) > 0 and s[-1] > 1 and s[-1] % BATCH != 0)
        if x is None:
            return
        s = self.values[x]
        w = self.param((s[-1],))
        if self.pick((True, True, False)):
            self.add(Step("rms_norm", (x,), (w,)), s)
        else:
            self.add(Step("layer_norm", (x,), (w, self.param((s[-1],)))), s)

    def op_softmax(self) -> None:
        x = self.value(lambda s: len(s) > 0)
        if x is not None:
            s = self.values[x]
            name = self.pick(("softmax", "softmax", "cumsum"))
            self.add(Step(name, (x,), (), (self.pick(range(len(s))),)), s)

    def op_attention(self) -> None:
        x = self.value(lambda s: len(s) == 3 and s[0] == BATCH and s[2] > 1 and s[1] % BATCH != 0)
        if x is None:
            return
        s = self.values[x]
        kv, rep = self.pick((1, 2, 3)), self.pick((1, 2, 3))
        width, value = self.pick((2, 3, 4)), self.pick((2, 3, 4))
        q = self.param((kv * rep * width, s[2]))
        k = self.param((kv * width, s[2]))
        v = self.param((kv * value, s[2]))
        out = (*s[:2], kv * rep * value)
        self.add(Step("attention", (x,), (q, k, v), (kv, rep, width, value)), out)

    def head(self) -> Step:
        """A contraction of a value down to a plain vector per place, or the value itself."""
        x = self.value()
        assert x is not None
        s = self.values[x]
        kind = self.pick(("flat", "flat", "flat", "linear", "sum", "mean", "plain"))
        last = bool(s) and s[-1] % BATCH != 0
        rest = prod(s[1:])
        if kind == "flat" and len(s) > 1 and rest < BATCH:
            return Step("flat", (x,), (self.param((2, rest)),), (s[0], rest))
        if kind == "linear" and last:
            return Step("linear", (x,), (self.param((self.pick((1, 2, 3)), s[-1])),))
        if kind in ("sum", "mean") and len(s) > 1:
            return Step(kind, (x,), (), (tuple(range(1, len(s))), False))
        # A parameter itself can't be returned.
        return Step("half", (x,))


WEIGHTED = (
    *("linear",) * 4,
    *("heads",) * 2,
    *("matmul",) * 3,
    *("unary",) * 4,
    *("residual",) * 4,
    *("binary",) * 4,
    *("view",) * 3,
    *("permute",) * 2,
    *("split", "slice", "cat", "cat", "unsqueeze", "expand", "expand", "reduce", "reduce"),
    *("norm", "norm", "softmax", "attention", "param", "select"),
)


@st.composite
def graphs(draw: st.DrawFn, steps: int = 12) -> Graph:
    """Random modules of supported operations; what they couple, prune and pin varies widely."""
    drawing = _Drawing(draw)
    seq, width = drawing.pick(SIZES), drawing.pick(SIZES)
    inputs = drawing.pick(("floats", "tokens"))
    shape: Shape = (BATCH, seq, width) if inputs == "floats" else (BATCH, seq)
    if inputs == "floats":
        # The input itself is not read again: what touches it is pinned.
        out = drawing.pick((2, 3, 4, 6, 12))
        bias = (drawing.param((out,)),) if drawing.flag() else ()
        weights = (drawing.param((out, width)), *bias)
        drawing.add(Step("project", (), weights), (BATCH, seq, out))
    else:
        table = drawing.param((VOCAB, width))
        drawing.add(Step("embed", (), (table,)), (BATCH, seq, width))
    for _ in range(draw(st.integers(1, steps))):
        getattr(drawing, "op_" + drawing.pick(WEIGHTED))()
    heads = tuple(drawing.head() for _ in range(drawing.pick((1, 1, 2))))
    return alive(
        Graph(inputs, shape, tuple(drawing.params), tuple(drawing.steps), heads, drawing.flag()),
        drawing.results,
    )
