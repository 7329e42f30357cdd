"""A checkpoint whose layers lie on several devices, as accelerate places them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgeon.errors import Code, SurgeonError, near

if TYPE_CHECKING:
    from surgeon.capture.source import Source

WAYS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How layers may be dealt out; accelerate's documentation describes each (`device_map`)."""

DeviceMap = str | Mapping[str, int | str]
"""One of `WAYS`, or from module paths to devices: a GPU's number, `cpu` or `disk`."""


def check_map(device_map: DeviceMap, *, device: str = "auto", speed: bool = False) -> None:
    """Refuses a map that means nothing, or that other options contradict.

    Raises:
        SurgeonError: `bad-option`.
    """
    if isinstance(device_map, str) and device_map not in WAYS:
        raise _bad(
            f"{device_map!r} is no way to deal out layers",
            device_map,
            "there are " + ", ".join(WAYS),
            near(device_map, WAYS),
        )
    if device != "auto":
        raise _bad(
            "a device map leaves no device to choose",
            device_map,
            f"--device {device} asks for one device, the map deals layers out to several",
            "leave one of the two out",
        )
    if speed:
        raise _bad(
            "speed can't be measured under a device map",
            device_map,
            "models are timed in turns, and each would have to have all devices for itself",
            "leave --speed out, or give compare --no-speed",
        )


def load_placed(source: Source, device_map: DeviceMap, offload: Path) -> Any:
    """Returns a checkpoint as a Transformers model whose layers lie where a map says.

    Weights keep the element type they are stored in: fp32 would need twice the devices.

    Args:
        source: a checkpoint folder.
        device_map: see `DeviceMap`.
        offload: a folder for what goes to the disk; the model reads there while it runs.

    Raises:
        SurgeonError: `bad-option` where the source is no folder, or Transformers or accelerate
            refuse the map.
    """
    if source.folder is None or source.weights is None:
        raise _bad(
            "layers can't be dealt out to devices",
            device_map,
            f"{source.id} is no checkpoint folder that Transformers could load layer by layer",
            "save it as one first (save_pretrained)",
        )
    model_class: Any = source.model_class
    given = device_map if isinstance(device_map, str) else dict(device_map)
    offload.mkdir(parents=True, exist_ok=True)
    try:
        loaded: Any = model_class.from_pretrained(
            source.folder, dtype="auto", device_map=given, offload_folder=str(offload)
        )
    except (ValueError, RuntimeError) as error:  # of accelerate, and of torch for no such device
        raise _bad(
            "layers can't be dealt out as the map says",
            device_map,
            str(error),
            "a map gives every module, or one that it lies in, a device that is here",
        ) from error
    places = getattr(loaded, "hf_device_map", None)
    count = len({str(place) for place in places.values()}) if places else 1
    loaded.device_note = f"layers on {count} device{'s' if count > 1 else ''}"
    return loaded.eval()


def _bad(what: str, device_map: DeviceMap, why: str, try_: str) -> SurgeonError:
    at = device_map if isinstance(device_map, str) else "the map"
    return SurgeonError(Code.BAD_OPTION, what, at=f"--device-map {at}", why=why, try_=try_)
