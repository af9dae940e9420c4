"""From the parts of a Wan model, wherever they lie, to the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .files import WeightFileError, fingerprint
from .loading import Loader
from .protocol import ModelSpec
from .wan import TEXT_TOKENS, WanModel

# What diffusers keeps in float32 too: WanTransformer3DModel._keep_in_fp32_modules.
FLOAT32_PARTS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
EXPERTS = ("high", "low")
BOUNDARIES = {False: 0.875, True: 0.9}
"""Of Wan2.2's pairs of experts, by whether the model has channels for an image."""

# As published in wan/configs of Wan2.1 and Wan2.2. The pairs run at 3.5, but text-to-video at 4.0 (high) and 3.0 (low).
DEFAULTS = {
    "single": {"width": 832, "height": 480, "frames": 81, "steps": 50, "guidance_scale": 6.0, "fps": 16},
    "pair": {"width": 832, "height": 480, "frames": 81, "steps": 40, "guidance_scale": 3.5, "fps": 16},
    "ti2v": {"width": 1280, "height": 704, "frames": 121, "steps": 50, "guidance_scale": 5.0, "fps": 24},
}
LARGE = 40
"""Blocks of the 14B models."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """How to load each part of a model.

    Attributes:
        denoisers: By expert; one alone is called ``transformer``.
        vae, text_encoder, image_encoder: The last is asked when the first image arrives.
        tokenizer: Makes the tokenizer.
        text_files: What decides over the text encoder's answers.
        text_fingerprint: Stands for them where there are no files.
        shift: Of the flow-matching schedule; None for the published one.
        boundary: Between two experts; None for the published one.
        start_in_latents: Whether the start image takes the place of the first latent frame (TI2V); None for
            models of 48 latent channels.
    """

    denoisers: Mapping[str, Loader]
    vae: Loader
    text_encoder: Loader
    image_encoder: Loader
    tokenizer: Callable[[], Any]
    text_files: tuple[Path, ...]
    shift: float | None = None
    boundary: float | None = None
    start_in_latents: bool | None = None
    text_fingerprint: str = ""


def assemble(
    parts: Parts,
    name: str,
    options: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    text: bool,
) -> WanModel:
    """Load the parts; ``options`` override the model's own values. See :func:`.wan_files.load`.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    first, *waiting = parts.denoisers
    denoisers = {first: parts.denoisers[first](dtype, device)}
    denoisers |= {expert: parts.denoisers[expert](dtype, "cpu") for expert in waiting}
    kinds = {(network.config.in_channels, network.config.num_layers) for network in denoisers.values()}
    if len(kinds) > 1:
        raise WeightFileError(
            f"the two experts of {name} are of different models; give two that were published together"
        )
    vae = parts.vae(dtype or torch.float32, device)
    text_encoder = tokenizer = None
    if text:
        text_encoder, tokenizer = parts.text_encoder(dtype, device), parts.tokenizer()
    told = fingerprint(parts.text_files) if parts.text_files else parts.text_fingerprint
    text_fingerprint = f"{told}:{dtype or 'auto'}" if told else ""
    config = denoisers[first].config
    if config.out_channels != vae.config.z_dim:
        raise WeightFileError(
            f"{name} paints latents of {config.out_channels} channels, and its VAE reads {vae.config.z_dim}; "
            "they belong to different models"
        )
    spec = make_spec(
        name, denoisers[first], vae, tuple(denoisers), boundary=parts.boundary, start_in_latents=parts.start_in_latents
    )
    shift = options.pop("shift", parts.shift or (12.0 if len(denoisers) > 1 and not spec.image_to_video else 5.0))
    text_tokens = options.pop("text_tokens", TEXT_TOKENS)

    def image_encoder() -> nn.Module:
        return parts.image_encoder(dtype, "cpu")

    return WanModel(
        dataclasses.replace(spec, **options),
        denoisers,
        vae,
        text_encoder,
        tokenizer,
        image_encoder,
        shift,
        text_tokens,
        text_fingerprint,
    )


def make_spec(
    name: str,
    transformer: nn.Module,
    vae: nn.Module,
    experts: tuple[str, ...] = ("transformer",),
    *,
    boundary: float | None = None,
    start_in_latents: bool | None = None,
) -> ModelSpec:
    """Facts about a model, from its networks; see :class:`Parts`."""
    config, pair = transformer.config, len(experts) > 1
    more_channels = config.in_channels != config.out_channels
    ti2v = vae.config.z_dim == 48 if start_in_latents is None else start_in_latents
    size = "14b" if config.num_layers >= LARGE else "1.3b"
    spatial = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    return ModelSpec(
        family="wan",
        name=name,
        latent_channels=vae.config.z_dim,
        temporal_stride=2 ** sum(vae.config.temperal_downsample),
        spatial_stride=spatial,
        size_multiple=spatial * config.patch_size[1],
        image_to_video=more_channels or ti2v,
        lora_targets=("all-linear",),  # as VideoX-Fun trains its reward LoRAs
        **DEFAULTS["pair" if pair else "ti2v" if ti2v else "single"],
        experts=experts,
        boundary=(boundary or BOUNDARIES[more_channels]) if pair else 0.0,
        recipe="wan2.2-fun-a14b-inp-low" if pair else "wan2.2-ti2v-5b" if ti2v else f"wan2.1-fun-{size}-inp",
    )


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    """``AutoencoderKLWan``."""
    from diffusers import AutoencoderKLWan

    module = AutoencoderKLWan.from_config(dict(config))
    if not all(isinstance(halves, bool) for halves in module.config.temperal_downsample):
        raise ValueError(f"temperal_downsample must hold true or false, got {module.config.temperal_downsample}")
    return module


def build_transformer(config: Mapping[str, Any]) -> nn.Module:
    """``WanTransformer3DModel``, its rotary tables on the CPU: they are computed, not loaded."""
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel.from_config(dict(config))
    used = module.config
    with torch.device("cpu"):
        module.rope = type(module.rope)(used.attention_head_dim, used.patch_size, used.rope_max_seq_len)
    return module
