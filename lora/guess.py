"""Which base model a LoRA was made for, as far as its names and sizes tell."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .catalog import CATALOG
from .names import bare_names
from .weights import LoraFile

_FAMILIES = (  # the first whose pattern is found in a module's name, its dots as underscores
    ("Open-Sora 1.2", r"^(?:spatial|temporal)_blocks_\d+_"),
    ("VideoCrafter2", r"^(?:input_blocks|middle_block|output_blocks|init_attn)_"),
    ("ModelScope", r"^(?:down_blocks|up_blocks|mid_block|transformer_in)_"),
    ("Wan", r"^blocks_\d+_(?:self_attn|cross_attn|ffn|attn[12])_"),
    ("EasyAnimate", r"^transformer_blocks_\d+_(?:attn2|attn1_add)_|^(?:text_proj|text_proj_t5)$"),
    ("CogVideoX", r"^transformer_blocks_\d+_(?:norm1_linear|attn1)_?|^patch_embed_text_proj$"),
)
_WAN_SIZES = {1536: "1.3B", 5120: "14B", 3072: "2.2 TI2V-5B"}
_COG_SIZES = {1920: "2b", 3072: "5b"}


@dataclass(frozen=True)
class Guess:
    """A base model and why.

    Attributes:
        base: Its name, or what can be said of it; empty if nothing.
        reason: In words.
    """

    base: str
    reason: str


def guess_base(lora: LoraFile) -> Guess:
    """The base model: what the file says, else what its name or its modules' names and sizes tell."""
    for key in ("base_model", "modelspec.architecture", "ss_base_model_version"):
        if lora.metadata.get(key):
            return Guess(lora.metadata[key], f"its metadata say so ({key})")
    published = CATALOG.get(lora.path.stem)
    if published:
        return Guess(published.base_model, "its file's name is that of a published LoRA")
    names = plain_names(lora.names)
    family = family_of(names.values())
    if not family:
        return Guess("", "no module is named as in a model we know")
    if family == "Wan":
        return _wan(lora, names)
    blocks = len({n for name in names.values() for n in re.findall(r"blocks_(\d+)_", name)})
    reason = f"modules named as in {family}" + f", {blocks} blocks" * bool(blocks)
    if family == "CogVideoX":
        widths = {width for m in lora.modules.values() for width in m.shape}
        size = next((size for width, size in _COG_SIZES.items() if width in widths), "")
        return Guess(" ".join(filter(None, (family, cogvideox_version(lora.names), size))), reason)
    return Guess(family, reason)


def cogvideox_version(names: Iterable[str]) -> str:
    """``V1.5`` or ``V1.1 or older`` by the modules of a LoRA of CogVideoX; empty if they do not tell.

    Whoever adapts the text's embedding adapts every linear layer, and only V1.5 embeds patches with one.
    """
    names = set(plain_names(names).values())
    if "patch_embed_proj" in names:
        return "V1.5"
    return "V1.1 or older" if "patch_embed_text_proj" in names else ""


def family_of(plain: Iterable[str]) -> str:
    """The kind of model, by :func:`plain_names`; empty if it is none we know."""
    plain = list(plain)
    return next((family for family, pattern in _FAMILIES if any(re.search(pattern, n) for n in plain)), "")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without its prefixes and with underscores, by how the file spells it."""
    return {name: min(bare_names(name), key=len).replace(".", "_").lstrip("_") for name in names}


def _wan(lora: LoraFile, names: dict[str, str]) -> Guess:
    query = next((m for n, m in lora.modules.items() if re.search(r"self_attn_q$|attn1_to_q$", names[n])), None)
    width = query.down.shape[1] if query is not None else 0
    size = _WAN_SIZES.get(width, "")
    image = any(re.search(r"_(?:k_img|add_k_proj)$", name) for name in names.values())
    why = f"modules named as in Wan, {width} wide" + (", with image attention" if image else "")
    if image and size == "1.3B":
        return Guess("Wan2.1-Fun-1.3B-InP", f"{why}, which only the Fun-InP model has at this size")
    if image:
        return Guess(f"Wan2.1 {size} image-to-video or Fun-InP".replace("  ", " "), why)
    if size == "14B":
        expert = re.search(r"(high|low)[-_ ]?noise", lora.path.name.lower())
        if expert:
            return Guess(f"Wan2.2 A14B, {expert[1]}-noise expert", f"{why}, and its name says {expert[0]}")
        return Guess("Wan2.1 T2V-14B, or an expert of Wan2.2 A14B", f"{why}, without image attention")
    return Guess(f"Wan2.1 T2V-{size}" if size == "1.3B" else f"Wan{size or ' of another size'}", why)
