"""Where a corrected average can be folded into weights, for back ends that average as they like.

A back end that knows nothing of the plan averages over the channels that are left. If what it
averages is c = √(kept/all) times the true value, the average of its square comes out as if the
masked channels were still there. So values and parameters get exponents: the back end's value is
c^e times the true one. Every operation relates the exponents of what it reads and makes; the
outputs' are 0. What the relations leave open is set to 0, weight matrix by weight matrix.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction

from surgeon.ir.program import Arg, Op, ParamRef, Program, Ref

Terms = dict[str, Fraction]


@dataclass(frozen=True)
class Fold:
    """What becomes of a parameter p: c^exponent · (p + offset) − offset."""

    exponent: Fraction
    offset: float = 0.0


class Unfoldable(Exception):
    """No choice of exponents satisfies every operation. Its text names the operation."""


_KEEP = frozenset(
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "transpose.int", "t.default"),
        *("permute.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims", "slice.Tensor"),
        *("expand.default", "neg.default", "clone.default", "contiguous.default", "alias.default"),
        *("to.dtype", "dropout.default", "flatten.using_ints", "split.Tensor", "chunk.default"),
        *("split_with_sizes.default", "select.int", "unbind.int", "relu.default", "abs.default"),
        *("detach.default", "sum.dim_IntList"),
    )
)


class _System:
    """Linear equations over exponents, solved by propagation."""

    def __init__(self) -> None:
        self.known: dict[str, Fraction] = {}
        self.equations: list[tuple[Terms, Fraction, str]] = []
        self.by_name: dict[str, list[int]] = {}
        self.queue: list[int] = []

    def add(self, terms: Terms, total: Fraction, where: str) -> None:
        """Requires Σ coefficient · exponent = total."""
        terms = {name: k for name, k in terms.items() if k}
        index = len(self.equations)
        self.equations.append((terms, total, where))
        for name in terms:
            self.by_name.setdefault(name, []).append(index)
        self.queue.append(index)

    def set(self, name: str, value: Fraction) -> None:
        self.known[name] = value
        self.queue += self.by_name.get(name, ())

    def propagate(self) -> None:
        while self.queue:
            terms, total, where = self.equations[self.queue.pop()]
            open_ = [name for name in terms if name not in self.known]
            rest = total - sum(
                (k * self.known[name] for name, k in terms.items() if name in self.known),
                Fraction(0),
            )
            if not open_ and rest:
                raise Unfoldable(where)
            if len(open_) == 1:
                self.set(open_[0], rest / terms[open_[0]])


def _key(arg: Arg) -> str | None:
    if isinstance(arg, Ref):
        return "%" + arg.name
    if isinstance(arg, ParamRef):
        return "$" + arg.name
    return None


def _terms(plus: list[Arg], minus: list[str] | None = None) -> Terms:
    out: Terms = {}
    for arg in plus:
        name = _key(arg)
        if name:
            out[name] = out.get(name, Fraction(0)) + 1
    for name in minus or []:
        out[name] = out.get(name, Fraction(0)) - 1
    return out


def _offset(program: Program, op: Op) -> tuple[ParamRef, float] | None:
    """Recognises a parameter that is used as itself plus a number, and nowhere else."""
    x, y = op.arg(0), op.arg(1)
    if isinstance(y, ParamRef | Ref) and isinstance(x, int | float):
        x, y = y, x
    while isinstance(x, Ref) and x.name in program.producer:
        inner = program.ops[program.producer[x.name]]
        if inner.target != "aten.to.dtype" or len(program.consumers[x.name]) != 1:
            return None
        x = inner.arg(0)
    if not isinstance(x, ParamRef) or not isinstance(y, int | float) or isinstance(y, bool):
        return None
    return (x, float(y)) if len(program.readers[x.name]) == 1 else None


def folds(
    program: Program, averages: Collection[int], fixed: Mapping[str, Fraction]
) -> dict[str, Fold]:
    """Returns what becomes of each parameter so that `averages` may see kept channels only.

    Args:
        program: the program before removal.
        averages: the averaging operations, by index, that lost the share c² of their channels.
        fixed: exponents of buffers that the back end computes by itself.

    Raises:
        Unfoldable: no scaling of the weights makes up for it.
    """
    system = _System()
    offsets: dict[str, float] = {}
    for given in program.inputs:
        system.set("%" + given.name, Fraction(0))
    for p in program.params:
        if p.kind in ("computed", "constant"):
            system.set("$" + p.name, fixed.get(p.name, Fraction(0)))
    for index, op in enumerate(program.ops):
        if op.target in ("aten.add.Tensor", "aten.add.Scalar"):
            found = _offset(program, op)
            if found:
                # Solved as if the sum were the parameter: the exponent is that of the sum.
                offsets[found[0].name] = found[1]
                system.add(_terms([found[0]], ["%" + op.outputs[0]]), Fraction(0), op.where)
                continue
        _relate(system, op, index in averages)
    for name in program.outputs:
        system.add({"%" + name: Fraction(1)}, Fraction(0), "the model's output " + name)
    system.propagate()
    matrices = [
        "$" + r.name
        for op in program.ops
        for r in op.args
        if isinstance(r, ParamRef) and len(program.param[r.name].type.shape) > 1
    ]
    for name in (*matrices, *("$" + p.name for p in program.params), *list(system.by_name)):
        if name not in system.known:
            system.set(name, Fraction(0))
            system.propagate()
    return {
        p.name: Fold(exponent, offsets.get(p.name, 0.0))
        for p in program.params
        if p.kind not in ("computed", "constant")
        and (exponent := system.known.get("$" + p.name, Fraction(0)))
    }


def _relate(system: _System, op: Op, average: bool) -> None:
    outs = ["%" + name for name in op.outputs]
    zero = Fraction(0)
    a, b = op.arg(0), op.arg(1)
    tensors = [r for r in op.args[:2] if _key(r)]
    if op.target in _KEEP:
        for out in outs:
            system.add(_terms([a], [out]), zero, op.where)
    elif op.target == "aten.mean.dim":
        system.add(_terms([a], outs), Fraction(2 if average else 0), op.where)
    elif op.target in ("aten.cat.default", "aten.concat.default"):
        assert isinstance(a, tuple)
        for piece in a:
            system.add(_terms([piece], outs), zero, op.where)
    elif op.target in ("aten.add.Tensor", "aten.sub.Tensor", "aten.maximum.default"):
        for arg in (a, b):
            if _key(arg):
                system.add(_terms([arg], outs), zero, op.where)
            elif arg != 0:
                system.add({outs[0]: Fraction(1)}, zero, op.where)
    elif op.target in ("aten.mul.Tensor", "aten.mul.Scalar"):
        system.add(_terms(tensors, outs), zero, op.where)
    elif op.target in ("aten.matmul.default", "aten.bmm.default", "aten.mm.default"):
        system.add(_terms([a, b], outs), zero, op.where)
    elif op.target == "aten.div.Tensor":
        terms = _terms([a], outs)
        name = _key(b)
        if name:
            terms[name] = terms.get(name, zero) - 1
        system.add(terms, zero, op.where)
    elif op.target == "aten.pow.Tensor_Scalar" and isinstance(b, int | float):
        terms = {k: v * Fraction(b) for k, v in _terms([a]).items()}
        terms[outs[0]] = Fraction(-1)
        system.add(terms, zero, op.where)
    elif op.target in ("aten.rsqrt.default", "aten.sqrt.default"):
        half = Fraction(-1, 2) if "rsqrt" in op.target else Fraction(1, 2)
        terms = dict.fromkeys(_terms([a]), half)
        terms[outs[0]] = Fraction(-1)
        system.add(terms, zero, op.where)
    elif op.target == "aten.linear.default":
        system.add(_terms([a, b], outs), zero, op.where)
        if _key(op.arg(2)):
            system.add(_terms([op.arg(2)], outs), zero, op.where)
    elif op.target == "aten.addmm.default":
        system.add(_terms([b, op.arg(2)], outs), zero, op.where)
        system.add(_terms([a], outs), zero, op.where)
    elif op.target == "aten.embedding.default":
        system.add(_terms([a], outs), zero, op.where)
    elif op.target in ("surgeon.attention", "aten.scaled_dot_product_attention.default"):
        # Queries and keys could share an exponent and its opposite; nothing is gained by that.
        for arg in (a, b):
            system.add(_terms([arg]), zero, op.where)
        system.add(_terms([op.arg(2)], outs), zero, op.where)
    else:
        # A nonlinear or unknown map: true values in, true values out. A normalisation's scale
        # and shift could carry an exponent, but nothing has asked for one yet.
        for arg in op.args:
            for item in arg if isinstance(arg, tuple) else (arg,):
                name = _key(item)
                if name:
                    system.add({name: Fraction(1)}, zero, op.where)
        for out in outs:
            system.add({out: Fraction(1)}, zero, op.where)
