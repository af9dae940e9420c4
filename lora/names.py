"""From the keys of a LoRA file to the modules of a real model.

Names are looked up in a table built from the model itself, never by guessing which underscore was a dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_PART = re.compile(
    r"^(?P<module>.+?)\.(?:"
    r"(?P<down>lora_A|lora_down)(?:\.(?!bias$)[^.]+)??(?:\.weight)?|"
    r"(?P<up>lora_B|lora_up)(?:\.(?!bias$)[^.]+)??(?:\.weight)?|"
    r"(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b))$"
)

PREFIXES = {
    "diffusion_model.": "ComfyUI (dotted)",
    "model.diffusion_model.": "ComfyUI (dotted)",
    "transformer.": "diffusers",
    "base_model.model.": "peft",
    "base_model.model.model.diffusion_model.": "VADER (peft)",
    "pipe.dit.": "DiffSynth",
    "unet.": "diffusers",
    "lora_unet__": "VideoX-Fun",
    "lora_unet_": "kohya (musubi)",
    "lycoris_": "LyCORIS",
    "": "bare module names",
}
"""What trainers put before a module's name, and what the format is called."""

IMAGE_ONLY = re.compile(r"(?:^|[._])(?:k_img|v_img|img_emb|add_k_proj|add_v_proj|image_embedder)(?:[._]|$)")
"""Modules that only image-to-video variants of a Wan have."""


def split_key(key: str) -> tuple[str, str] | None:
    """``(module as spelled in the file, "down" | "up" | "alpha" | "diff" | "diff_b")``, or None if it is neither."""
    match = _PART.match(key)
    if match is None:
        return None
    return match["module"], next(part for part in ("down", "up", "alpha", "diff", "diff_b") if match[part])


def find_prefix(key: str) -> str:
    """The longest known prefix of a key; it names the format in reports."""
    return max((p for p in PREFIXES if key.startswith(p)), key=len)


def bare_names(spelled: str) -> Iterator[str]:
    """A spelled name without each combination of known prefixes, for example ``base_model.model.transformer.``."""
    waiting, seen = [spelled], set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            yield name
            waiting += [name.removeprefix(prefix) for prefix in PREFIXES if prefix and name.startswith(prefix)]


class ModuleNames:
    """Finds the module of a model that a LoRA key speaks of.

    Args:
        original_names: The publisher's dotted name of each module, by its name in our classes.
    """

    def __init__(self, original_names: Mapping[str, str]) -> None:
        self._table: dict[str, str] = {}
        names = [*((original, ours) for ours, original in original_names.items()), *((n, n) for n in original_names)]
        for name, ours in (*names, *((name.replace(".", "_"), ours) for name, ours in names)):
            self._table.setdefault(name, ours)  # the publisher's names come first, and dots before underscores

    def find(self, spelled: str) -> str | None:
        """Our name of the module, or None if this model has no such module."""
        return next((self._table[name] for name in bare_names(spelled) if name in self._table), None)
