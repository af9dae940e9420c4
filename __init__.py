"""Reward LoRA: train reward LoRAs for video diffusion models, and use them.

This folder is both a ComfyUI node pack and the Python package ``reward_lora``. Importing it costs nothing
and needs no ComfyUI; the nodes are imported when ComfyUI asks for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .nodes import RewardLoraExtension

WEB_DIRECTORY = "./web"


def comfy_entrypoint() -> RewardLoraExtension:
    """What ComfyUI calls to learn the nodes of this pack."""
    from .nodes import RewardLoraExtension

    return RewardLoraExtension()
