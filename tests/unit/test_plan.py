"""Plans: as JSON, as something a model can refuse, and as index arithmetic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.axes import Axes, Axis, Branch, Expr, Member, Reason, Sum
from surgeon.axes.analysis import Facts
from surgeon.axes.plan import Cut, Plan, Selection, check, counts, cut, merged
from surgeon.axes.space import leaves
from surgeon.errors import Code, SurgeonError
from surgeon.ir import Param, Program, TensorType

pytestmark = pytest.mark.slow

NAMES = st.text(min_size=1, max_size=8)


@st.composite
def any_cut(draw: st.DrawFn) -> Cut:
    size = draw(st.integers(1, 9))
    row = st.lists(st.integers(0, size - 1), min_size=1, unique=True).map(sorted).map(tuple)
    kept: Any = draw(row)
    outer = tuple(draw(st.lists(NAMES, max_size=2, unique=True)))
    for _ in outer:
        kept = (kept,) * draw(st.integers(1, 3))
    return Cut(draw(NAMES), size, kept, outer)


PLANS = st.builds(
    Plan,
    st.lists(any_cut(), max_size=4).map(tuple),
    st.lists(NAMES, max_size=3).map(tuple),
    st.dictionaries(NAMES, NAMES, max_size=3).map(lambda d: tuple(sorted(d.items()))),
    st.lists(NAMES, max_size=3).map(tuple),
    st.lists(NAMES, max_size=3).map(tuple),
)


@settings(deadline=None)
@given(PLANS)
def test_a_plan_survives_json(plan: Plan):
    again = Plan.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)
    assert again.to_json() == plan.to_json()


@settings(deadline=None)
@given(PLANS)
def test_a_plans_json_has_one_cut_a_line(plan: Plan):
    lines = plan.to_json().splitlines()
    assert sum(line.startswith('  {"axis":') for line in lines) == len(plan.cuts)


GOOD = json.loads(Plan((Cut("a", 3, (0, 2)),), ("b",), (("id", "x"),), ("w",)).to_json())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("null", "TypeError"),
        ("{}", "KeyError: 'version'"),
        (json.dumps({**GOOD, "version": 2}), "version 2 is not 1"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "cuts"}), "KeyError: 'cuts'"),
        (json.dumps({**GOOD, "source": []}), "AttributeError"),
        (json.dumps({**GOOD, "cuts": [{"axis": "a"}]}), "KeyError: 'size'"),
        (json.dumps({**GOOD, "cuts": [{**GOOD["cuts"][0], "size": "many"}]}), "TypeError"),
    ],
)
def test_what_is_no_plan_is_refused_with_the_place(text: str, why: str):
    with pytest.raises(SurgeonError) as caught:
        Plan.from_json(text, "out/plan.json")
    assert caught.value.code is Code.BAD_PLAN
    assert caught.value.at == "out/plan.json" and why in caught.value.why


# --- a model made by hand: w [kv × (a + b), 3-d weight [kv, d, hidden], p [hidden] ------------

KV, D, HIDDEN, ROT, VOCAB = range(5)
SIZES = {KV: 2, D: 4, HIDDEN: 6, ROT: 3, VOCAB: 9}
PARAMS: dict[str, tuple[Expr, ...]] = {
    "q": ((KV, Sum(((ROT,), (ROT,)))), (HIDDEN,)),
    "w": ((KV,), (D,), (HIDDEN,)),
    "o": ((HIDDEN,), (KV, D)),
    "embed": ((VOCAB,), (HIDDEN,)),
    "norm": ((HIDDEN,),),
    "scalar": (),
}
OUTER = {D: (KV,)}
BRANCH = Branch("layer/mlp", "mlp", "layer", 0, 1, (), ())


def number_of(expr: Expr) -> int:
    total = 1
    for factor in expr:
        if isinstance(factor, Sum):
            total *= sum(number_of(part) for part in factor.parts)
        else:
            total *= SIZES[factor]
    return total


def model(params: dict[str, tuple[Expr, ...]] = PARAMS, outer: Any = OUTER) -> Axes:
    names = {KV: "kv", D: "d", HIDDEN: "hidden", ROT: "rot", VOCAB: "vocab"}
    numbered = {
        n: Axis(
            name,
            name,
            SIZES[n],
            "",
            tuple(
                Member(p, i)
                for p, dims in params.items()
                for i, e in enumerate(dims)
                if n in leaves(e)
            ),
            tuple(names[o] for o in outer.get(n, ())),
            (Reason("rows are picked by data", "embedding"),) if n == VOCAB else (),
        )
        for n, name in names.items()
    }
    program = Program(
        params=tuple(
            Param(name, TensorType("f32", tuple(number_of(e) for e in dims)))
            for name, dims in params.items()
        )
    )
    dims = {"$" + name: exprs for name, exprs in params.items()}
    return Axes(
        program, tuple(numbered.values()), (BRANCH,), dims, numbered, SIZES, {}, Facts(program)
    )


def test_a_plan_that_fits_is_returned():
    plan = Plan(
        (Cut("hidden", 6, (0, 5)), Cut("d", 4, ((0, 1), (2, 3)), ("kv",)), Cut("kv", 2, (1,))),
        ("layer/mlp",),
        rewrites=("q",),
    )
    assert check(model(), plan) is plan


@pytest.mark.parametrize(
    ("plan", "code", "at", "why"),
    [
        (Plan((Cut("hiden", 6, (0,)),)), Code.PLAN_MISMATCH, "hiden", "no such axis"),
        (Plan((Cut("hidden", 8, (0,)),)), Code.PLAN_MISMATCH, "hidden", "6 indices, the plan was"),
        (Plan(branches=("layer/att",)), Code.PLAN_MISMATCH, "layer/att", "no such branch"),
        (Plan(rewrites=("k",)), Code.PLAN_MISMATCH, "k", "no such parameter"),
        (Plan((Cut("vocab", 9, (0,)),)), Code.PINNED, "embedding", "picked by data"),
        (Plan(renumbered=("vocab",)), Code.PLAN_MISMATCH, "vocab", "that it doesn't cut"),
        (
            Plan((Cut("kv", 2, (0,)),), renumbered=("kv",)),
            Code.PINNED,
            "kv",
            "its indices are not token ids",
        ),
        (Plan((Cut("kv", 2, ()),)), Code.EMPTY_AXIS, "kv", "all of its 2 indices"),
        (Plan((Cut("d", 4, ((), ()), ("kv",)),)), Code.EMPTY_AXIS, "d", "all of its 4 indices"),
        (Plan((Cut("hidden", 6, (2, 1)),)), Code.BAD_PLAN, "hidden", "out of order"),
        (Plan((Cut("hidden", 6, (1, 1)),)), Code.BAD_PLAN, "hidden", "repeat"),
        (Plan((Cut("hidden", 6, (1, 6)),)), Code.BAD_PLAN, "hidden", "outside 0…5"),
        (Plan((Cut("hidden", 6, (-1, 1)),)), Code.BAD_PLAN, "hidden", "outside 0…5"),
        (Plan((Cut("d", 4, ((0, 1), (2,)), ("kv",)),)), Code.BAD_PLAN, "d", "different numbers"),
        (Plan((Cut("d", 4, ((0, 2), (3, 1)), ("kv",)),)), Code.BAD_PLAN, "d", "out of order"),
        (Plan((Cut("d", 4, ((0, 1),), ("kv",)),)), Code.BAD_PLAN, "d", "shape (1,)"),
        (Plan((Cut("d", 4, (0, 1), ("kv",)),)), Code.BAD_PLAN, "d", "its enclosing axes (2,)"),
        (Plan((Cut("d", 4, ((0,), (1,))),)), Code.BAD_PLAN, "d", "its enclosing axes ()"),
        (Plan((Cut("kv", 2, ((0,),) * 6, ("hidden",)),)), Code.BAD_PLAN, "kv", "do not enclose it"),
        (Plan((Cut("d", 4, ((0,),) * 6, ("hidden",)),)), Code.BAD_PLAN, "d", "do not enclose it"),
        (
            Plan((Cut("d", 4, (((0,),) * 2,) * 2, ("kv", "kv")),)),
            Code.BAD_PLAN,
            "d",
            "do not enclose",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Plan, code: Code, at: str, why: str):
    with pytest.raises(SurgeonError) as caught:
        check(model(), plan)
    error = caught.value
    assert (error.code, error.at) == (code, at) and why in error.why
    assert error.try_


def test_a_refusal_carries_its_reason_as_data():
    with pytest.raises(SurgeonError) as pinned:
        check(model(), Plan((Cut("vocab", 9, (0,)),)))
    assert pinned.value.data == {"axis": "vocab", "pins": ["rows are picked by data"]}
    with pytest.raises(SurgeonError) as empty:
        check(model(), Plan((Cut("kv", 2, ()),)))
    assert empty.value.data == {"axis": "kv", "size": 2}


def test_a_mismatch_names_the_nearest():
    with pytest.raises(SurgeonError, match="did you mean hidden"):
        check(model(), Plan((Cut("hiden", 6, (0,)),)))


def test_a_cut_is_sorted_for_each_enclosing_index():
    made = cut(model().get("d"), [[3, 0], [1, 2]], ["kv"])
    assert made == Cut("d", 4, ((0, 3), (1, 2)), ("kv",))
    assert made.count == 2


def test_merging_keeps_all_and_refuses_two_cuts_of_one_axis():
    a = Plan((Cut("kv", 2, (0,)),), ("x",), (("id", "m"),), ("w",))
    b = Plan((Cut("hidden", 6, (0,)),), ("x", "y"))
    both = merged([a, b])
    assert {c.axis for c in both.cuts} == {"kv", "hidden"}
    assert (both.branches, both.rewrites, both.source) == (("x", "y"), ("w",), (("id", "m"),))
    c = Plan((Cut("vocab", 9, (0, 3)),), renumbered=("vocab",))
    assert merged([a, c]) == replace(a, cuts=(*a.cuts, *c.cuts), renumbered=("vocab",))
    with pytest.raises(SurgeonError) as caught:
        merged([a, a])
    assert (caught.value.code, caught.value.at) == (Code.BAD_PLAN, "kv")


# --- index arithmetic against a mask written element by element -------------------------------


def places(expr: Expr) -> Iterator[tuple[tuple[int, int], ...]]:
    """Every element of an expression, in order, as the axis indices on the way to it."""
    if not expr:
        yield ()
        return
    head, rest = expr[0], expr[1:]
    if isinstance(head, Sum):
        first = (place for part in head.parts for place in places(part))
    else:
        first = (((head, i),) for i in range(SIZES[head]))
    for place in first:
        for more in places(rest):
            yield (*place, *more)


def survives(axes: Axes, plan: Plan, place: tuple[tuple[int, int], ...]) -> bool:
    """Whether an element is kept, by looking every one of its indices up."""
    by_number = {axes.number[c.axis]: c for c in plan.cuts}
    seen: dict[int, int] = {}
    for axis, index in place:
        found = by_number.get(axis)
        if found:
            kept: Any = found.kept
            for name in found.outer:
                kept = kept[seen[axes.number[name]]]
            if index not in kept:
                return False
        seen[axis] = index
    return True


ATOM = st.sampled_from([KV, HIDDEN, ROT])
LEAF = st.lists(ATOM, min_size=1, max_size=2).map(tuple)
# `d` only ever appears within `kv`, as the analysis guarantees of an axis that is free in it.
HEADS: st.SearchStrategy[Expr] = st.sampled_from(
    [(KV, D), (KV, Sum(((D,), (D,)))), (KV, ROT, D), (KV, Sum(((ROT,), (D,))))]
)


def _total(parts: list[Expr]) -> Expr:
    return (Sum(tuple(parts)),) if len(parts) > 1 else parts[0]


EXPRS: st.SearchStrategy[Expr] = st.recursive(
    LEAF | HEADS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(_total),
        st.tuples(LEAF, inner).map(lambda pair: pair[0] + pair[1]),
    ),
    max_leaves=4,
).filter(lambda expr: number_of(expr) <= 3000)


@st.composite
def cuts_of(draw: st.DrawFn, axes: Axes) -> Plan:
    found: list[Cut] = []
    for axis in axes.axes:
        if not axis.prunable or draw(st.booleans()):
            continue
        count = draw(st.integers(1, axis.size))
        row = st.permutations(range(axis.size)).map(lambda p, n=count: sorted(p[:n]))
        if axis.outer and draw(st.booleans()):
            sizes = [axes.get(name).size for name in axis.outer]
            rows = np.array([draw(row) for _ in range(int(np.prod(sizes)))])
            found.append(cut(axis, rows.reshape(*sizes, count), axis.outer))
        else:
            found.append(cut(axis, draw(row)))
    return Plan(tuple(found))


@settings(max_examples=150, deadline=None)
@given(EXPRS, st.data())
def test_kept_indices_are_those_of_a_mask_written_element_by_element(expr: Expr, data: Any):
    axes = model()
    plan = data.draw(cuts_of(axes))
    selection = Selection(axes, plan)
    expected = [i for i, place in enumerate(places(expr)) if survives(axes, plan, place)]
    assert selection.indices(expr).tolist() == expected
    assert selection.width(expr) == len(expected)
    assert selection.full_width(expr) == number_of(expr)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_parameters_kept_elements_are_the_masks(data: Any):
    axes = model()
    plan = data.draw(cuts_of(axes))
    selection = Selection(axes, plan)
    for name, dims in PARAMS.items():
        whole: Expr = tuple(f for e in dims for f in e)
        expected = [i for i, place in enumerate(places(whole)) if survives(axes, plan, place)]
        assert selection.flat(name).tolist() == expected
        assert int(np.prod(selection.shape(name))) == len(expected)
        if selection.separable(name):
            sizes = [number_of(e) for e in dims]
            kept = [
                range(n) if k is None else k
                for k, n in zip(selection.kept(name), sizes, strict=True)
            ]
            grid = [int(np.ravel_multi_index(p, sizes)) if p else 0 for p in product(*kept)]
            assert grid == expected


def test_a_choice_by_head_across_dimensions_is_not_separable():
    axes = model()
    own = Selection(axes, Plan((Cut("d", 4, ((0, 1), (2, 3)), ("kv",)),)))
    assert not own.separable("w")
    assert own.separable("o") and own.separable("q")
    assert own.indices((KV, D)).tolist() == [0, 1, 6, 7]
    assert own.shape("w") == (2, 2, 6)
    shared = Selection(axes, Plan((Cut("d", 4, (0, 1)),)))
    assert shared.separable("w")
    # Once one head is left, its own choice is taken.
    one = Selection(axes, Plan((Cut("d", 4, ((0, 1), (2, 3)), ("kv",)), Cut("kv", 2, (1,)))))
    assert one.indices((KV, D)).tolist() == [6, 7]


def test_only_what_is_cut_is_touched():
    selection = Selection(model(), Plan((Cut("rot", 3, (0, 2)),)))
    assert [name for name in PARAMS if any(map(selection.touches, PARAMS[name]))] == ["q"]
    kept = selection.kept("q")
    assert kept[1] is None and kept[0] is not None
    assert kept[0].tolist() == [0, 2, 3, 5, 6, 8, 9, 11]
    assert selection.size(ROT) == 2 and selection.size(KV) == 2


def test_elements_are_counted_before_and_after():
    axes = model()
    plan = Plan((Cut("kv", 2, (1,)), Cut("hidden", 6, (0, 1, 2))))
    assert counts(axes, plan, ["q", "norm", "scalar"]) == (12 * 6 + 6 + 1, 6 * 3 + 3 + 1)


def test_an_empty_plan_is_empty():
    assert Plan().empty
    for plan in (Plan((Cut("a", 1, (0,)),)), Plan(branches=("b",)), Plan(rewrites=("w",))):
        assert not plan.empty and not replace(plan, source=(("id", "m"),)).empty
