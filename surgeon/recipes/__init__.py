"""Recipes: what a prune is told, as YAML. Some ship with Surgeon, a file each in this folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import Code, SurgeonError, near
from surgeon.recipes.reading import no_recipe, parse, read_yaml

if TYPE_CHECKING:
    from surgeon.recipes.schema import Recipe

DEFAULT_RECIPE = "fast"
"""What a prune follows that names no recipe."""

_FOLDER = Path(__file__).parent
_ENDINGS = (".yaml", ".yml")

__all__ = ["DEFAULT_RECIPE", "about", "from_data", "from_text", "load_recipe", "shipped", "to_yaml"]


def shipped() -> dict[str, Path]:
    """Returns the files of the recipes that ship with Surgeon, by name."""
    return {file.stem: file for file in sorted(_FOLDER.glob("*.yaml"))}


def about(name: str) -> str:
    """Returns what a recipe that ships is good for, in a line; its passes need not be there."""
    return str(read_yaml(shipped()[name])["about"])


def load_recipe(recipe: str | Path | Recipe | Mapping[str, Any]) -> Recipe:
    """Returns a recipe by the name of one that ships, from a file, or from plain values.

    Args:
        recipe: `flap`, a path (it has a folder or ends in `.yaml`), what YAML holds, or a recipe.

    Raises:
        SurgeonError: `missing-file`, `bad-recipe`, `no-such-pass` or `bad-option`, each with the
            file and the key.
    """
    from surgeon.recipes.schema import Recipe

    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return from_data(recipe, "the recipe")
    known = shipped()
    if isinstance(recipe, str) and recipe in known:
        return from_data(read_yaml(known[recipe]), f"the recipe {recipe}")
    path = Path(recipe)
    if isinstance(recipe, str) and len(path.parts) == 1 and path.suffix not in _ENDINGS:
        raise SurgeonError(
            Code.BAD_RECIPE,
            f"there is no recipe '{recipe}'",
            at=recipe,
            why="no recipe of that name ships with Surgeon, and a file's name ends in .yaml",
            try_=near(recipe, known),
            data={"known": list(known)},
        )
    return from_data(read_yaml(path), str(path))


def from_text(text: str, where: str) -> Recipe:
    """Returns the recipe that a YAML text spells; `where` is what a refusal names."""
    return from_data(parse(text, where), where)


def from_data(data: Any, where: str) -> Recipe:
    """Returns the recipe that plain values spell, its passes found and their options checked.

    Raises:
        SurgeonError: `bad-recipe`, `no-such-pass` or `bad-option`, with the key.
    """
    from pydantic import ValidationError

    from surgeon.recipes.schema import Recipe

    if not isinstance(data, Mapping):
        held = "nothing" if data is None else f"a {type(data).__name__}"
        raise no_recipe(where, f"it holds {held}, and a recipe is a mapping of keys to values")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _refusal(error, where) from error
    check_passes(recipe, where)
    return recipe


def check_passes(recipe: Recipe, where: str) -> None:
    """Sees to it that a recipe's passes exist and take their options.

    Raises:
        SurgeonError: what the registry says, at the recipe's key.
    """
    from surgeon.registry import build

    for index, step in enumerate(recipe.passes):
        try:
            build(step.kind, step.name, step.options)
        except SurgeonError as error:
            option = error.data.get("option")
            place = f"passes[{index}].{option or step.kind}"
            raise SurgeonError(
                error.code,
                error.what,
                at=f"{where}: {place}",
                why=error.why,
                try_=error.try_,
                data={**error.data, "key": place},
            ) from error


def to_yaml(recipe: Recipe) -> str:
    """Returns a recipe as YAML text; read again, it is the same."""
    import yaml

    return yaml.safe_dump(
        recipe.to_data(), sort_keys=False, allow_unicode=True, default_flow_style=False, width=100
    )


# --- refusals ------------------------------------------------------------------------------------


def _refusal(error: Any, where: str) -> SurgeonError:
    """Turns the first of pydantic's findings into a refusal that names the key and the keys."""
    every = error.errors()
    # Of a misspelt key and the one that is missed for it, the former is to be mended.
    found = next((e for e in every if e["type"] == "extra_forbidden"), every[0])
    loc: Sequence[Any] = found["loc"]
    path = _path(loc)
    known = _keys(loc[:-1]) if found["type"] in ("extra_forbidden", "missing") else ()
    data = {"key": path, "known": list(known)}
    at = f"{where}: {path}" if path else where
    if found["type"] == "extra_forbidden":
        inside = f"'{_path(loc[:-1])}'" if len(loc) > 1 else "a recipe"
        return SurgeonError(
            Code.BAD_RECIPE,
            f"{inside} has no key '{loc[-1]}'",
            at=at,
            why="its keys are " + ", ".join(known),
            try_=near(str(loc[-1]), known),
            data=data,
        )
    if found["type"] == "missing":
        return SurgeonError(
            Code.BAD_RECIPE,
            f"the key '{path}' is missing",
            at=where,
            why="it has no default",
            try_="version: 1" if path == "version" else f"add it: {_text_of(loc)}",
            data=data,
        )
    message = str(found["msg"]).removeprefix("Value error, ").replace("tuple", "list")
    message = message.partition(" or instance of")[0].replace("dictionary", "mapping")
    given = "" if found["type"] == "value_error" else f"{_short(found['input'])}: "
    return SurgeonError(
        Code.BAD_RECIPE,
        f"the key '{path}' is not usable" if path else "the recipe is not usable",
        at=at,
        why=given + message[:1].lower() + message[1:],
        try_=_text_of(loc),
        data=data,
    )


def _path(loc: Sequence[Any]) -> str:
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out


def _model(loc: Sequence[Any]) -> tuple[Any, str]:
    """Returns the part of the schema that holds a key, and what the schema says of the key."""
    from surgeon.recipes.schema import Recipe

    holder: Any = Recipe
    doc = ""
    for part in loc:
        if isinstance(part, int) or holder is None:
            continue
        field = holder.model_fields.get(part)
        doc = (field.description or "") if field else doc
        holder = _inside(field.annotation) if field else None
    return holder, doc


def _inside(annotation: Any) -> Any:
    """Returns the first part of the schema within a type."""
    from typing import get_args

    from surgeon.recipes.schema import Strict

    if isinstance(annotation, type) and issubclass(annotation, Strict):
        return annotation
    return next((found for a in get_args(annotation) if (found := _inside(a))), None)


def _keys(loc: Sequence[Any]) -> tuple[str, ...]:
    holder, _ = _model(loc)
    return tuple(holder.model_fields) if holder is not None else ()


def _text_of(loc: Sequence[Any]) -> str:
    """Returns what to try: what the key is for."""
    holder, doc = _model(loc)
    if not loc:
        return "see 'surgeon recipe fast'"
    if loc[0] == "passes":
        return "such as '- score: magnitude', the pass's options beside it"
    if holder is not None:
        return "a mapping of " + ", ".join(holder.model_fields)
    return " ".join(doc.split()) or "see docs/recipes.md"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
