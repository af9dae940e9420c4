"""Loading Wan2.1 from a diffusers folder, or from the folder its publisher (or VideoX-Fun's) ships."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import wan_encoder_keys, wan_keys
from .files import WeightFileError, find_weights, fingerprint, read_json
from .loading import (
    Loader,
    build_clip_vision,
    build_t5,
    component,
    diffusers,
    load_tokenizer,
    read_options,
    text_files,
)
from .protocol import ModelSpec
from .wan import TEXT_TOKENS, WanModel

LAYOUTS = (
    "model_index.json of a diffusers WanPipeline or WanImageToVideoPipeline",
    "Wan's own config.json, diffusion_pytorch_model.safetensors and Wan2.1_VAE.pth",
)
"""What :func:`detect` looks for, for messages."""

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline")
VAE_FILE = "Wan2.1_VAE"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16"
IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14"
TOKENIZERS = ("google/umt5-xxl", "umt5-xxl", "tokenizer")

# What diffusers keeps in float32 too: WanTransformer3DModel._keep_in_fp32_modules.
FLOAT32_PARTS = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
DEFAULT_SHIFT = 5.0


def detect(folder: Path) -> bool:
    """Whether a folder holds a Wan model in one of the two layouts."""
    if (folder / "model_index.json").is_file():
        return read_json(folder / "model_index.json").get("_class_name") in PIPELINES
    return (folder / "config.json").is_file() and find_weights(folder, VAE_FILE) is not None


def load(
    folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", text: bool = True
) -> WanModel:
    """Load what :func:`detect` recognised.

    A file ``reward_lora.json`` in the folder may override the model's defaults: ``name``, ``width``,
    ``height``, ``frames``, ``steps``, ``guidance_scale``, ``fps``, ``lora_targets``, ``shift`` and ``text_tokens``.

    Args:
        folder: The model's folder.
        dtype: Of every network. None chooses float32 for small networks and the VAE, else bfloat16.
        device: Where the networks go; the CLIP image encoder is loaded to the CPU at the first image.
        text: Whether to load the text encoder and its tokenizer.

    Raises:
        WeightFileError: A file is missing, damaged, or of another model.
    """
    parts = _diffusers_parts(folder) if (folder / "model_index.json").is_file() else _original_parts(folder)
    options = read_options(folder, shift=(int, float), text_tokens=int)
    transformer = parts.transformer(dtype, device)
    vae = parts.vae(dtype or torch.float32, device)
    text_encoder = tokenizer = None
    text_fingerprint = ""
    if text:
        text_encoder = parts.text_encoder(dtype, device)
        tokenizer = load_tokenizer(parts.tokenizer)
    if parts.text_files:
        text_fingerprint = f"{fingerprint(parts.text_files)}:{dtype or 'auto'}"
    shift, text_tokens = options.pop("shift", parts.shift), options.pop("text_tokens", TEXT_TOKENS)
    spec = dataclasses.replace(_spec(folder.resolve().name, transformer, vae), **options)

    def image_encoder() -> nn.Module:
        return parts.image_encoder(dtype, "cpu")

    return WanModel(
        spec, transformer, vae, text_encoder, tokenizer, image_encoder, shift, text_tokens, text_fingerprint
    )


@dataclasses.dataclass(frozen=True)
class _Parts:
    """How to load each part of a model; the same for both layouts."""

    transformer: Loader
    vae: Loader
    text_encoder: Loader
    image_encoder: Loader
    tokenizer: Path
    text_files: tuple[Path, ...]
    shift: float


def _diffusers_parts(folder: Path) -> _Parts:
    index = read_json(folder / "model_index.json")
    if (index.get("transformer_2") or [None])[0] is not None or index.get("boundary_ratio") is not None:
        raise WeightFileError(f"{folder} is a Wan2.2 model with two experts; supported are models with one transformer")
    if index.get("expand_timesteps"):
        raise WeightFileError(f"{folder} is a Wan2.2 TI2V model; supported are Wan2.1 models")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    diffusion = "diffusion_pytorch_model"
    return _Parts(
        transformer=component(folder / "transformer", diffusion, _build_transformer, keep_float32=FLOAT32_PARTS),
        vae=component(folder / "vae", diffusion, diffusers("AutoencoderKLWan")),
        text_encoder=component(folder / "text_encoder", "model", build_t5),
        image_encoder=component(folder / "image_encoder", "model", build_clip_vision),
        tokenizer=folder / "tokenizer",
        text_files=text_files(find_weights(folder / "text_encoder", "model"), folder / "tokenizer"),
        shift=float(scheduler.get("flow_shift", scheduler.get("shift", DEFAULT_SHIFT))),
    )


def _original_parts(folder: Path) -> _Parts:
    config = read_json(folder / "config.json")
    tokenizer = next((folder / name for name in TOKENIZERS if (folder / name).is_dir()), folder / TOKENIZERS[0])
    return _Parts(
        transformer=component(
            folder,
            "diffusion_pytorch_model",
            _build_transformer,
            read_config=lambda tensors: wan_keys.transformer_config(tensors, config),
            convert=wan_keys.convert_transformer,
            keep_float32=FLOAT32_PARTS,
        ),
        vae=component(
            folder,
            VAE_FILE,
            diffusers("AutoencoderKLWan"),
            read_config=wan_keys.vae_config,
            convert=wan_keys.convert_vae,
        ),
        text_encoder=component(
            folder,
            TEXT_FILE,
            build_t5,
            read_config=wan_encoder_keys.umt5_config,
            convert=wan_encoder_keys.convert_umt5,
        ),
        image_encoder=component(
            folder,
            IMAGE_FILE,
            build_clip_vision,
            read_config=wan_encoder_keys.clip_config,
            convert=wan_encoder_keys.convert_clip,
        ),
        tokenizer=tokenizer,
        text_files=text_files(find_weights(folder, TEXT_FILE), tokenizer),
        shift=DEFAULT_SHIFT,
    )


def _build_transformer(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import WanTransformer3DModel

    module = WanTransformer3DModel.from_config(dict(config))
    used = module.config
    with torch.device("cpu"):  # its tables are computed, not loaded
        module.rope = type(module.rope)(used.attention_head_dim, used.patch_size, used.rope_max_seq_len)
    return module


def _spec(name: str, transformer: nn.Module, vae: nn.Module) -> ModelSpec:
    spatial = 2 ** (len(vae.config.dim_mult) - 1) * (vae.config.patch_size or 1)
    return ModelSpec(
        family="wan",
        name=name,
        latent_channels=vae.config.z_dim,
        temporal_stride=2 ** sum(vae.config.temperal_downsample),
        spatial_stride=spatial,
        size_multiple=spatial * transformer.config.patch_size[1],
        image_to_video=transformer.config.in_channels != transformer.config.out_channels,
        lora_targets=("all-linear",),  # as VideoX-Fun trains its reward LoRAs
        width=832,
        height=480,
        frames=81,
        steps=50,
        guidance_scale=6.0,
        fps=16,
    )
