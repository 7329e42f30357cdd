"""The text form, and where it says that a text is wrong."""

from __future__ import annotations

import pytest

from surgeon.errors import Code, SurgeonError
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
)

TEXT = """\
surgeon.program 1
meta "class" "Tiny"
symbol batch
guard "batch > 1"
input %x: f32[batch, 4]
parameter $fc.weight: f32[6, 4] = $head.weight
computed $"odd name": f32[]
%linear: f32[batch, 6] = aten.linear.default(%x, $fc.weight, None) @ "fc" "tiny.py:3"
%a: f32[batch, 2], %b: f32[batch, 4] = aten.split_with_sizes.default(%linear, [2, 4], dim=-1)
%to: bool[{Max(2,batch)}] = aten.to.dtype(%a, #bool, {batch*2}, [True, 1.0, 1e-05, "]\\"%"])
return %b, %to
"""

PROGRAM = Program(
    ("batch",),
    (Input("x", TensorType("f32", ("batch", 4))),),
    (
        Param("fc.weight", TensorType("f32", (6, 4)), "parameter", ("head.weight",)),
        Param("odd name", TensorType("f32", ()), "computed"),
    ),
    (
        Op(
            ("linear",),
            (TensorType("f32", ("batch", 6)),),
            "aten.linear.default",
            (Ref("x"), ParamRef("fc.weight"), None),
            (),
            "fc",
            "tiny.py:3",
        ),
        Op(
            ("a", "b"),
            (TensorType("f32", ("batch", 2)), TensorType("f32", ("batch", 4))),
            "aten.split_with_sizes.default",
            (Ref("linear"), (2, 4)),
            (("dim", -1),),
        ),
        Op(
            ("to",),
            (TensorType("bool", ("Max(2,batch)",)),),
            "aten.to.dtype",
            (Ref("a"), DType("bool"), Sym("batch*2"), (True, 1.0, 1e-05, ']"%')),
        ),
    ),
    ("b", "to"),
    ("batch > 1",),
    (("class", "Tiny"),),
)


def test_a_program_prints_as_this():
    assert to_text(PROGRAM) == TEXT


def test_this_parses_as_a_program():
    assert parse(TEXT) == PROGRAM


def test_blank_lines_and_indentation_mean_nothing():
    assert parse("\n\n".join("  " + line for line in TEXT.splitlines()).strip()) == PROGRAM


HEAD = "surgeon.program 1\ninput %x: f32[4]\n"
BAD = {
    "no header": ("input %x: f32[4]\nreturn %x\n", 1, 1, "the first line must be"),
    "empty": ("", 1, 1, "the first line must be"),
    "another version": ("surgeon.program 2\nreturn %x\n", 1, 1, "the first line must be"),
    "unknown declaration": (HEAD + "tensor $w: f32[2]\n", 3, 1, "`tensor` declares nothing"),
    "no token": (HEAD + "%y: f32[4] = aten.neg.default(;)\n", 3, 31, "no token"),
    "wrong sigil": (HEAD + "%y: f32[4] = aten.neg.default(%x) @ 3 4", 3, 37, "expected string"),
    "input with a parameter's sigil": (HEAD + "input $w: f32[2]", 3, 7, "starts with %"),
    "no colon": (HEAD + "%y = aten.neg.default(%x)", 3, 4, "expected :"),
    "open shape": (HEAD + "%y: f32[4 = aten.neg.default(%x)", 3, 11, "a shape is not closed"),
    "open list": (HEAD + "%y: f32[4] = aten.neg.default([1 2])", 3, 34, "a list is not closed"),
    "open call": (HEAD + "%y: f32[4] = aten.neg.default(%x", 3, 33, "the arguments are not"),
    "two arguments without comma": (HEAD + "%y: f32[4] = f(%x %x)", 3, 19, "the arguments are"),
    "no argument": (HEAD + "%y: f32[4] = f(=)", 3, 16, "expected an argument"),
    "a word for an argument": (HEAD + "%y: f32[4] = f([x])", 3, 17, "expected an argument"),
    "glued number": (HEAD + "%y: f32[4] = f(12ab)", 3, 16, "no token"),
    "trailing text": (HEAD + "return %x 3\n", 3, 11, "goes on"),
    "two values in a row": (HEAD + "return %x %x\n", 3, 11, "goes on"),
    "after return": (HEAD + "return %x\n%y: f32[4] = f(%x)\n", 4, 1, "nothing may follow"),
    "no return": (HEAD, 3, 1, "has no `return`"),
    "bad escape in a string": (HEAD + 'guard "\\q"', 3, 7, "escape"),
    "bad escape in a name": (HEAD + '%y: f32[4] = f(%"\\q")', 3, 16, "escape"),
    "empty size": (HEAD + "%y: f32[4, ] = f(%x)", 3, 12, "a size is missing"),
}


@pytest.mark.parametrize("text, line, column, why", BAD.values(), ids=BAD)
def test_a_fault_is_given_by_line_and_column(text: str, line: int, column: int, why: str):
    with pytest.raises(SurgeonError) as caught:
        parse(text)
    assert caught.value.code is Code.BAD_TEXT
    assert caught.value.at.startswith(f"line {line}, column {column}:")
    assert why in caught.value.why
