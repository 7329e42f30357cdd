"""Each condition of the validity table is broken once, and names the value that breaks it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from surgeon.errors import Code, SurgeonError
from surgeon.ir import Program, parse, verify
from surgeon.ir.verify import VALIDITY

HEAD = "surgeon.program 1\nsymbol batch\ninput %x: f32[batch, 4]\n"

# (condition, the first offending value, what is said of it, declarations and operations).
BROKEN: dict[str, tuple[str, str, str, str]] = {
    "two inputs of one name": (
        "every name is defined once",
        "%x",
        "defined twice",
        "input %x: f32[2]\nreturn %x",
    ),
    "a value of an input's name": (
        "every name is defined once",
        "%x",
        "defined twice",
        "%x: f32[batch, 4] = aten.neg.default(%x)\nreturn %x",
    ),
    "an alias of another parameter's name": (
        "every name is defined once",
        "$w",
        "defined twice",
        "parameter $v: f32[4] = $w\nparameter $w: f32[4]\nreturn %x",
    ),
    "a use before the definition": (
        "every use follows its definition",
        "%y",
        "reads %z, which no earlier line defines",
        "%y: f32[batch, 4] = aten.neg.default(%z)\n"
        "%z: f32[batch, 4] = aten.neg.default(%x)\nreturn %y",
    ),
    "a use inside a list inside a keyword": (
        "every use follows its definition",
        "%y",
        "reads %gone",
        "%y: f32[batch, 4] = f(%x, also=[1, [%gone]])\nreturn %y",
    ),
    "a parameter that is not declared": (
        "every use follows its definition",
        "%y",
        "reads $w, which is not declared",
        "%y: f32[batch, 4] = aten.mul.Tensor(%x, $w)\nreturn %y",
    ),
    "a use of an alias": (
        "every use follows its definition",
        "%y",
        "reads $w, which is not declared",
        "parameter $v: f32[4] = $w\n%y: f32[batch, 4] = aten.mul.Tensor(%x, $w)\nreturn %y",
    ),
    "an undefined result": (
        "every use follows its definition",
        "%y",
        "returned and never defined",
        "return %x, %y",
    ),
    "no result": ("every use follows its definition", "return", "returns nothing", "return "),
    "an unknown element type": (
        "every element type is known",
        "%y",
        "f33 is no element type",
        "%y: f33[batch, 4] = aten.neg.default(%x)\nreturn %y",
    ),
    "a negative size": (
        "every size is a number or made of declared symbols",
        "$w",
        "the size -3",
        "parameter $w: f32[-3]\nreturn %x",
    ),
    "a symbol that is not declared": (
        "every size is a number or made of declared symbols",
        "%y",
        "uses seq, which is no declared symbol",
        "%y: f32[batch, {Max(2,seq)}] = f(%x)\nreturn %y",
    ),
    "an argument of an undeclared symbol": (
        "every symbolic argument is made of declared symbols",
        "%y",
        "uses seq, no declared symbol",
        "%y: f32[batch, 4] = f(%x, [{batch*seq}])\nreturn %y",
    ),
    "a parameter of dynamic size": (
        "every parameter is static",
        "$w",
        "must be numbers",
        "parameter $w: f32[batch]\nreturn %x",
    ),
    "a weight that is wider than its input": (
        "operand shapes agree",
        "%y",
        "its input is 4 wide and its weight wants 5",
        "parameter $w: f32[6, 5]\n%y: f32[batch, 6] = aten.linear.default(%x, $w)\nreturn %y",
    ),
    "a linear's wrong result": (
        "operand shapes agree",
        "%y",
        "does not follow from its operands",
        "parameter $w: f32[6, 4]\n%y: f32[batch, 7] = aten.linear.default(%x, $w)\nreturn %y",
    ),
    "a linear without a weight": (
        "operand shapes agree",
        "%y",
        "operand 1 is no tensor",
        "%y: f32[batch, 6] = aten.linear.default(%x)\nreturn %y",
    ),
    "a linear of a number": (
        "operand shapes agree",
        "%y",
        "operand 1 has 0 dimensions",
        "parameter $w: f32[]\n%y: f32[batch, 6] = aten.linear.default(%x, $w)\nreturn %y",
    ),
    "an embedding's wrong result": (
        "operand shapes agree",
        "%y",
        "does not follow from its operands",
        "parameter $w: f32[9, 4]\n%y: f32[batch, 4] = aten.embedding.default($w, %x)\nreturn %y",
    ),
    "queries wider than keys": (
        "operand shapes agree",
        "%y",
        "queries are 8 wide and keys 4",
        "input %q: f32[1, 4, 3, 8]\ninput %k: f32[1, 2, 3, 4]\n"
        "%y: f32[1, 4, 3, 4] = surgeon.attention(%q, %k, %k, None)\nreturn %y",
    ),
    "more key heads than value heads": (
        "operand shapes agree",
        "%y",
        "there are 2 key heads and 1 value heads",
        "input %q: f32[1, 4, 3, 8]\ninput %k: f32[1, 2, 3, 8]\ninput %v: f32[1, 1, 3, 8]\n"
        "%y: f32[1, 4, 3, 8] = surgeon.attention(%q, %k, %v, None)\nreturn %y",
    ),
    "query heads that key heads don't divide": (
        "operand shapes agree",
        "%y",
        "4 query heads are no multiple of 3",
        "input %q: f32[1, 4, 3, 8]\ninput %k: f32[1, 3, 3, 8]\n"
        "%y: f32[1, 4, 3, 8] = surgeon.attention(%q, %k, %k, None)\nreturn %y",
    ),
    "attention without heads": (
        "operand shapes agree",
        "%y",
        "operand 1 has 3 dimensions",
        "input %q: f32[1, 4, 3, 8]\ninput %k: f32[2, 3, 8]\n"
        "%y: f32[1, 4, 3, 8] = surgeon.attention(%q, %k, %k, None)\nreturn %y",
    ),
}


def refused(program: Program) -> SurgeonError:
    with pytest.raises(SurgeonError) as caught:
        verify(program)
    assert caught.value.code is Code.BAD_PROGRAM
    return caught.value


@pytest.mark.parametrize("condition, value, why, body", BROKEN.values(), ids=BROKEN)
def test_a_broken_condition_names_the_value(condition: str, value: str, why: str, body: str):
    error = refused(parse(HEAD + body + "\n"))
    assert error.data == {"value": value, "condition": condition}
    assert error.at == value and why in error.why


ONE = HEAD + "%y: f32[batch, 4] = aten.neg.default(%x)\nreturn %y\n"


@pytest.mark.parametrize("types", [(), 2])
def test_as_many_types_as_results(types: object):
    program = parse(ONE)
    op = program.ops[0]
    broken = replace(op, types=op.types * 2 if types else ())
    error = refused(replace(program, ops=(broken,)))
    assert error.data == {
        "value": "%y",
        "condition": "every operation has as many types as results",
    }


def test_an_operation_without_results_is_named_by_its_target():
    program = parse(ONE)
    error = refused(replace(program, ops=(replace(program.ops[0], outputs=(), types=()),)))
    assert error.data["value"] == "aten.neg.default"


def test_an_unknown_kind_of_parameter():
    program = parse(HEAD + "parameter $w: f32[4]\nreturn %x\n")
    error = refused(replace(program, params=(replace(program.params[0], kind="weight"),)))
    assert error.data == {"value": "$w", "condition": "every parameter is static"}


def test_the_first_offending_value_is_named():
    text = HEAD + "%y: f32[batch] = f(%p)\n%z: f32[batch] = f(%q)\nreturn %z\n"
    assert refused(parse(text)).at == "%y"


def test_every_row_of_the_table_is_tested():
    tested = {condition for condition, *_ in BROKEN.values()}
    tested.add("every operation has as many types as results")
    assert tested == {condition for condition, _ in VALIDITY}


def test_a_good_program_is_returned():
    program = parse(ONE)
    assert verify(program) is program
