"""Models as something that runs: loaded from a name, or exported to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgeon.axes.plan import Plan
from surgeon.errors import Code, SurgeonError, near
from surgeon.pipeline import Model, open_model, prune


def load(
    model: str, tokenizer: str | None = None, *, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Returns something that gives logits, and its tokenizer or None.

    Args:
        model: an ONNX file, or anything that `open_model` takes.
        tokenizer: a folder with a tokenizer, for a model that has none beside it.
        trust_remote_code: run modelling code that comes with a checkpoint.

    Raises:
        SurgeonError: why it can't be loaded.
    """
    from surgeon.capture.source import resolve

    chosen = resolve(tokenizer).load_tokenizer() if tokenizer else None
    if model.endswith(".onnx"):
        from surgeon.runtime.session import OrtSession

        return OrtSession(model), chosen or _beside(Path(model))
    opened = open_model(model, trust_remote_code=trust_remote_code)
    loaded = prune(opened, plan=Plan(), verify=False).model.float()
    return loaded, chosen or (opened.source.load_tokenizer() if opened.source else None)


def _beside(path: Path) -> Any:
    if not (path.parent / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    # Left out, it would ask the user about the code of a checkpoint in the same folder.
    return AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False)


def need_tokenizer(tokenizer: Any, model: str) -> Any:
    """Returns the tokenizer, or refuses where there is none."""
    if tokenizer is None:
        raise SurgeonError(
            Code.MISSING_FILE,
            "there is no tokenizer for this model",
            at=model,
            why="a text can't be turned into token ids without one",
            try_="--tokenizer FOLDER, with the folder of the checkpoint it was made from",
        )
    return tokenizer


def export(
    model: str | Model,
    to: str,
    path: Path,
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> str:
    """Writes a model as a graph file and returns what was written, in words.

    Raises:
        SurgeonError: `bad-option` for an unknown target; why the model can't be read, exported
            or written.
    """
    from surgeon.emit.target import find_targets, get_target

    known = find_targets()
    if to not in known:
        raise SurgeonError(
            Code.BAD_OPTION,
            f"{to!r} is no export target",
            at="--to",
            why="graphs are written as ONNX or as a torch.export program",
            try_=near(to, known),
        )
    target = get_target(to)
    from surgeon.emit.files import check_output_file

    check_output_file(path, overwrite=overwrite)
    opened = open_model(model, trust_remote_code=trust_remote_code)
    found = target.write(opened.program, opened.read, path, overwrite=overwrite)
    size = sum(file.stat().st_size for file in found.files)
    names = ", ".join(file.name for file in found.files)
    checked = (
        f", within {found.largest:.1e} of the program's values" if found.largest is not None else ""
    )
    return f"wrote {names}: {found.nodes:,} nodes, {size / 1e6:,.1f} MB{checked}"
