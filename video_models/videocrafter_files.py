"""Loading VideoCrafter2 from its published ``model.ckpt``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import videocrafter_keys as keys
from .files import WeightFileError, fingerprint, read_weights
from .loading import build_clip_text, diffusers, materialise, open_clip_tokenizer, read_options
from .protocol import ModelSpec
from .videocrafter import TEXT_TOKENS, VideoCrafterModel
from .videocrafter_unet import UNetConfig, VideoCrafterUNet

LAYOUTS = ("VideoCrafter2's model.ckpt",)
"""What :func:`detect` looks for, for messages."""

CHECKPOINT = "model.ckpt"
DEFAULT_ETA = 1.0
DEFAULT_FPS = 24
"""What VADER tells the UNet, and its LoRAs have learnt; the publisher's own script says 28."""


def detect(folder: Path) -> bool:
    """Whether a folder holds VideoCrafter2."""
    return (folder / CHECKPOINT).is_file()


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> VideoCrafterModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``, ``height``,
    ``frames``, ``steps``, ``guidance_scale``, ``fps`` (of the videos written), ``lora_targets``, ``eta`` and
    ``conditioning_fps`` (what the UNet is told).

    Args:
        folder: The model's folder.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go.
        text: Whether to load the text encoder and its tokenizer.

    Raises:
        WeightFileError: The file is damaged, or of another model.
    """
    path = folder / CHECKPOINT
    options = read_options(folder, eta=(int, float), conditioning_fps=int)
    tensors = read_weights(path)

    def part(
        name: str,
        build: Callable[[Mapping[str, Any]], nn.Module],
        read_config: Callable[[Mapping[str, Tensor]], Mapping[str, Any]],
        convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
        dtype: torch.dtype | None = dtype,
    ) -> nn.Module:
        mine = keys.part_of(tensors, name)
        try:
            config, converted = read_config(mine), convert(mine)
        except (KeyError, IndexError, ValueError) as error:
            raise WeightFileError(
                f"{path} does not hold VideoCrafter2's {name} ({error} is missing below {keys.PARTS[name]}); "
                "it is an incomplete download or another model"
            ) from None
        return materialise(build, config, converted, path, dtype, device)

    unet = part("unet", _build_unet, lambda mine: dataclasses.asdict(keys.unet_config(mine)))
    vae = part("vae", diffusers("AutoencoderKL"), keys.vae_config, keys.convert_vae, dtype or torch.float32)
    text_encoder = tokenizer = None
    if text:
        text_encoder = part("text", build_clip_text, keys.text_config, keys.convert_text)
        tokenizer = open_clip_tokenizer(TEXT_TOKENS)
    eta = float(options.pop("eta", DEFAULT_ETA))
    if not 0 <= eta <= 1:
        raise WeightFileError(f"{folder}: eta must lie in 0..1, got {eta}")
    conditioning_fps = options.pop("conditioning_fps", DEFAULT_FPS)
    spec = dataclasses.replace(describe(folder.resolve().name, unet, vae, eta), **options)
    return VideoCrafterModel(
        spec,
        unet,
        vae,
        text_encoder,
        tokenizer,
        eta,
        conditioning_fps,
        fingerprint=f"{fingerprint([path])}:{dtype or 'auto'}",
    )


def _build_unet(config: Mapping[str, Any]) -> nn.Module:
    return VideoCrafterUNet(UNetConfig(**config))


def describe(name: str, unet: VideoCrafterUNet, vae: nn.Module, eta: float) -> ModelSpec:
    """What the model is and does, from its networks."""
    spatial = 2 ** (len(vae.config.block_out_channels) - 1)
    return ModelSpec(
        family="videocrafter",
        name=name,
        latent_channels=unet.config.out_channels,
        temporal_stride=1,  # every frame is a latent: any number of them
        spatial_stride=spatial,
        size_multiple=spatial * 2 ** (len(unet.config.channel_mult) - 1),
        image_to_video=False,
        lora_targets=("to_q", "to_k", "to_v"),  # as VADER trains
        width=512,
        height=320,
        frames=16,
        steps=25,
        guidance_scale=12.0,
        fps=10,
        solver="DDIM",
        step_noise=eta > 0,
        recipe="videocrafter2",
    )
