"""Axis expressions by example: how equations refine axes, and which have no solution."""

from __future__ import annotations

import pytest

from surgeon.axes.space import Clash, Expr, Extent, Space, Sum, leaves, occurrences


def text(space: Space, expr: Expr) -> str:
    """An expression with its axes lettered by first appearance: `a:4 × (b:2 + b:2)`."""
    names: dict[int, str] = {}

    def walk(expr: Expr) -> str:
        parts: list[str] = []
        for factor in expr:
            if isinstance(factor, Sum):
                parts.append("(" + " + ".join(walk(part) for part in factor.parts) + ")")
            else:
                name = names.setdefault(factor, "abcdefghijk"[len(names)])
                parts.append(f"{name}:{space.extents[factor]}")
        return " × ".join(parts) or "1"

    return walk(space.resolve(expr))


def axes(space: Space, *sizes: int | str) -> list[Expr]:
    return [(space.fresh(size),) for size in sizes]


def test_equal_sizes_become_one_axis():
    s = Space()
    x, y, z = axes(s, 4, 4, 4)
    s.unify(x, y)
    assert s.resolve(x) == s.resolve(y) != s.resolve(z)


def test_a_factor_in_front_splits_the_larger():
    s = Space()
    x, y, z = axes(s, 12, 4, 3)
    s.unify(x, y + z)
    assert text(s, x) == "a:4 × b:3" and s.resolve(x) == s.resolve(y + z)


def test_two_products_are_cut_at_the_union_of_their_places():
    s = Space()
    x, y, z, w = axes(s, 4, 6, 2, 12)
    s.unify(x + y, z + w)
    assert text(s, x + y) == "a:2 × b:2 × c:6"
    assert text(s, w) == "a:2 × b:6"


def test_an_axis_becomes_the_sum_it_is_equated_with():
    s = Space()
    x, y, z = axes(s, 10, 4, 6)
    s.unify(x, (Sum((y, z)),))
    assert text(s, x) == "(a:4 + b:6)"


def test_two_sums_are_cut_at_the_union_of_their_boundaries():
    s = Space()
    x, y, z, w = axes(s, 4, 6, 7, 3)
    s.unify((Sum((x, y)),), (Sum((z, w)),))
    assert text(s, x + y) == "a:4 × (b:3 + c:3)"
    assert text(s, z) == "(a:4 + b:3)"


def test_a_sum_in_front_of_a_product():
    s = Space()
    x, y, z, w = axes(s, 15, 2, 3, 3)
    s.unify(x, (Sum((y, z)),) + w)
    assert text(s, x) == "(a:2 + b:3) × c:3"


def test_halves_that_are_swapped_are_one_axis():
    s = Space()
    x, y, z = axes(s, 8, 4, 4)
    s.unify(x, (Sum((y, z)),))
    s.unify((Sum((y, z)),), (Sum((z, y)),))
    assert text(s, x) == "(a:4 + a:4)"


def test_a_part_that_was_cut_where_it_stood_before_is_cut_again():
    s = Space()
    x, y, z, w = axes(s, 6, 2, 8, 2)
    s.unify((Sum((x, x)),), (Sum((y, z, w)),))
    assert text(s, x) == "(a:2 + b:2 + c:2)"
    assert text(s, x + z) == "(a:2 + b:2 + c:2) × (b:2 + c:2 + a:2 + b:2)"
    assert s.resolve(x) == (Sum((s.resolve(y), s.resolve(x)[0].parts[1], s.resolve(w))),)


def test_sums_of_sums_are_flat():
    s = Space()
    x, y, z = axes(s, 2, 3, 4)
    assert text(s, (Sum(((Sum((x, y)),), z)),)) == "(a:2 + b:3 + c:4)"


def test_size_one_is_the_empty_product():
    s = Space()
    one, x, y = axes(s, 1, 4, 4)
    s.unify(one + x, y + one)
    assert s.resolve(one) == () and s.resolve(x) == s.resolve(y)
    s.unify(one, ())


