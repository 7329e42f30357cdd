"""The program's text form: `parse(to_text(p)) == p` for every valid program."""

from __future__ import annotations

import json
import math
import re
from typing import NoReturn

from surgeon.errors import Code, SurgeonError
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
)

HEADER = "surgeon.program 1"
KINDS = ("parameter", "buffer", "computed", "constant")
DEEPEST = 64
"""Levels of lists in an argument; programs have two."""

LONGEST = 1000
"""Characters of a number or a size; Python itself refuses whole numbers of some thousands."""

_PLAIN = re.compile(r"[A-Za-z0-9_.]+\Z")
_MONOMIAL = re.compile(r"[A-Za-z0-9_*]+\Z")


def _name(name: str) -> str:
    return name if _PLAIN.match(name) else json.dumps(name)


def _size(size: Size) -> str:
    # Sums and functions have commas and brackets of their own.
    text = str(size)
    return text if _MONOMIAL.match(text) else "{" + text + "}"


def _type(type_: TensorType) -> str:
    return f"{type_.dtype}[{', '.join(_size(size) for size in type_.shape)}]"


def _float(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def _arg(arg: Arg) -> str:
    match arg:
        case Ref(name):
            return "%" + _name(name)
        case ParamRef(name):
            return "$" + _name(name)
        case Sym(expr):
            return "{" + expr + "}"
        case DType(name):
            return "#" + name
        case bool() | None:
            return str(arg)
        case int():
            return str(arg)
        case float():
            return _float(arg)
        case str():
            return json.dumps(arg)
        case tuple():
            return "[" + ", ".join(_arg(item) for item in arg) + "]"


def op_text(op: Op) -> str:
    """Returns one operation as one line."""
    left = ", ".join(
        f"%{_name(name)}: {_type(type_)}" for name, type_ in zip(op.outputs, op.types, strict=True)
    )
    parts = [_arg(arg) for arg in op.args]
    parts += [f"{key}={_arg(arg)}" for key, arg in op.kwargs]
    line = f"{left} = {op.target}({', '.join(parts)})"
    if op.module or op.source:
        line += f" @ {json.dumps(op.module)} {json.dumps(op.source)}"
    return line


def to_text(program: Program) -> str:
    """Returns the program as text, one declaration or operation a line."""
    lines = [HEADER]
    lines += [f"meta {json.dumps(key)} {json.dumps(value)}" for key, value in program.meta]
    lines += [f"symbol {symbol}" for symbol in program.symbols]
    lines += [f"guard {json.dumps(guard)}" for guard in program.guards]
    lines += [f"input %{_name(i.name)}: {_type(i.type)}" for i in program.inputs]
    for p in program.params:
        tied = " = " + ", ".join("$" + _name(alias) for alias in p.aliases) if p.aliases else ""
        lines.append(f"{p.kind} ${_name(p.name)}: {_type(p.type)}{tied}")
    lines += [op_text(op) for op in program.ops]
    lines.append("return " + ", ".join("%" + _name(name) for name in program.outputs))
    return "\n".join(lines) + "\n"


_TOKEN = re.compile(
    r"""\s*(?:
      (?P<value>[%$](?:[A-Za-z0-9_.]+|"(?:[^"\\]|\\.)*"))
    | (?P<sym>\{[^}]*\})
    | (?P<dtype>\#[a-z0-9_]+)
    | (?P<string>"(?:[^"\\]|\\.)*")
    | (?P<number>-?(?:inf|nan|\d+\.?\d*(?:[eE][-+]?\d+)?)(?![A-Za-z0-9_.]))
    | (?P<word>[A-Za-z_][A-Za-z0-9_.]*)
    | (?P<punct>[\[\](),=:@])
    )""",
    re.VERBOSE,
)
_SIZE = re.compile(r"\s*(?:\{([^}]*)\}|(-?[A-Za-z0-9_*]+))\s*")


class _Line:
    """A cursor over the tokens of one line."""

    def __init__(self, text: str, number: int) -> None:
        self.text, self.number, self.pos = text, number, 0
        self.move(0)

    def move(self, pos: int) -> None:
        """Puts the cursor on the first token from `pos` on."""
        rest = self.text[pos:]
        self.pos = pos + len(rest) - len(rest.lstrip())

    def fail(self, why: str) -> NoReturn:
        raise SurgeonError(
            Code.BAD_TEXT,
            "the text is not a program",
            at=f"line {self.number}, column {self.pos + 1}: {self.text.strip()[:80]}",
            why=why,
            try_="print a program with `surgeon ir MODEL` and compare",
        )

    def peek(self) -> tuple[str, str]:
        match = _TOKEN.match(self.text, self.pos)
        if match is None:
            if self.text[self.pos :].strip():
                self.fail("no token of the program's grammar starts here")
            return "end", ""
        return match.lastgroup or "", match.group(match.lastgroup or 0)

    def take(self, kind: str | None = None, text: str | None = None) -> str:
        found, value = self.peek()
        if (kind and found != kind) or (text is not None and value != text) or found == "end":
            self.fail(f"expected {text or kind or 'more'}, found {value or 'the end of the line'}")
        match = _TOKEN.match(self.text, self.pos)
        assert match is not None
        self.move(match.end())
        return value

    def accept(self, text: str) -> bool:
        if self.peek()[1] == text:
            self.take()
            return True
        return False

    def name(self, sigil: str) -> str:
        kind, token = self.peek()
        if kind != "value" or token[0] != sigil:
            self.fail(f"expected a name that starts with {sigil}")
        name = self.unquote(token[1:])
        self.take()
        return name

    def unquote(self, text: str) -> str:
        if not text.startswith('"'):
            return text
        try:
            return str(json.loads(text))
        except ValueError as error:
            self.fail(f"the string has a fault: {error}")

    def string(self) -> str:
        kind, token = self.peek()
        if kind != "string":
            self.fail(f"expected string, found {token or 'the end of the line'}")
        text = self.unquote(token)
        self.take()
        return text

    def type(self) -> TensorType:
        dtype = self.take("word")
        self.take(text="[")
        sizes: list[Size] = []
        while not self.accept("]"):
            match = _SIZE.match(self.text, self.pos)
            if match is None:
                self.fail("a size is missing" if sizes else "a shape is not closed")
            expression, plain = match.groups()
            if len(plain or "") > LONGEST:
                self.fail(f"a size has more than {LONGEST} characters")
            sizes.append(int(plain) if re.fullmatch(r"-?\d+", plain or "") else expression or plain)
            self.move(match.end())
            if self.peek()[1] not in (",", "]"):
                self.fail("a shape is not closed")
            if self.accept(",") and self.peek()[1] == "]":
                self.fail("a size is missing")
        return TensorType(dtype, tuple(sizes))

    def arg(self, depth: int = 0) -> Arg:
        kind, value = self.peek()
        if kind == "value":
            name = self.unquote(value[1:])
            self.take()
            return Ref(name) if value[0] == "%" else ParamRef(name)
        if kind == "sym":
            self.take()
            return Sym(value[1:-1])
        if kind == "dtype":
            self.take()
            return DType(value[1:])
        if kind == "string":
            return self.string()
        if kind == "number":
            if len(value) > LONGEST:
                self.fail(f"a number has more than {LONGEST} characters")
            self.take()
            return _number(value)
        if kind == "word" and value in ("True", "False", "None"):
            self.take()
            return {"True": True, "False": False, "None": None}[value]
        if value == "[":
            if depth > DEEPEST:
                self.fail(f"lists are more than {DEEPEST} levels deep")
            self.take()
            items: list[Arg] = []
            while not self.accept("]"):
                items.append(self.arg(depth + 1))
                if not self.accept(",") and self.peek()[1] != "]":
                    self.fail("a list is not closed")
            return tuple(items)
        self.fail("expected an argument")


def _number(text: str) -> int | float:
    return int(text) if re.fullmatch(r"-?\d+", text) else float(text)


def _op(line: _Line) -> Op:
    outputs: list[str] = []
    types: list[TensorType] = []
    while True:
        outputs.append(line.name("%"))
        line.take(text=":")
        types.append(line.type())
        if not line.accept(","):
            break
    line.take(text="=")
    target = line.take("word")
    line.take(text="(")
    args: list[Arg] = []
    kwargs: list[tuple[str, Arg]] = []
    while not line.accept(")"):
        kind, word = line.peek()
        if kind == "word" and word not in ("True", "False", "None"):
            line.take()
            line.take(text="=")
            kwargs.append((word, line.arg()))
        else:
            args.append(line.arg())
        if not line.accept(",") and line.peek()[1] != ")":
            line.fail("the arguments are not closed")
    module = source = ""
    if line.accept("@"):
        module = line.string()
        source = line.string()
    return Op(tuple(outputs), tuple(types), target, tuple(args), tuple(kwargs), module, source)


def _param(line: _Line, kind: str) -> Param:
    name = line.name("$")
    line.take(text=":")
    type_ = line.type()
    aliases: list[str] = []
    if line.accept("="):
        aliases.append(line.name("$"))
        while line.accept(","):
            aliases.append(line.name("$"))
    return Param(name, type_, kind, tuple(aliases))


def parse(text: str) -> Program:
    """Returns the program that `text` spells.

    Raises:
        SurgeonError: `bad-text`, with the line and column of the first fault.
    """
    lines = text.splitlines()
    if not lines or lines[0].strip() != HEADER:
        _Line(lines[0] if lines else "", 1).fail(f"the first line must be `{HEADER}`")
    meta: list[tuple[str, str]] = []
    symbols: list[str] = []
    guards: list[str] = []
    inputs: list[Input] = []
    params: list[Param] = []
    ops: list[Op] = []
    outputs: tuple[str, ...] | None = None
    for number, raw in enumerate(lines[1:], 2):
        if not raw.strip():
            continue
        line = _Line(raw, number)
        kind, word = line.peek()
        line_start = line.pos
        if outputs is not None:
            line.fail("nothing may follow `return`")
        if kind == "value":
            ops.append(_op(line))
        elif kind != "word":
            line.fail("expected a declaration or an operation")
        else:
            line.take()
            if word == "meta":
                meta.append((line.string(), line.string()))
            elif word == "symbol":
                symbols.append(line.take("word"))
            elif word == "guard":
                guards.append(line.string())
            elif word == "input":
                name = line.name("%")
                line.take(text=":")
                inputs.append(Input(name, line.type()))
            elif word in KINDS:
                params.append(_param(line, word))
            elif word == "return":
                names: list[str] = []
                while line.peek()[0] != "end" and (not names or line.accept(",")):
                    names.append(line.name("%"))
                outputs = tuple(names)
            else:
                line.move(line_start)
                line.fail(f"`{word}` declares nothing")
        if line.peek()[0] != "end":
            line.fail("the line goes on after its end")
    if outputs is None:
        _Line("", len(lines) + 1).fail("the program has no `return`")
    return Program(
        tuple(symbols),
        tuple(inputs),
        tuple(params),
        tuple(ops),
        outputs,
        tuple(guards),
        tuple(meta),
    )
