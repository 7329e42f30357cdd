"""The program: values, operations and parameters as frozen metadata, without tensors."""

from surgeon.ir.program import (
    Arg,
    DType,
    Input,
    Op,
    Param,
    ParamRef,
    Program,
    Ref,
    Size,
    Sym,
    TensorType,
    refs,
    substitute,
)
from surgeon.ir.text import parse, to_text
from surgeon.ir.verify import verify

__all__ = [
    "Arg",
    "DType",
    "Input",
    "Op",
    "Param",
    "ParamRef",
    "Program",
    "Ref",
    "Size",
    "Sym",
    "TensorType",
    "parse",
    "refs",
    "substitute",
    "to_text",
    "verify",
]
