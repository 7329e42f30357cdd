"""A tokenizer as the files that make it up, before and after some of its tokens have gone."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from surgeon.capture.source import Source
from surgeon.vocabulary import rewrite
from surgeon.vocabulary.tokens import Tokens, refused

CORE = "tokenizer.json"
GENERATION = "generation_config.json"
_AS_THEY_ARE = ("special_tokens_map.json", "chat_template*")

Rewrite = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Tokenizer:
    """A source's tokenizer.

    Attributes:
        loaded: as Transformers loads it: what texts are really cut by.
        texts: its files by name, among them `tokenizer.json`.
        left_out: files that spell the whole vocabulary once more, and don't go with a smaller one.
        tokens: what it says of its tokens.
    """

    loaded: Any
    texts: Mapping[str, str]
    left_out: tuple[str, ...]
    tokens: Tokens

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns token ids, no special ones added."""
        return encode(self.loaded, texts)

    def template(self) -> tuple[tuple[str, ...], str]:
        """Returns what the chat template writes by itself, or else what to say of it."""
        if not self.loaded.chat_template:
            return (), ""
        from jinja2 import TemplateError

        chat = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
        try:
            text = self.loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            return (), (
                f"the chat template refuses a conversation of empty messages ({error}): its own "
                "words stay only where the corpus or `always` has them"
            )
        return (text,), ""


def encode(loaded: Any, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of texts, no special ones added."""
    if not texts:
        return []
    # Not verbose: the tokenizer warns that a text is longer than the model's context.
    return loaded(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def read(source: Source) -> Tokenizer:
    """Returns the tokenizer of a source.

    Raises:
        SurgeonError: `bad-option` where there is none, or none that Surgeon can trim.
    """
    loaded: Any = source.load_tokenizer()
    if loaded is None:
        raise refused(
            "there is no tokenizer beside the model, and tokens are picked by what texts need",
            source.id,
            "a checkpoint folder with its tokenizer, or a GGUF file",
        )
    return of_loaded(source, loaded)


def of_loaded(source: Source, loaded: Any) -> Tokenizer:
    """Returns a source's tokenizer that Transformers has loaded.

    Raises:
        SurgeonError: `bad-option` where it is none that Surgeon can trim.
    """
    backend: Any = getattr(loaded, "backend_tokenizer", None)
    if not hasattr(backend, "to_str"):
        raise refused(
            f"its tokenizer, {type(loaded).__name__}, is not one of the library tokenizers",
            source.id,
            "save it with a tokenizer.json, which Transformers makes of most",
        )
    tokens = Tokens.of(json.loads(backend.to_str()), source.id)
    texts, left_out = _texts(source, loaded)
    return Tokenizer(loaded, texts, left_out, tokens)


def _texts(source: Source, loaded: Any) -> tuple[dict[str, str], tuple[str, ...]]:
    """Returns a tokenizer's files by name, and the names of those that are left out."""
    files = {path.name: path for path in source.tokenizer_files}
    if CORE not in files:
        with TemporaryDirectory() as name:
            loaded.save_pretrained(name)
            made = {path.name: path for path in Path(name).iterdir()}
            texts = {n: path.read_text(encoding="utf-8") for n, path in made.items() if _known(n)}
        if GENERATION in files:
            texts[GENERATION] = files[GENERATION].read_text(encoding="utf-8")
        return texts, tuple(sorted(set(files) - set(texts)))
    texts = {n: path.read_text(encoding="utf-8") for n, path in files.items() if _known(n)}
    return texts, tuple(sorted(set(files) - set(texts)))


def _known(name: str) -> bool:
    rewritten = (CORE, GENERATION, "tokenizer_config.json", "added_tokens.json")
    return name in rewritten or any(Path(name).match(pattern) for pattern in _AS_THEY_ARE)


def trimmed(tokenizer: Tokenizer, numbers: rewrite.Numbers, where: str) -> dict[str, str]:
    """Returns a tokenizer's files with the tokens that stay, under their new numbers."""

    def core(data: dict[str, Any]) -> dict[str, Any]:
        # Older files don't say what their model is.
        data["model"].setdefault("type", tokenizer.tokens.model["type"])
        return rewrite.tokenizer_json(data, Tokens.of(data, where), numbers, where)

    changes: Mapping[str, Rewrite] = {
        CORE: core,
        "tokenizer_config.json": lambda data: rewrite.tokenizer_config(data, numbers, where),
        "added_tokens.json": lambda data: rewrite.added_tokens(data, numbers, where),
        GENERATION: lambda data: {**data, **rewrite.renumbered(data, numbers)},
    }
    out = dict(tokenizer.texts)
    for name, change in changes.items():
        if name in out:
            data = change(json.loads(out[name]))
            out[name] = json.dumps(data, ensure_ascii=False, indent=2) + "\n"
    return out


class SmallerSource:
    """A source as its results see it after a cut of the vocabulary: configuration and tokenizer.

    The tokenizer's files lie in a folder that goes when nothing refers to this any more.

    Args:
        source: before.
        kept: the numbers of the tokens that stay, ascending.
        tokenizer: the source's, where it is at hand.

    Raises:
        SurgeonError: `bad-option` where the tokenizer can't be rewritten.
    """

    def __init__(
        self, source: Source, kept: Sequence[int], tokenizer: Tokenizer | None = None
    ) -> None:
        numbers = {old: new for new, old in enumerate(kept)}
        rows = int(source.config.vocab_size)
        for one in sorted(rewrite.config_ids(source.config.to_dict(), rows) - numbers.keys()):
            raise refused(f"token {one} has a meaning in the configuration and would go", source.id)
        changes = rewrite.renumbered(source.config.to_dict(), numbers)
        config = rewrite.changed(source.config, {**changes, "vocab_size": len(numbers)})
        generation = source.generation_config
        if generation is not None:
            found = rewrite.renumbered(generation.to_dict(), numbers)
            generation = rewrite.changed(generation, found)
        self._folder = TemporaryDirectory(prefix="surgeon-tokenizer-")
        folder = Path(self._folder.name)
        # What class reads a tokenizer's files depends on the model's configuration.
        (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
        self.left_out: tuple[str, ...] = ()
        files: tuple[Path, ...] = ()
        if tokenizer is None and (loaded := source.load_tokenizer()) is not None:
            tokenizer = of_loaded(source, loaded)
        if tokenizer is not None:
            self.left_out = tokenizer.left_out
            texts = trimmed(tokenizer, numbers, source.id)
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8")
            files = tuple(folder / name for name in sorted(texts))
        self.source = replace(
            source,
            config=config,
            generation_config=generation,
            folder=folder,
            tokenizer_files=files,
            _gguf=None,
        )
        if tokenizer is not None:
            self.loaded: Any = self.source.load_tokenizer()
            _check(tokenizer.loaded, self.loaded, numbers, source.id)


def _check(before: Any, after: Any, numbers: rewrite.Numbers, where: str) -> None:
    """Refuses a tokenizer that, read again, has other tokens or numbers than it should."""
    wanted = {token: numbers[i] for token, i in before.get_vocab().items() if i in numbers}
    found = after.get_vocab()
    if found == wanted:
        return
    token = next(t for t in (*wanted, *found) if wanted.get(t) != found.get(t))
    raise refused(
        f"Transformers reads its smaller form with other numbers: {token!r} is "
        f"{found.get(token)}, not {wanted.get(token)}",
        where,
    )
