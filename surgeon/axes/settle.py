"""From the rules' facts to named axes: roles, names, pins, gauges, freedom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import takewhile

from surgeon.axes.analysis import Facts, MaskFlow, derive, extent_number, key
from surgeon.axes.axes import Axes, Axis, Member, Reason
from surgeon.axes.branches import Branch, find_branches
from surgeon.axes.contractions import contractions
from surgeon.axes.floors import least_left
from surgeon.axes.space import Expr, Sum, leaves, occurrences
from surgeon.ir.program import Program, Ref, op_refs
from surgeon.ops.rule import Gauge, OpRule

MIXING = ("contract", "normalise", "index", "scan")
"""Uses that bring together what belongs to different indices of an axis."""
TOGETHER = ("aten.mean.dim", "aten.sum.dim_IntList")
"""Operations that mix several dimensions as if they were one."""
FACTS = ("repeated", "paired", "places")
"""Tags that are no roles by themselves."""
ROLE_ORDER = (
    "positions",
    "hidden",
    "vocab",
    "kv_heads",
    "q_heads",
    "q_per_kv",
    "pair",
    "rotary",
    "qk",
    "v",
    "expert_groups",
    "experts",
    "ffn",
    "rank",
    "channels",
    "kernel",
)


def analyse(program: Program, table: dict[str, OpRule] | None = None) -> Axes:
    """Returns the axes of a program.

    Args:
        program: a well-formed program.
        table: operation rules; by default those of `surgeon.ops`.
    """
    facts = derive(program, table)
    flow = MaskFlow(facts, table)
    branches = find_branches(program)
    return _Settler(facts, flow, branches).axes()


def _scope(params: Iterable[str]) -> str:
    paths = [name.split(".")[:-1] for name in params]
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in same)


def _together(expr: Expr) -> Counter[int]:
    """How often one element of a product meets each axis: parts of a sum exclude one another."""
    out: Counter[int] = Counter()
    for factor in expr:
        if isinstance(factor, Sum):
            inner: Counter[int] = Counter()
            for part in factor.parts:
                inner |= _together(part)
            out += inner
        else:
            out[factor] += 1
    return out


class _Settler:
    def __init__(self, facts: Facts, flow: MaskFlow, branches: tuple[Branch, ...]) -> None:
        self.facts, self.flow, self.branches = facts, flow, branches
        self.program = facts.program
        names = {name for name, _ in facts.slots}
        self.dims = {
            name: tuple(facts.space.resolve(expr) for expr in facts.dims(name)) for name in names
        }
        for p in self.program.params:
            self.dims.setdefault("$" + p.name, ())
        self.members: dict[int, list[Member]] = {}
        for p in self.program.params:
            for dim, expr in enumerate(self.dims["$" + p.name]):
                for atom in dict.fromkeys(leaves(expr)):
                    self.members.setdefault(atom, []).append(Member(p.name, dim))

    def resolved(self, expr: Expr) -> Expr:
        return self.facts.space.resolve(expr)

    def axes(self) -> Axes:
        roles = self._roles()
        pins = self._pins()
        gauges, uses = self._uses()
        outer = self._outer()
        least = least_left(self.facts)
        sizes = {
            a: extent_number(self.facts.space.extents[a])
            for exprs in self.dims.values()
            for expr in exprs
            for a in leaves(expr)
        }
        numbered: dict[int, Axis] = {}
        taken: dict[str, int] = {}
        names: dict[int, str] = {}
        order = [a for a in self.members if isinstance(sizes[a], int)]
        for atom in order:
            scope = _scope(m.param for m in self.members[atom])
            role = roles.get(atom, "width")
            base = f"{scope}/{role}" if scope else role
            taken[base] = taken.get(base, 0) + 1
            names[atom] = base if taken[base] == 1 else f"{base}~{taken[base]}"
        for atom in order:
            size = sizes[atom]
            assert isinstance(size, int)
            numbered[atom] = Axis(
                names[atom],
                roles.get(atom, "width"),
                size,
                _scope(m.param for m in self.members[atom]),
                tuple(self.members[atom]),
                tuple(names[a] for a in outer.get(atom, ()) if a in names),
                tuple(pins.get(atom, ())),
                tuple(
                    Reason(why, self.program.ops[op].where)
                    for why, op in self.flow.inexact.get(atom, ())
                ),
                tuple(self.flow.normalisers.get(atom, ())),
                gauges.get(atom, Gauge.ANY),
                tuple(sorted(uses.get(atom, ()))),
                least.get(atom, 1),
            )
        labels = {k: self.resolved(e) for k, e in self.facts.labels.items()}
        for expr in labels.values():
            for a in leaves(expr):
                sizes.setdefault(a, extent_number(self.facts.space.extents[a]))
        return Axes(
            self.program,
            tuple(numbered.values()),
            self.branches,
            self.dims,
            numbered,
            sizes,
            labels,
            self.facts,
        )

    def _pins(self) -> dict[int, list[Reason]]:
        out: dict[int, list[Reason]] = {}
        for pin in self.facts.pins:
            where = self.program.ops[pin.op].where if pin.op >= 0 else ""
            for atom in dict.fromkeys(leaves(self.resolved(pin.expr))):
                reason = Reason(pin.why, where)
                if reason not in out.setdefault(atom, []):
                    out[atom].append(reason)
        return out

    def _uses(self) -> tuple[dict[int, Gauge], dict[int, set[str]]]:
        gauges: dict[int, Gauge] = {}
        uses: dict[int, set[str]] = {}
        tables = self._tables()
        for use in self.facts.uses:
            for atom in leaves(self.resolved(use.expr)):
                if use.op not in tables:
                    gauges[atom] = gauges.get(atom, Gauge.ANY).meet(use.gauge)
                uses.setdefault(atom, set()).add(use.kind)
        return gauges, uses

    def _tables(self) -> set[int]:
        """Operations that make tables (of positions, masks) which no trained parameter enters.

        A change of basis is made to trained parameters only, so these see none.
        """
        trained: set[str] = set()
        tables: set[int] = set()
        for index, op in enumerate(self.program.ops):
            if any(
                r.name in trained
                if isinstance(r, Ref)
                else self.program.param[r.name].kind in ("parameter", "buffer")
                for r in op_refs(op)
            ):
                trained.update(op.outputs)
            else:
                tables.add(index)
        return tables

    def _outer(self) -> dict[int, tuple[int, ...]]:
        """Axes that enclose an axis wherever it appears, in any tensor, in the same order.

        An axis that encloses twice (an outer product) does not say which of the two it is.
        """
        out: dict[int, tuple[int, ...]] = {}
        for exprs in self.dims.values():
            whole = occurrences(tuple(factor for expr in exprs for factor in expr))
            for atom, enclosing in whole:
                once = tuple(a for a in enclosing if enclosing.count(a) == 1)
                out[atom] = tuple(a for a in out[atom] if a in once) if atom in out else once
        mixed = self._mixed()
        return {
            atom: tuple(
                a for a in found if a in self.members and a != atom and (atom, a) not in mixed
            )
            for atom, found in out.items()
        }

    def _mixed(self) -> set[tuple[int, int]]:
        """Pairs of an axis and one that encloses it and that some operation mixes the indices of.

        What is kept of the first must then be the same for every index of the second: heads that
        are summed, compared or normalised with one another all keep the same channels.
        """
        out: set[tuple[int, int]] = set()
        over: dict[int, set[Expr]] = {}
        for use in self.facts.uses:
            if use.kind in MIXING:
                over.setdefault(use.op, set()).add(self.resolved(use.expr))
        for index, op in enumerate(self.program.ops):
            operands = [self.dims.get(key(ref), ()) for ref in op_refs(op)]
            whole = op.target in TOGETHER
            for dims in operands if index in over else ():
                for d, expr in enumerate(dims):
                    if expr not in over[index]:
                        continue
                    rest = [e for i, e in enumerate(dims) if i != d]
                    rest = [e for e in rest if not (whole and e in over[index])]
                    out |= {(a, o) for e in rest for a in leaves(e) for o in leaves(expr)}
            results = [self.dims.get("%" + name, ()) for name in op.outputs]
            counts = (_together(tuple(f for e in dims for f in e)) for dims in results)
            twice = {a for count in counts for a, n in count.items() if n > 1}
            if twice and len(operands) > 1:
                carried = {a for dims in operands for e in dims for a in leaves(e)}
                out |= {(a, o) for a in carried for o in twice}
        return out

    def _roles(self) -> dict[int, str]:
        found: dict[int, set[str]] = {}
        tagged: dict[str, set[int]] = {k: set() for k in FACTS}
        for expr, tag in self.facts.tags:
            if tag in tagged:
                tagged[tag].update(leaves(self.resolved(expr)))
        repeated, paired = tagged["repeated"], tagged["paired"]
        for expr, tag in self.facts.tags:
            atoms = list(leaves(self.resolved(expr)))
            for atom in atoms:
                role = tag
                if tag in ("q_heads", "kv_heads"):
                    # Query heads are key/value heads as well, unless both are told apart.
                    role = "q_per_kv" if atom in repeated else tag
                elif tag == "qk" and (atoms.count(atom) > 1 or atom in paired):
                    role = "rotary"
                elif tag == "experts" and atom != atoms[-1]:
                    role = "expert_groups"
                elif tag in tagged:
                    continue
                found.setdefault(atom, set()).add(role)
        for branch in self.branches:
            value = self.program.ops[branch.add].outputs[0]
            for atom in leaves(self.dims["%" + value][-1]):
                if atom not in tagged["places"]:
                    found.setdefault(atom, set()).add("hidden")
        # Logits are over the vocabulary where tokens come in through an embedding.
        logits = self.program.outputs if any("vocab" in roles for roles in found.values()) else ()
        for name in logits:
            for atom in leaves(self.dims["%" + name][-1] if self.dims.get("%" + name) else ()):
                found.setdefault(atom, set()).add("vocab")
        hidden = {a for a, roles in found.items() if "hidden" in roles}
        channels, ranks = self._channels(hidden)
        for atoms, role in ((channels, "ffn"), (ranks, "rank")):
            for atom in atoms:
                found.setdefault(atom, set()).add(role)
        return {atom: next(r for r in ROLE_ORDER if r in roles) for atom, roles in found.items()}

    def _channels(self, hidden: set[int]) -> tuple[set[int], set[int]]:
        """Axes that one linear map makes, maps change, and another contracts into the residual.

        Then those that one linear map makes and another contracts as it is: ranks of products.
        """
        kinds: dict[int, set[str]] = {}
        into: dict[int, set[int]] = {}
        for use in self.facts.uses:
            for atom in leaves(self.resolved(use.expr)):
                kinds.setdefault(atom, set()).add(use.kind)
                if use.kind == "contract":
                    op = self.program.ops[use.op]
                    out = self.dims.get("%" + op.outputs[0])  # a number has no dimensions
                    into.setdefault(atom, set()).update(leaves(out[-1]) if out else ())
        products = contractions(self.program)
        made = {found.out for found in products}
        between = (found.value for found in products if found.value in made)
        ranks = {a for value in between for a in leaves(self.dims["%" + value][-1])} - hidden
        # Through a product the residual is reached as well.
        reach = hidden | {a for a in ranks if into.get(a, set()) & hidden}
        ends = {"produce", "contract"}
        channels = {a for a, to in into.items() if to & reach} - hidden - ranks
        return {a for a in channels if ends <= kinds[a] <= {*ends, "map"}}, ranks