def test_dynamic_sizes_cancel_symbol_by_symbol():
    s = Space()
    x, b, t, h = axes(s, "3*batch*seq", "batch", "seq", 3)
    s.unify(x, b + t + h)
    assert text(s, x) == "a:batch × b:seq × c:3"


REFUSED = {
    "different sizes": (lambda s: axes(s, 4, 6), "places that don't nest"),
    "a factor too many": (
        lambda s: [sum(axes(s, 2, 3), ()), axes(s, 2)[0]],
        "sizes differ: 6 and 2",
    ),
    "places that don't nest": (
        lambda s: [sum(axes(s, 4, 3), ()), sum(axes(s, 6, 2), ())],
        "4 and 6 cut the same dimension at places that don't nest",
    ),
    "a cut inside a product": (
        lambda s: [(Sum((sum(axes(s, 2, 3), ()), axes(s, 4)[0])),), (Sum(tuple(axes(s, 4, 6))),)],
        "a cut at 4 falls inside the product 6",
    ),
    "sums of different sizes": (
        lambda s: [(Sum(tuple(axes(s, 4, 6))),), (Sum(tuple(axes(s, 4, 5))),)],
        "don't nest",
    ),
    "a dynamic cut": (
        lambda s: [(Sum(tuple(axes(s, "n", 2))),), (Sum(tuple(axes(s, 2, "n"))),)],
        "n + 2 and 2 + n",
    ),
    "two symbols": (lambda s: axes(s, "batch", "seq"), "batch and seq"),
}


@pytest.mark.parametrize("make, why", REFUSED.values(), ids=REFUSED)
def test_what_has_no_common_refinement_is_refused(make, why):
    s = Space()
    left, right = make(s)
    before = s.resolve(left), s.resolve(right)
    for a, b in ((left, right), (right, left)):
        with pytest.raises(Clash):
            s.unify(a, b)
        assert (s.resolve(left), s.resolve(right)) == before
    with pytest.raises(Clash) as caught:
        s.unify(left, right)
    assert why in str(caught.value)


def test_a_failure_undoes_what_it_had_done():
    s = Space()
    x, y, z, w = axes(s, 12, 5, 3, 7)
    v, u = axes(s, 12, 5)
    before = [s.resolve(e) for e in (x, y, z, w, v, u)]
    # The first factors can be equated, and have been by the time the second ones can't.
    with pytest.raises(Clash):
        s.unify(x + y + w, v + z + w)
    assert [s.resolve(e) for e in (x, y, z, w, v, u)] == before
    s.unify(x + y, v + u)
    assert s.resolve(x) == s.resolve(v) and s.resolve(y) == s.resolve(u)


def test_an_axis_cannot_contain_itself():
    s = Space()
    x, y, none = axes(s, 6, 6, 0)
    with pytest.raises(Clash, match="contain itself"):
        s.unify(x, (Sum((x, none)),))
    s.unify(x, y)


def test_an_extent_is_a_number_times_symbols():
    assert Extent.of("2*seq*batch*3") == Extent(6, ("batch", "seq"))
    assert Extent.of("seq+1") == Extent(1, ("seq+1",))
    assert Extent.of("4*seq").over(Extent.of("2*seq")) == Extent(2)
    assert Extent.of("4*seq").over(Extent.of("batch")) is None
    assert Extent.of(7).over(Extent.of(0)) is None
    assert str(Extent.of("seq*2")) == "2*seq" and Extent.of("n").dynamic and Extent.of(1).one


def test_occurrences_know_what_encloses_them():
    expr: Expr = (0, Sum(((1, 2), (3,))), 4)
    assert dict(occurrences(expr)) == {0: (), 1: (0,), 2: (0, 1), 3: (0,), 4: (0,)}
    assert list(leaves(expr)) == [0, 1, 2, 3, 4]
