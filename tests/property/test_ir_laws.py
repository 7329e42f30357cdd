"""Every valid program survives being printed and parsed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgeon.ir import (
    DType,
    Input,
    Op,
    Param,
    ParamRef,
    Program,
    Ref,
    Sym,
    TensorType,
    parse,
    to_text,
    verify,
)
from surgeon.ir.text import KINDS
from surgeon.ir.verify import DTYPES

# Plain names, names with spaces, quotes, backslashes, newlines and other scripts.
NAMES = st.one_of(st.from_regex(r"[A-Za-z0-9_.]{1,8}", fullmatch=True), st.text(max_size=6))
WORDS = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)
FLOATS = st.floats(allow_nan=False)
DTYPE = st.sampled_from(sorted(DTYPES))
SCALARS = st.one_of(
    DTYPE.map(DType), st.booleans() | st.none(), st.integers(), FLOATS, st.text(max_size=8)
)


def expressions(symbols: tuple[str, ...]) -> st.SearchStrategy[str]:
    """Sizes as capture writes them: no spaces, and functions with several arguments."""
    leaf = st.sampled_from(symbols) if symbols else st.just("7")
    return st.one_of(
        leaf,
        st.builds("{}*{}".format, st.integers(2, 9), leaf),
        st.builds("{}+{}".format, leaf, st.integers(1, 9)),
        st.builds("({}//{})".format, leaf, st.integers(2, 9)),
        st.builds("Max({},{})".format, st.integers(1, 9), leaf),
        st.builds("Mod({},Min({},{}))".format, leaf, leaf, st.integers(2, 9)),
    )


@st.composite
def programs(draw: st.DrawFn) -> Program:
    symbols = tuple(draw(st.lists(WORDS, max_size=3, unique=True)))
    size = st.integers(0, 99) | expressions(symbols) if symbols else st.integers(0, 99)
    shape = st.lists(size, max_size=4).map(tuple)
    tensor = st.builds(TensorType, DTYPE, shape)
    static = st.builds(TensorType, DTYPE, st.lists(st.integers(0, 99), max_size=3).map(tuple))
    values = draw(st.lists(NAMES, min_size=1, max_size=9, unique=True))
    stored = draw(st.lists(NAMES, max_size=6, unique=True))

    params: list[Param] = []
    while stored:
        own, *aliases = [stored.pop() for _ in range(draw(st.integers(1, len(stored))))]
        kind = draw(st.sampled_from(KINDS))
        params.append(Param(own, draw(static), kind, tuple(aliases)))
    given_inputs = draw(st.integers(1, len(values)))
    inputs = tuple(Input(name, draw(tensor)) for name in values[:given_inputs])

    literal = st.one_of(
        *([st.sampled_from(params).map(lambda p: ParamRef(p.name))] if params else []),
        *([expressions(symbols).map(Sym)] if symbols else []),
        SCALARS,
    )
    known, ops = list(values[:given_inputs]), list[Op]()
    rest = values[given_inputs:]
    while rest:
        outputs = [rest.pop(0) for _ in range(draw(st.integers(1, len(rest))))]
        leaf = literal | st.sampled_from(known).map(Ref)
        arg = leaf | st.lists(leaf | st.lists(leaf, max_size=3).map(tuple), max_size=3).map(tuple)
        keys = draw(st.lists(WORDS, max_size=2, unique=True))
        ops.append(
            Op(
                tuple(outputs),
                tuple(draw(tensor) for _ in outputs),
                draw(st.sampled_from(["aten.mul.Tensor", "aten.__and__.Tensor", "my_lib.f"])),
                tuple(draw(st.lists(arg, max_size=4))),
                tuple((key, draw(arg)) for key in keys),
                draw(st.one_of(st.just(""), st.text(max_size=8))),
                draw(st.one_of(st.just(""), st.text(max_size=8))),
            )
        )
        known += outputs
    pairs = st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4)), max_size=2)
    return Program(
        symbols,
        inputs,
        tuple(params),
        tuple(ops),
        tuple(draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))),
        tuple(draw(st.lists(st.text(max_size=8), max_size=2))),
        tuple(draw(pairs)),
    )


def alike(left: object, right: object) -> bool:
    """Equality that tells True from 1, 1 from 1.0 and 0.0 from -0.0."""
    return left == right and repr(left) == repr(right)


def survives(program: Program) -> None:
    assert verify(program) is program
    text = to_text(program)
    again = parse(text)
    assert alike(again, program)
    assert to_text(again) == text


@settings(max_examples=40, deadline=None)
@given(programs())
def test_a_valid_program_survives_print_and_parse(program: Program):
    survives(program)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(programs())
def test_many_valid_programs_survive_print_and_parse(program: Program):
    survives(program)


@settings(max_examples=15, deadline=None)
@given(programs())
def test_the_text_is_one_line_a_declaration(program: Program):
    count = 2 + len(program.meta) + len(program.symbols) + len(program.guards)
    count += len(program.inputs) + len(program.params) + len(program.ops)
    assert len(to_text(program).splitlines()) == count


@settings(max_examples=15, deadline=None)
@given(programs())
def test_dead_code_goes_and_live_code_stays(program: Program):
    alive = program.without_dead_code()
    assert verify(alive).outputs == program.outputs
    assert alive.without_dead_code() == alive
    assert set(alive.ops) <= set(program.ops)
    read = set(alive.outputs)
    for op in reversed(alive.ops):
        assert not read.isdisjoint(op.outputs)
        read |= {name for name, users in alive.consumers.items() if alive.ops.index(op) in users}
    assert {p.name for p in alive.params} == set(alive.readers)


@settings(max_examples=10, deadline=None)
@given(programs(), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_the_numbers_that_are_none_survive_as_well(program: Program, value: float):
    op = Op(("last",), (TensorType("f32", ()),), "aten.full.default", ((), value))
    program = replace(program, inputs=(), params=(), ops=(op,), outputs=("last",))
    assert repr(parse(to_text(program))) == repr(program)
