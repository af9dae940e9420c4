"""LoRA files written in the three spellings that other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..files import write_safetensors
from .weights import LoraModule, Offset

FORMAT_VERSION = "1"
Layout = Literal["dotted", "diffusers", "videox-fun"]
"""``dotted``: ``diffusion_model.<publisher's name>.lora_A/B.weight``, which ComfyUI and diffusers read.
``diffusers``: ``transformer.<diffusers' name>.lora_A/B.weight``. ``videox-fun``: ``lora_unet__<publisher's name
with underscores>.lora_down/up.weight`` and ``.alpha``, which VideoX-Fun reads."""


DOTTED = "diffusion_model."


def write_lora(
    path: Path | str,
    modules: Mapping[str, LoraModule],
    original_names: Mapping[str, str],
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = torch.float32,
    *,
    layout: Layout = "dotted",
    offsets: Mapping[str, Offset] | None = None,
) -> Path:
    """Write a LoRA. The first two layouts fold alpha into ``lora_A``; the third keeps it beside.

    Args:
        path: Target; written atomically.
        modules: Matrices by our module name.
        original_names: The publisher's name of each module, by our name.
        metadata: Kept as it is, plus the format version.
        dtype: Stored type; folding happens in float32. None keeps the type of each matrix.
        layout: See :data:`Layout`.
        offsets: Plain additions to parameters, as ``.diff`` and ``.diff_b``.
    """
    tensors: dict[str, Tensor] = {}
    for ours, module in modules.items():
        name, (down, up) = _spelled(layout, ours, original_names[ours]), _stored(module, layout, dtype)
        first, second = ("lora_down", "lora_up") if layout == "videox-fun" else ("lora_A", "lora_B")
        tensors |= {f"{name}.{first}.weight": down, f"{name}.{second}.weight": up}
        if layout == "videox-fun":
            tensors[f"{name}.alpha"] = torch.tensor(module.alpha)
    for ours, offset in (offsets or {}).items():
        name = _spelled(layout, ours, original_names[ours])
        for part, value in (("diff", offset.weight), ("diff_b", offset.bias)):
            if value is not None:
                tensors[f"{name}.{part}"] = value.detach().cpu().to(dtype or value.dtype)
    return write_safetensors(path, tensors, {"format": "pt", "reward_lora_format": FORMAT_VERSION, **metadata})


def rounding(modules: Mapping[str, LoraModule], layout: Layout, dtype: torch.dtype | None) -> float:
    """Largest relative error of any matrix that writing rounds; 0 says that nothing is lost.

    Scales that are powers of two, such as alpha 64 at rank 128, fold without loss.
    """
    worst = 0.0
    for module in modules.values():
        down, up = _stored(module, layout, dtype)
        scale = 1.0 if layout == "videox-fun" else module.scale
        for stored, exact in ((down, module.down.double() * scale), (up, module.up.double())):
            size = exact.abs().max()
            if size > 0:
                worst = max(worst, float((stored.double() - exact).abs().max() / size))
    return worst


def _spelled(layout: Layout, ours: str, original: str) -> str:
    if layout == "diffusers":
        return f"transformer.{ours}"
    return f"{DOTTED}{original}" if layout == "dotted" else f"lora_unet__{original.replace('.', '_')}"


def _stored(module: LoraModule, layout: Layout, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """``down`` and ``up`` as they lie in the file."""
    scale = 1.0 if layout == "videox-fun" else module.scale
    down = (module.down.detach().float().cpu() * scale).to(dtype or module.down.dtype)
    return down, module.up.detach().float().cpu().to(dtype or module.up.dtype)
