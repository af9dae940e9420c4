"""Names and sizes of ModelScope's UNet as its publisher has them, and as diffusers' ``UNet3DConditionModel`` does.

The publisher's names are those of ``video_synthesis/unet_sd.py`` in modelscope/modelscope. Its VAE and its text
encoder are those of Stable Diffusion 2; see ``videocrafter_keys``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .files import count_numbered

FIRST_HEADS = 8
"""Attention heads of the very first transformer, whatever its width."""

VAE_PREFIX = "first_stage_model."

_TOP = {
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "input_blocks.0.1.": "transformer_in.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
_RESIDUAL = {
    "in_layers.0.": "norm1.",
    "in_layers.2.": "conv1.",
    "emb_layers.1.": "time_emb_proj.",
    "out_layers.0.": "norm2.",
    "out_layers.3.": "conv2.",
    "skip_connection.": "conv_shortcut.",
}
_TEMPORAL = "temopral_conv."  # misspelt so in the file
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(.+)")


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    return next((new + name[len(old) :] for old, new in table.items() if name.startswith(old)), None)


def _place(block: str, number: int, part: str) -> str:
    """A part of one of the publisher's blocks (residual, spatial and temporal attention) in a block of diffusers."""
    kind, _, rest = part.partition(".")
    if rest.startswith("conv."):
        return f"{block}.upsamplers.0.{rest}"
    if kind == "0":
        if rest.startswith(_TEMPORAL):
            return f"{block}.temp_convs.{number}.{rest[len(_TEMPORAL) :]}"
        return f"{block}.resnets.{number}.{_renamed(rest, _RESIDUAL) or rest}"
    return f"{block}.{'attentions' if kind == '1' else 'temp_attentions'}.{number}.{rest}"


def convert_unet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The publisher's tensors under diffusers' names; convolutions over one frame become linear layers."""
    levels = _levels(tensors)
    per_level = len(levels[0]) + 1

    def rename(name: str) -> str:
        top = _renamed(name, _TOP)
        if top is not None:
            return top
        middle = re.fullmatch(r"middle_block\.([0-3])\.(.+)", name)
        if middle:  # residual, spatial, temporal, residual
            return _place("mid_block", int(middle[1]) // 3, f"{int(middle[1]) % 3}.{middle[2]}")
        match = _BLOCK.fullmatch(name)
        if match is None:
            return name
        half, index, part = match[1], int(match[2]), match[3]
        level, number = divmod(index - (half == "input"), per_level)
        if part.startswith("op."):
            return f"down_blocks.{level}.downsamplers.0.conv.{part[3:]}"
        return _place(f"{'down' if half == 'input' else 'up'}_blocks.{level}", number, part)

    converted = {}
    for name, tensor in tensors.items():
        linear = re.search(r"\.proj_(in|out)\.weight$", name) and tensor.dim() == 3
        converted[rename(name)] = tensor[:, :, 0] if linear else tensor
    return converted


def _levels(tensors: Mapping[str, Tensor]) -> list[list[int]]:
    """The residual blocks of each level on the way down, by their number in the file."""
    levels: list[list[int]] = [[]]
    for index in range(1, count_numbered(tensors, "input_blocks.")):
        if f"input_blocks.{index}.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(index)
    return levels


def unet_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``UNet3DConditionModel``, read from the publisher's tensors.

    Raises:
        ValueError: The tensors are no such UNet.
    """
    try:
        first, levels = tensors["input_blocks.0.0.weight"], _levels(tensors)
        attention = [f"input_blocks.{blocks[0]}.1.norm.weight" in tensors for blocks in levels]
        return {
            "in_channels": first.shape[1],
            "out_channels": tensors["out.2.weight"].shape[0],
            "block_out_channels": [
                tensors[f"input_blocks.{blocks[0]}.0.out_layers.3.weight"].shape[0] for blocks in levels
            ],
            "layers_per_block": len(levels[0]),
            "down_block_types": [f"{'CrossAttn' * there}DownBlock3D" for there in attention],
            "up_block_types": [f"{'CrossAttn' * there}UpBlock3D" for there in attention[::-1]],
            "cross_attention_dim": tensors["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
            "attention_head_dim": tensors["input_blocks.0.1.proj_in.weight"].shape[0] // FIRST_HEADS,
        }
    except (KeyError, IndexError) as error:
        raise ValueError(f"no ModelScope UNet ({error} is missing)") from None
