"""`.pt2` files: found in a folder, loaded by torch, and told why where that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from surgeon.errors import Code, SurgeonError
from surgeon.runtime.device import choose_torch_device
from surgeon.runtime.signature import stop_tokens

SUFFIX = ".pt2"


def program_file(model: str) -> Path | None:
    """Returns the `.pt2` file that a name means, None where it means something else.

    That is the file itself, or `model.pt2` in a folder that holds no checkpoint.
    """
    path = Path(model).expanduser()
    if path.suffix == SUFFIX and not path.is_dir():
        return path
    inside = path / f"model{SUFFIX}"
    return inside if inside.is_file() and not (path / "config.json").is_file() else None


def find_program(path: Path) -> Path:
    """Returns the path of a file that is there.

    Raises:
        SurgeonError: `missing-file`.
    """
    if path.is_file():
        return path
    raise SurgeonError(
        Code.MISSING_FILE,
        f"there is no program '{path}'",
        at=str(path),
        why="no such file",
        try_="give the path of a file that 'surgeon export --to pt2' wrote",
    )


def load_program(path: Path, *, device: str = "auto") -> Any:
    """Returns the exported program of a file, on a device.

    Raises:
        SurgeonError: `missing-file`, `not-a-model`, `remote-code` where it holds more than tensors
            and text, or a device that doesn't work here.
    """
    import torch
    from torch.export.passes import move_to_device_pass

    from surgeon.runtime.program_archive import check_archive

    on = choose_torch_device(device)
    check_archive(find_program(path))
    try:
        program = torch.export.load(path)
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        raise SurgeonError(
            Code.NOT_A_MODEL,
            f"torch can't load '{path.name}'",
            at=str(path),
            why=f"{type(error).__name__}: {lines[0]}"[:500],
            try_="export it again with the version of torch that is installed here",
        ) from error
    return program if on.name == "cpu" else move_to_device_pass(program, on.name)


def open_module(path: Path, *, device: str = "auto", program: Any = None) -> Any:
    """Returns a file as a module from token ids, mask and positions to logits.

    It says where it runs (`device_note`) and which tokens end a text (`stop_tokens`).

    Args:
        path: of the file; the tokens that end a text stand in what lies beside it.
        device: `auto`, `cuda` or `cpu`.
        program: what `load_program` gave, where it is loaded already.

    Raises:
        SurgeonError: as `load_program`, or for a program that isn't a language model's.
    """
    program = load_program(path, device=device) if program is None else program
    names = program.graph_signature.user_inputs
    if tuple(names) != ("input_ids", "attention_mask", "position_ids"):
        raise SurgeonError(
            Code.NOT_A_MODEL,
            f"'{path.name}' has not the inputs of a language model",
            at=str(path),
            why=f"its inputs are {', '.join(map(str, names))}",
            try_="a program of input_ids, attention_mask and position_ids, as Surgeon exports it",
        )
    on = choose_torch_device(device)
    module = program.module()
    module.device_note, module.stop_tokens = on.note, stop_tokens(path.parent)
    module.device, module.vocab = on.name, _vocabulary(program)
    return module


def _vocabulary(program: Any) -> int | None:
    """Returns the size of the last dimension of what the program gives."""
    given = program.graph.output_node().args[0]
    size = given[0].meta["val"].shape[-1]
    return size if isinstance(size, int) else None
