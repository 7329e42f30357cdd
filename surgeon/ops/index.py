"""Reading by index: embeddings and gathers."""

from __future__ import annotations

from dataclasses import replace

from surgeon.ir.program import Arg, Op, ParamRef, Ref
from surgeon.ops.rule import (
    Atoms,
    Context,
    Flow,
    Gauge,
    Rebuild,
    axis_of,
    rule,
    vanishing,
    wherever,
)

INDEXED = "rows are picked by numbers that come from data"


def _embedding_vanish(f: Flow) -> Atoms:
    picked = (Atoms() for _ in f.out()[:-1])
    return wherever(f, (*picked, vanishing(f, f.op.arg(0), 1)))


def _origin(c: Context, arg: Arg) -> str:
    """Follows an index back to the graph input it comes from."""
    while isinstance(arg, Ref) and arg.name in c.program.producer:
        op = c.program.ops[c.program.producer[arg.name]]
        arg = next((a for a in op.args if isinstance(a, Ref)), None)
    return arg.name if isinstance(arg, Ref) else ""


def _embedding_rebuilt(r: Rebuild) -> Op:
    """Returns the operation without its padding index where the table lost rows.

    The index is a number of a row that may be gone; only the table's gradient depends on it.
    """
    table = r.op.arg(0)
    assert isinstance(table, Ref | ParamRef)
    if r.operand(table)[0] == r.program.type_of(table).shape[0]:
        return r.op
    kwargs = tuple((k, v) for k, v in r.op.kwargs if k != "padding_idx")
    return replace(r.op, args=r.op.args[:2], kwargs=kwargs)


@rule("aten.embedding.default", vanish=_embedding_vanish, rebuild=_embedding_rebuilt)
def embedding(c: Context) -> None:
    """Picks rows: the row axis must stay, the columns go on."""
    weight, ids = c.dims(c.op.arg(0)), c.dims(c.op.arg(1))
    out = c.out()
    c.pin(weight[0], INDEXED)
    c.use(weight[0], "index", Gauge.FIXED)
    first = c.program.inputs[0].name if c.program.inputs else ""
    c.tag(weight[0], "vocab" if _origin(c, c.op.arg(1)) == first else "positions")
    c.equate(weight[1], out[-1])
    c.use(weight[1], "produce", Gauge.ANY)
    for a, b in zip(ids, out[:-1], strict=True):
        c.equate(a, b)


@rule("aten.index.Tensor", vanish=lambda f: frozenset())
def index(c: Context) -> None:
    """Picks entries by tensors of numbers: the picked dimensions must stay."""
    x, out = c.dims(c.op.arg(0)), c.out()
    given = c.op.arg(1)
    assert isinstance(given, tuple)
    places = [i for i, arg in enumerate(given) if isinstance(arg, Ref | ParamRef)]
    whole = places == list(range(places[0], places[0] + len(places))) if places else False
    for i in places:
        c.pin(x[i], INDEXED)
        c.use(x[i], "index", Gauge.FIXED)
    rank = max((len(c.dims(given[i])) for i in places), default=0)
    if not whole:
        for dim in (*x, *out):
            c.pin(dim, "indices in separate dimensions have no axis rule")
        return
    start = places[0]
    rest = [i for i in range(len(x)) if i not in places]
    ends = [*range(start), *range(start + rank, len(out))]
    for i, j in zip(rest, ends, strict=True):
        c.equate(x[i], out[j])
    picked = out[start : start + rank]
    shape = c.op.types[0].shape[start : start + rank]
    for i in places:
        dims, sizes = c.dims(given[i]), c.shape(given[i])
        for k in range(1, len(dims) + 1):
            if sizes[-k] != 1 or shape[-k] == 1:
                c.equate(dims[-k], picked[-k])


def _select_vanish(f: Flow) -> Atoms:
    x = f.op.arg(0)
    dim = axis_of(f.op.arg(1), f.rank(x))
    return wherever(f, [Atoms() if d == dim else vanishing(f, x, d) for d in range(f.rank(x))])


@rule("aten.index_select.default", vanish=_select_vanish)
def index_select(c: Context) -> None:
    """Picks along one dimension by a list of numbers."""
    x, given, out = c.dims(c.op.arg(0)), c.dims(c.op.arg(2)), c.out()
    dim = axis_of(c.op.arg(1), len(x))
    for i, (a, b) in enumerate(zip(x, out, strict=True)):
        if i == dim:
            c.pin(a, INDEXED)
            c.use(a, "index", Gauge.FIXED)
            c.equate(b, given[0] if given else b)
        else:
            c.equate(a, b)
            c.use(b, "produce" if isinstance(c.op.arg(0), ParamRef) else "map", Gauge.ANY)
