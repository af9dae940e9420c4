"""Names and sizes of VideoCrafter2's ``model.ckpt``: one file that holds UNet, VAE and text encoder.

The VAE is Stable Diffusion's in the names of the latent-diffusion code base, the text encoder the text half of
OpenCLIP ViT-H/14; here they become diffusers' ``AutoencoderKL`` and transformers' ``CLIPTextModel``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from .files import count_numbered
from .videocrafter_unet import INIT_HEADS, UNetConfig

PARTS = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text": "cond_stage_model.model.",
}
"""What stands before the names of each part; all else in the file are tables that are computed here."""

TEXT_HEAD = 64
"""Width of an attention head in OpenCLIP's text encoders."""

UNET_OPTIONS = {
    "use_linear": True,
    "temporal_conv": True,
    "temporal_attention": True,
    "temporal_selfatt_only": True,
    "use_relative_position": False,
    "use_causal_attention": False,
    "addition_attention": True,
    "fps_cond": True,
}
"""Switches of the publisher's network that VideoCrafter2 has so and not otherwise."""


def part_of(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The tensors of ``unet``, ``vae`` or ``text``, without what stands before their names."""
    prefix = PARTS[part]
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unet_config(tensors: Mapping[str, Tensor]) -> UNetConfig:
    """The UNet's sizes as its names and shapes tell them.

    Raises:
        KeyError: A tensor that every such network has is missing.
    """
    first = tensors["input_blocks.0.0.weight"]
    base = first.shape[0]
    levels: list[list[str]] = [[]]  # the residual blocks of each
    for index in range(1, count_numbered(tensors, "input_blocks.")):
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in tensors:
            levels.append([])
        else:
            levels[-1].append(block)
    transformer = "middle_block.1.transformer_blocks."
    return UNetConfig(
        in_channels=first.shape[1],
        out_channels=tensors["out.2.weight"].shape[0],
        model_channels=base,
        channel_mult=tuple(tensors[f"{blocks[0]}.0.out_layers.3.weight"].shape[0] // base for blocks in levels),
        num_res_blocks=len(levels[0]),
        attention_resolutions=tuple(
            2**level for level, blocks in enumerate(levels) if f"{blocks[0]}.1.norm.weight" in tensors
        ),
        num_head_channels=tensors["init_attn.0.proj_in.weight"].shape[0] // INIT_HEADS,
        transformer_depth=count_numbered(tensors, transformer),
        temporal_transformer_depth=count_numbered(tensors, "middle_block.2.transformer_blocks."),
        context_dim=tensors[f"{transformer}0.attn2.to_k.weight"].shape[1],
    )


def published_unet_config(options: Mapping[str, Any]) -> UNetConfig:
    """The UNet's sizes out of the publisher's ``unet_config``.

    Raises:
        ValueError: An option with which the network would not be VideoCrafter2's.
    """
    for option, value in UNET_OPTIONS.items():
        if bool(options.get(option, value)) != value:
            raise ValueError(f"{option} must be {value} in a VideoCrafter2 network, got {options[option]}")
    given = {field.name: options[field.name] for field in fields(UNetConfig) if field.name in options}
    return UNetConfig(**{name: tuple(v) if isinstance(v, Sequence) else v for name, v in given.items()})


def vae_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``AutoencoderKL``."""
    levels = count_numbered(tensors, "encoder.down.")
    widths = [tensors[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count_numbered(tensors, "encoder.down.0.block."),
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
    }


def convert_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``AutoencoderKL``'s names; the attention's 1x1 convolutions become linear layers, a training loss is dropped."""
    levels = count_numbered(tensors, "decoder.up.")
    renames = (
        (r"encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
        (r"encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
        # The decoder's levels are counted from the picture in the file, from the latents in diffusers.
        (r"decoder\.up\.(\d+)\.", lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}."),
        (r"(up_blocks\.\d+)\.block\.", r"\1.resnets."),
        (r"(up_blocks\.\d+)\.upsample\.", r"\1.upsamplers.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
        (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
        (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
        (r"\.norm_out\.", ".conv_norm_out."),
    )
    converted = {}
    for name, tensor in tensors.items():
        if name.startswith("loss."):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        linear = ".attentions." in name and tensor.dim() == 4
        converted[name] = tensor.flatten(1) if linear else tensor
    return converted


def text_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Configuration of ``CLIPTextModel`` with all blocks but the last, whose output nobody asks for."""
    tokens, width = tensors["token_embedding.weight"].shape
    return {
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": count_numbered(tensors, "transformer.resblocks.") - 1,
        "num_attention_heads": max(1, width // TEXT_HEAD),
        "max_position_embeddings": tensors["positional_embedding"].shape[0],
        "hidden_act": "gelu",
        "bos_token_id": tokens - 2,
        "eos_token_id": tokens - 1,
        "pad_token_id": 0,
    }


def convert_text(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``CLIPTextModel``'s names; the last block and what leads to a sentence's one vector are dropped."""
    last = count_numbered(tensors, "transformer.resblocks.") - 1
    plain = {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    }
    inside = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    converted = {ours: tensors[name] for name, ours in plain.items()}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if match is None or int(match[1]) == last:
            continue
        block, module, kind = f"encoder.layers.{match[1]}", match[2], match[3]
        if module == "attn.in_proj":  # query, key and value in one matrix
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                converted[f"{block}.self_attn.{part}_proj.{kind}"] = piece
        else:
            converted[f"{block}.{inside[module]}.{kind}"] = tensor
    return converted
