"""From the keys of a LoRA file to the modules of a real model.

Names are looked up in a table built from the model itself, never by guessing which underscore was a dot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_PART = re.compile(
    r"^(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A|lora_down)(?:\.[^.]+)??(?:\.weight)?|"
    r"(?P<up>lora_B|lora_up)(?:\.[^.]+)??(?:\.weight)?|"
    r"(?P<alpha>alpha))$"
)

PREFIXES = (
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "base_model.model.",
    "pipe.dit.",
    "unet.",
    "lora_unet__",
    "lora_unet_",
    "lycoris_",
    "",
)
"""What trainers put before a module's name: core ComfyUI, diffusers, peft, DiffSynth, VideoX-Fun, kohya, none."""


def split_key(key: str) -> tuple[str, str] | None:
    """``(module as spelled in the file, "down" | "up" | "alpha")``, or None if it is no LoRA key."""
    match = _PART.match(key)
    if match is None:
        return None
    return match["module"], next(part for part in ("down", "up", "alpha") if match[part])


def find_prefix(key: str) -> str:
    """The longest known prefix of a key; it names the format in reports."""
    return max((p for p in PREFIXES if key.startswith(p)), key=len)


class ModuleNames:
    """Finds the module of a model that a LoRA key speaks of.

    Args:
        original_names: The publisher's dotted name of each module, by its name in our classes.
    """

    def __init__(self, original_names: Mapping[str, str]) -> None:
        self._table: dict[str, str] = {}
        for ours, original in original_names.items():
            for name in (ours, original):
                for spelled in (name, name.replace(".", "_")):
                    self._table.setdefault(spelled, ours)

    def find(self, spelled: str) -> str | None:
        """Our name of the module, or None if this model has no such module."""
        for prefix in PREFIXES:
            if spelled.startswith(prefix) and (found := self._table.get(spelled[len(prefix) :])):
                return found
        return None
