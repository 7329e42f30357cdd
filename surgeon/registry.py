"""Passes are found by entry point and file name, and loaded when asked for.

Listing reads source text and imports nothing, so that `surgeon passes` is quick and a plug-in whose
dependencies are missing can still be listed.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import textwrap
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgeon.errors import Code, SurgeonError, near
from surgeon.ops.plugins import folders, plugins
from surgeon.plugin import KINDS, Pass


@dataclasses.dataclass(frozen=True)
class PassInfo:
    """A pass as its file shows it, before anything is imported."""

    kind: str
    name: str
    """The file's name without its ending."""
    plugin: str
    """The entry point that brought it."""
    module: str
    path: Path
    summary: str
    """The first line of the file's docstring."""


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a pass: a recipe key and a command-line option."""

    name: str
    type: Any
    default: Any
    """`dataclasses.MISSING` if the option has to be given."""
    doc: str

    @property
    def required(self) -> bool:
        """Whether the option has no default."""
        return self.default is dataclasses.MISSING

    @property
    def type_text(self) -> str:
        """The type as it is written in source."""
        return _type_text(self.type)


def available() -> dict[str, dict[str, PassInfo]]:
    """Returns every installed pass by kind and name, both sorted, without importing any.

    Raises:
        SurgeonError: `BAD_PASS` where two plug-ins bring a pass of one kind and name or a pass's
            file doesn't parse, `MISSING_FILE` where a plug-in's package is missing.
    """
    found: dict[str, dict[str, PassInfo]] = {kind: {} for kind in KINDS}
    for package, plugin in plugins():
        for folder in folders(package, plugin):
            for kind in KINDS:
                for file in sorted((folder / kind).glob("*.py")):
                    if file.name.startswith("_"):
                        continue
                    info = PassInfo(
                        kind=kind,
                        name=file.stem,
                        plugin=plugin,
                        module=f"{package}.{kind}.{file.stem}",
                        path=file,
                        summary=_summary(file, plugin),
                    )
                    twin = found[kind].setdefault(file.stem, info)
                    if twin.path != info.path:
                        raise _conflict(twin, info)
    return {kind: dict(sorted(passes.items())) for kind, passes in found.items()}


def find(kind: str, name: str) -> PassInfo:
    """Returns the pass of this kind and name; hyphens and underscores in the name are the same.

    Raises:
        SurgeonError: `NO_SUCH_PASS`, with the nearest names.
    """
    if kind not in KINDS:
        raise SurgeonError(
            Code.NO_SUCH_PASS,
            f"there is no kind of pass named '{kind}'",
            at=f"{kind}/{name}",
            why=f"the kinds of pass are {', '.join(KINDS)}",
            try_=near(kind, KINDS),
            data={"kind": kind, "known": list(KINDS)},
        )
    passes = available()[kind]
    stem = name.replace("-", "_")
    if stem not in passes:
        raise SurgeonError(
            Code.NO_SUCH_PASS,
            f"there is no {kind} pass named '{name}'",
            at=f"{kind}/{name}",
            why=f"no plug-in installed here has a file {kind}/{stem}.py",
            try_=near(stem, passes) if passes else f"install a plug-in that has {kind} passes",
            data={"kind": kind, "name": name, "known": list(passes)},
        )
    return passes[stem]


def load(kind: str, name: str) -> type[Pass]:
    """Returns the class of the pass; only now is its module imported.

    Raises:
        SurgeonError: `NO_SUCH_PASS`; `MISSING_EXTRA` where the module needs another that is not
            installed; `BAD_PASS` where it doesn't hold exactly one frozen dataclass of its kind.
    """
    info = find(kind, name)
    try:
        module = importlib.import_module(info.module)
    except ModuleNotFoundError as error:
        raise SurgeonError(
            Code.MISSING_EXTRA,
            f"{kind} pass '{info.name}' needs the module '{error.name}'",
            at=str(info.path),
            why="it is imported by the pass and is not installed",
            try_=f"install what plug-in '{info.plugin}' depends on",
            data={"module": error.name, "plugin": info.plugin},
        ) from error
    base = KINDS[kind]
    classes = [
        member
        for member in vars(module).values()
        if inspect.isclass(member)
        and member.__module__ == info.module
        and issubclass(member, base)
        and not member.__name__.startswith("_")
    ]
    if len(classes) != 1:
        names = ", ".join(c.__name__ for c in classes) or "none"
        raise _malformed(info, f"it needs one class derived from {base.__name__}; found: {names}")
    (cls,) = classes
    # `__dataclass_params__` is looked up on the class itself: a parent's says nothing of this one.
    params = vars(cls).get("__dataclass_params__")
    if params is None or not params.frozen:
        raise _malformed(info, f"class {cls.__name__} is not a frozen dataclass")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise _malformed(info, f"class {cls.__name__} does not define {missing}")
    return cls


def options(cls: type[Pass]) -> tuple[Option, ...]:
    """Returns the fields of a pass in their order, each with its type, default and documentation.

    A field is documented by the string below it, or by `field(metadata={"doc": …})`, which wins.
    """
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]  (a pass is a dataclass: `load` saw to it)
    hints = typing.get_type_hints(cls, include_extras=True)
    docs = _field_docs(cls)
    return tuple(
        Option(
            name=field.name,
            type=hints[field.name],
            default=_default(field),
            doc=str(field.metadata.get("doc", docs.get(field.name, ""))),
        )
        for field in fields
        if field.init
    )


def build(kind: str, name: str, values: Mapping[str, Any]) -> Pass:
    """Returns the pass with these options, each checked and converted to its field's type.

    Args:
        kind: `score`, `select`, `compensate` or `transform`.
        name: the pass's name.
        values: options by field name; hyphens and underscores are the same.

    Raises:
        SurgeonError: as `load`, and `BAD_OPTION` for an option that is unknown, missing, given
            twice or of the wrong type.
    """
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    cls = load(kind, name)
    at = f"{kind}/{name}"
    known = {option.name: option for option in options(cls)}
    given: dict[str, Any] = {}
    for key, value in values.items():
        field = key.replace("-", "_")
        if field not in known:
            raise SurgeonError(
                Code.BAD_OPTION,
                f"{kind} pass '{name}' has no option '{key}'",
                at=at,
                why="its options are " + ", ".join(known) if known else "it has no options",
                try_=near(field, known) if known else "leave the option out",
                data={"option": key, "known": list(known)},
            )
        if field in given:
            raise _bad_option(at, key, "it is given twice, once with a hyphen", "give it once")
        option = known[field]
        try:
            given[field] = TypeAdapter(option.type).validate_python(value)
        except ValidationError as error:
            found = error.errors()[0]
            where = "".join(f"[{part}]" for part in found["loc"])
            raise _bad_option(
                at, key, f"{value!r}{where}: {found['msg']}", f"a value of type {option.type_text}"
            ) from error
        except PydanticUserError as error:
            raise _malformed(find(kind, name), f"field '{field}': {error.message}") from error
    missing = [
        option.name for option in known.values() if option.required and option.name not in given
    ]
    if missing:
        first = known[missing[0]]
        raise _bad_option(
            at,
            first.name,
            "it has no default and was not given",
            f"a value of type {first.type_text}",
        )
    try:
        return cls(**given)
    except ValueError as error:  # the pass's own check of its options, in `__post_init__`
        raise _bad_option(
            at, ", ".join(given), str(error), f"see 'surgeon passes' for {name}"
        ) from error


def _summary(file: Path, plugin: str) -> str:
    """Returns the first line of the file's docstring, or of its first class's."""
    try:
        return _first_line(file.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise SurgeonError(
            Code.BAD_PASS,
            f"the file of a pass of plug-in '{plugin}' does not parse",
            at=f"{file}:{getattr(error, 'lineno', None) or 1}",
            why=str(error),
            try_="mend the file, or uninstall the plug-in",
            data={"plugin": plugin},
        ) from error


# By content, so that no change of a file is missed: one prune looks every pass up several times.
@functools.cache
def _first_line(source: bytes) -> str:
    """Returns the first line that documents a module or its classes, in their order."""
    tree = ast.parse(source)
    documented = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for node in documented:
        doc = ast.get_docstring(node)
        if doc:
            return doc.splitlines()[0]
    return ""


def _field_docs(cls: type) -> dict[str, str]:
    """Returns the string literals below the fields of a class and its parents, by field name."""
    docs: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(parent):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(parent))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = inspect.cleandoc(text.value.value)
    return docs


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _type_text(type_: Any) -> str:
    if typing.get_origin(type_) is typing.Annotated:
        return _type_text(typing.get_args(type_)[0])
    if typing.get_origin(type_) is typing.Literal:
        return " | ".join(repr(value) for value in typing.get_args(type_))
    return type_.__name__ if isinstance(type_, type) and not typing.get_args(type_) else str(type_)


def _bad_option(at: str, option: str, why: str, try_: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_OPTION,
        f"option '{option}' is not usable" if option else "the options are not usable",
        at=at,
        why=why,
        try_=try_,
        data={"option": option},
    )


def _malformed(info: PassInfo, why: str) -> SurgeonError:
    return SurgeonError(
        Code.BAD_PASS,
        f"{info.kind} pass '{info.name}' of plug-in '{info.plugin}' is not well-formed",
        at=str(info.path),
        why=why,
        try_="see the documentation of surgeon.plugin for what a pass is",
        data={"plugin": info.plugin},
    )


def _conflict(one: PassInfo, two: PassInfo) -> SurgeonError:
    return SurgeonError(
        Code.BAD_PASS,
        f"two plug-ins bring a {one.kind} pass named '{one.name}'",
        at=f"{one.path} and {two.path}",
        why=f"plug-ins '{one.plugin}' and '{two.plugin}' both have a file "
        f"{one.kind}/{one.path.name}, and a recipe could mean either",
        try_=f"uninstall '{one.plugin}' or '{two.plugin}', or rename one of the files",
        data={"plugins": [one.plugin, two.plugin], "kind": one.kind, "name": one.name},
    )
